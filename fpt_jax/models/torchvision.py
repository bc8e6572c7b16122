"""torchvision's names and layouts for the numbers of our models.

ResNets and maskrcnn_resnet50_fpn. Our names are those of `models.state`; every one of ours has exactly
one counterpart, so what is missing or left over can be told by name.
"""

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from fpt_jax.errors import UserError

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
  (r"shortcut\.conv\.", "downsample.0."),
  (r"shortcut\.bn\.", "downsample.1."),
  (r"\.norm\.scale$", ".weight"),
  (r"\.norm\.bias$", ".bias"),
  (r"\.norm\.mean$", ".running_mean"),
  (r"\.norm\.var$", ".running_var"),
  (r"\.kernel$", ".weight"),
)
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
      under "backbone.", or all where the model is a bare ResNet, are filled.

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
    if detector or bare or name.startswith("backbone.")
  }
  arrays, used, complaints = {}, set(), []
  for name, shape in wanted.items():
    theirs = torchvision_name(name, detector=detector)
    if theirs not in state_dict:
      complaints.append(f"{theirs} is missing")
      continue
    used.add(theirs)
    array = to_our_layout(name)(np.asarray(state_dict[theirs]), shape.shape)
    if array is None:
      complaints.append(
        f"{theirs} is {tuple(np.shape(state_dict[theirs]))} and does not fit {name} {shape.shape}"
      )
      continue
    arrays[name] = array.astype(shape.dtype)
  left_over = [n for n in state_dict if n not in used and not _IGNORED.search(n)]
  complaints += [f"{name} has no place in the model" for name in left_over]
  if complaints:
    more = f" and {len(complaints) - 8} more" if len(complaints) > 8 else ""
    raise UserError(f"the weights do not fit the config's model: {'; '.join(complaints[:8])}{more}")
  return arrays


def to_our_layout(name: str) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]:
  """The function (torch's array, our shape) -> our array, or None where it does not fit."""
  if name.endswith("box_head.fc6.kernel"):
    return _flattened_linear
  if name.endswith("deconv.kernel"):
    return _deconvolution
  return _plain


def _plain(array, shape):
  if array.ndim == 4:
    array = array.transpose(2, 3, 1, 0)  # OIHW to HWIO
  elif array.ndim == 2:
    array = array.T
  return array if array.shape == shape else None


def _flattened_linear(array, shape):
  """A layer on a flattened 7 x 7 map: torch flattens (C, 7, 7), we flatten (7, 7, C)."""
  hidden, inputs = array.shape
  if (inputs, hidden) != shape or inputs % 49:
    return None
  return array.reshape(hidden, -1, 7, 7).transpose(2, 3, 1, 0).reshape(inputs, hidden)


def _deconvolution(array, shape):
  """A transposed convolution [I, O, 2, 2] as a matrix [I, 2 * 2 * O]."""
  if array.ndim != 4:
    return None
  array = array.transpose(0, 2, 3, 1).reshape(array.shape[0], -1)
  return array if array.shape == shape else None
