"""torchvision's names for the numbers of our models: ResNets and maskrcnn_resnet50_fpn.

timm's plain ResNets have the same names. Our names are those of `models.state`.
"""

import functools
import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import fit

# (our name, torchvision's name); the first that matches counts
_DETECTOR = (
  (r"backbone\.(.*)", r"backbone.body.\1"),
  (r"pyramid\.lateral\.(\d+)\.(.*)", r"backbone.fpn.inner_blocks.\1.0.\2"),
  (r"pyramid\.smooth\.(\d+)\.(.*)", r"backbone.fpn.layer_blocks.\1.0.\2"),
  (r"rpn\.conv\.(.*)", r"rpn.head.conv.0.0.\1"),
  (r"rpn\.objectness\.(.*)", r"rpn.head.cls_logits.\1"),
  (r"rpn\.deltas\.(.*)", r"rpn.head.bbox_pred.\1"),
  (r"box_head\.(fc\d)\.(.*)", r"roi_heads.box_head.\1.\2"),
  (r"box_head\.(.*)", r"roi_heads.box_predictor.\1"),
  (r"mask_head\.convs\.(\d+)\.(.*)", r"roi_heads.mask_head.\1.0.\2"),
  (r"mask_head\.deconv\.kernel", r"roi_heads.mask_predictor.conv5_mask.kernel"),
  (r"mask_head\.deconv_bias", r"roi_heads.mask_predictor.conv5_mask.bias"),
  (r"mask_head\.logits\.(.*)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
_RESNET = (
  (r"stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),
  (r"conv2\.conv\.", "conv2."),  # the convolution's part of an attention-augmented one
  (r"shortcut\.conv\.", "downsample.0."),
  (r"shortcut\.bn\.", "downsample.1."),
  (r"\.norm\.scale$", ".weight"),
  (r"\.norm\.bias$", ".bias"),
  (r"\.norm\.mean$", ".running_mean"),
  (r"\.norm\.var$", ".running_var"),
  (r"\.kernel$", ".weight"),
)
# without a counterpart in theirs: blocks of context, which start as the identity
_CONTEXT = re.compile(r"(^|\.)context\.")
# without a counterpart in ours: a counter, and the classifier that detectors leave behind
_IGNORED = re.compile(r"num_batches_tracked$|^fc\.")


def torchvision_name(name: str, *, detector: bool) -> str:
  """torchvision's name for one of ours, in a detector's state dict or in a bare ResNet's."""
  for pattern, replacement in _DETECTOR:
    if re.fullmatch(pattern, name):
      name = re.sub(pattern, replacement if detector else r"\1", name)
      break
  for pattern, replacement in _RESNET:
    name = re.sub(pattern, replacement, name)
  return name


def from_torchvision(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Our arrays from a torchvision state dict.

  Args:
    state_dict: of a ResNet, or of a whole maskrcnn_resnet50_fpn, in torch's layouts.
    shapes: the shapes of our model by name (`Skeleton.shapes`). From a ResNet's dict only the names
      under "backbone.", or all where the model is a bare ResNet, are filled; blocks of context never.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, left over, or of another shape; each is named.
  """
  detector = any(name.startswith("backbone.body.") for name in state_dict)
  bare = not any(name.startswith("backbone.") for name in shapes)
  wanted = {
    name: shape
    for name, shape in shapes.items()
    if (detector or bare or name.startswith("backbone.")) and not _CONTEXT.search(name)
  }
  return fit(
    state_dict,
    wanted,
    functools.partial(torchvision_name, detector=detector),
    lambda name: bool(_IGNORED.search(name)),
  )
