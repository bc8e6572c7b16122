"""ResNets, maskrcnn_resnet50_fpn, its v2, fcn_resnet101 and deeplabv3_resnet101 from torchvision.

timm's plain ResNets have the same names. Our names are those of `models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.errors import UserError
from fpt_jax.weights.layouts import NORM_NAMES, first_renamed, fit, renamed, to_fill

# (our name, torchvision's name); the first one that matches is applied
_DETECTOR = (
  (r"backbone\.(.*)", r"backbone.body.\1"),
  (r"pyramid\.lateral\.(\d+)\.norm\.(.*)", r"backbone.fpn.inner_blocks.\1.1.\2"),
  (r"pyramid\.smooth\.(\d+)\.norm\.(.*)", r"backbone.fpn.layer_blocks.\1.1.\2"),
  (r"pyramid\.lateral\.(\d+)\.(.*)", r"backbone.fpn.inner_blocks.\1.0.\2"),
  (r"pyramid\.smooth\.(\d+)\.(.*)", r"backbone.fpn.layer_blocks.\1.0.\2"),
  (r"rpn\.conv\.(.*)", r"rpn.head.conv.0.0.\1"),
  (r"rpn\.further_convs\.(\d+)\.(.*)", lambda m: f"rpn.head.conv.{int(m[1]) + 1}.0.{m[2]}"),
  (r"rpn\.objectness\.(.*)", r"rpn.head.cls_logits.\1"),
  (r"rpn\.deltas\.(.*)", r"rpn.head.bbox_pred.\1"),
  (r"box_head\.convs\.(\d+)\.(.*)", r"roi_heads.box_head.\1.0.\2"),
  (r"box_head\.norms\.(\d+)\.(.*)", r"roi_heads.box_head.\1.1.\2"),
  (r"box_head\.(fc\d)\.(.*)", r"roi_heads.box_head.\1.\2"),
  (r"box_head\.(.*)", r"roi_heads.box_predictor.\1"),
  (r"mask_head\.convs\.(\d+)\.(.*)", r"roi_heads.mask_head.\1.0.\2"),
  (r"mask_head\.norms\.(\d+)\.(.*)", r"roi_heads.mask_head.\1.1.\2"),
  (r"mask_head\.deconv\.kernel", r"roi_heads.mask_predictor.conv5_mask.kernel"),
  (r"mask_head\.deconv_bias", r"roi_heads.mask_predictor.conv5_mask.bias"),
  (r"mask_head\.logits\.(.*)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
# the same for fcn_resnet101 and deeplabv3_resnet101
_SEGMENTER = (
  (r"head\.mix\.conv\.(.*)", r"classifier.0.\1"),
  (r"head\.mix\.norm\.(.*)", r"classifier.1.\1"),
  (r"head\.mix\.parallel\.branches\.(\d+)\.conv\.(.*)", r"classifier.0.convs.\1.0.\2"),
  (r"head\.mix\.parallel\.branches\.(\d+)\.norm\.(.*)", r"classifier.0.convs.\1.1.\2"),
  (r"head\.mix\.image\.conv\.(.*)", r"classifier.0.convs.4.1.\1"),
  (r"head\.mix\.image\.norm\.(.*)", r"classifier.0.convs.4.2.\1"),
  (r"head\.mix\.project\.conv\.(.*)", r"classifier.0.project.0.\1"),
  (r"head\.mix\.project\.norm\.(.*)", r"classifier.0.project.1.\1"),
  (r"head\.mix\.smooth\.conv\.(.*)", r"classifier.1.\1"),
  (r"head\.mix\.smooth\.norm\.(.*)", r"classifier.2.\1"),
  (r"head\.classify\.(.*)", r"classifier.4.\1"),
  (r"auxiliary\.mix\.conv\.(.*)", r"aux_classifier.0.\1"),
  (r"auxiliary\.mix\.norm\.(.*)", r"aux_classifier.1.\1"),
  (r"auxiliary\.classify\.(.*)", r"aux_classifier.4.\1"),
)
# (our pattern, torchvision's text), all applied in turn
_RESNET = (
  (r"stages\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),
  (r"conv2\.conv\.", "conv2."),  # the convolution's part of an attention-augmented one
  (r"shortcut\.conv\.", "downsample.0."),
  (r"shortcut\.bn\.", "downsample.1."),
  *NORM_NAMES,
)
# Tensors without a counterpart in our models: counters, and the classifier of a ResNet.
_IGNORED = re.compile(r"num_batches_tracked$|^fc\.")
# What timm's ResNets with three convolutions in the stem, or with pooling in the shortcuts, have.
_VARIANT = re.compile(r"(^|\.)(conv1\.\d+\.weight|downsample\.2\.\w+)$")
_AUXILIARY = "aux_classifier."  # of segmentation networks; used in training only


def torchvision_name(name: str, *, detector: bool) -> str:
  """Returns torchvision's name for one of our arrays.

  Args:
    name: our name.
    detector: whether the state dict is that of a detector, or that of a ResNet alone.
  """
  name = first_renamed(name, _DETECTOR) if detector else name.removeprefix("backbone.")
  return renamed(name, _RESNET)


def from_torchvision(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts a torchvision state dict to our arrays.

  Args:
    state_dict: tensors of a ResNet, of a whole maskrcnn_resnet50_fpn or of its v2 by name, in torch's
      layouts.
    shapes: shapes of our model by name (`Skeleton.shapes`). A ResNet's tensors fill the names under
      "backbone.", or all names if the model is a ResNet alone. Context blocks are not filled. The
      convolution in an attention-augmented one gets the first output channels of the tensor.

  Returns:
    Arrays by our names.

  Raises:
    UserError: the ResNet has another stem or other shortcuts; or tensors are missing, unused or of another
      shape; the message names them.
  """
  detector = any(name.startswith("backbone.body.") for name in state_dict)
  others = [name for name in state_dict if _VARIANT.search(name)]
  if others:
    raise UserError(
      f"the weights are those of a ResNet with another stem or with pooled shortcuts ({others[0]}), such as "
      "timm's resnet50d; choose weights of a plain ResNet, such as resnet50"
    )
  wanted = to_fill(shapes, whole=detector)
  convs = sum(bool(re.fullmatch(r"box_head\.convs\.\d+\.kernel", name)) for name in wanted)

  def their_name(name: str) -> str:
    theirs = torchvision_name(name, detector=detector)
    # behind convolutions, the layers are numbered, and number `convs` flattens
    return theirs.replace(".box_head.fc6.", f".box_head.{convs + 1}.") if convs else theirs

  return fit(state_dict, wanted, their_name, lambda name: bool(_IGNORED.search(name)))


def from_torchvision_segmentation(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts a torchvision state dict of a segmentation network to our arrays.

  Args:
    state_dict: tensors of a whole fcn_resnet50, fcn_resnet101, deeplabv3_resnet50 or deeplabv3_resnet101
      by name, in torch's layouts. Those of the auxiliary head are not used if the model has none.
    shapes: shapes of our model by name (`Skeleton.shapes`), all of which are filled.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  auxiliary = any(name.startswith("auxiliary.") for name in shapes)

  def their_name(name: str) -> str:
    return renamed(first_renamed(name, _SEGMENTER), _RESNET)

  def ignored(name: str) -> bool:
    return bool(_IGNORED.search(name)) or (not auxiliary and name.startswith(_AUXILIARY))

  return fit(state_dict, shapes, their_name, ignored)
