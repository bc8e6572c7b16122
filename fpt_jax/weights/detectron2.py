"""ResNets and Mask R-CNN with FPN from detectron2.

Our names are those of `models.state`.
"""

import functools
import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import NORM_NAMES, first_renamed, fit, renamed, to_fill

EPSILON = 1e-5  # of the normalisations of a backbone

# (our name, detectron2's name); the first one that matches is applied
_DETECTOR = (
  (r"backbone\.(.*)", r"backbone.bottom_up.\1"),
  (r"pyramid\.lateral\.(\d+)\.(.*)", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.{m[2]}"),
  (r"pyramid\.smooth\.(\d+)\.(.*)", lambda m: f"backbone.fpn_output{int(m[1]) + 2}.{m[2]}"),
  (r"rpn\.conv\.(.*)", r"proposal_generator.rpn_head.conv.\1"),
  (r"rpn\.objectness\.(.*)", r"proposal_generator.rpn_head.objectness_logits.\1"),
  (r"rpn\.deltas\.(.*)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
  (r"box_head\.fc6\.(.*)", r"roi_heads.box_head.fc1.\1"),
  (r"box_head\.fc7\.(.*)", r"roi_heads.box_head.fc2.\1"),
  (r"box_head\.(.*)", r"roi_heads.box_predictor.\1"),
  (r"mask_head\.convs\.(\d+)\.(.*)", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}"),
  (r"mask_head\.deconv\.kernel", "roi_heads.mask_head.deconv.kernel"),
  (r"mask_head\.deconv_bias", "roi_heads.mask_head.deconv.bias"),
  (r"mask_head\.logits\.(.*)", r"roi_heads.mask_head.predictor.\1"),
)  # fmt: skip
# (our pattern, detectron2's text), all applied in turn
_RESNET = (
  *NORM_NAMES,
  (r"conv2\.conv\.", "conv2."),  # the convolution's part of an attention-augmented one
  (r"(^|bottom_up\.)conv1\.", r"\1stem.conv1."),
  (r"(^|bottom_up\.)bn1\.", r"\1stem.conv1.norm."),
  (r"stages\.(\d+)\.", lambda match: f"res{int(match[1]) + 2}."),
  (r"\.bn(\d)\.", r".conv\1.norm."),
  (r"shortcut\.conv\.", "shortcut."),
  (r"shortcut\.bn\.", "shortcut.norm."),
)
# Tensors without a counterpart in our models: constants of older versions, and the classifier of a ResNet.
_IGNORED = re.compile(
  r"num_batches_tracked$|^pixel_(mean|std)$|\.cell_anchors\.\d+$|^(linear|fc)\.(weight|bias)$"
)
# Tensors with a part for each class, and the rows of a class in them.
_PER_CLASS = {
  "roi_heads.box_predictor.bbox_pred.weight": 4,
  "roi_heads.box_predictor.bbox_pred.bias": 4,
  "roi_heads.mask_head.predictor.weight": 1,
  "roi_heads.mask_head.predictor.bias": 1,
}
_SCORES = (
  "roi_heads.box_predictor.cls_score.weight",
  "roi_heads.box_predictor.cls_score.bias",
)


def detectron2_name(name: str, *, detector: bool) -> str:
  """Returns detectron2's name for one of our arrays.

  Args:
    name: our name.
    detector: whether the state dict is that of a detector, or that of a ResNet alone.
  """
  name = first_renamed(name, _DETECTOR) if detector else name.removeprefix("backbone.")
  return renamed(name, _RESNET)


def from_detectron2(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts a state dict of detectron2 to our arrays.

  Args:
    state_dict: tensors of a ResNet or of a whole Mask R-CNN with FPN by name, in torch's layouts.
    shapes: shapes of our model by name (`Skeleton.shapes`), see `to_fill`.

  Returns:
    Arrays by our names. detectron2's background is the last class and has neither boxes nor a mask; ours
    is class 0, whose boxes and mask get weights of zero.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  detector = any(name.startswith("backbone.bottom_up.") for name in state_dict)
  return fit(
    with_statistics(background_first(state_dict), ".norm.weight", ".norm.{}"),
    to_fill(shapes, whole=detector),
    functools.partial(detectron2_name, detector=detector),
    lambda name: bool(_IGNORED.search(name)),
  )


def background_first(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the tensors of a detector with the background, detectron2's last class, as class 0."""
  arrays = dict(state_dict)
  for name in _SCORES:
    if name in arrays and np.ndim(arrays[name]):
      arrays[name] = np.roll(arrays[name], 1, axis=0)
  for name, rows in _PER_CLASS.items():
    if name in arrays and np.ndim(arrays[name]):
      nothing = np.zeros((rows, *arrays[name].shape[1:]), arrays[name].dtype)
      arrays[name] = np.concatenate([nothing, arrays[name]])
  return arrays


def with_statistics(
  state_dict: Mapping[str, np.ndarray], scale: str, statistic: str
) -> dict[str, np.ndarray]:
  """Adds means of 0 and variances of 1 where a file has normalisations as a scale and an offset alone.

  Args:
    state_dict: tensors by name.
    scale: end of the names of scales.
    statistic: what stands there in the name of a mean or a variance, with {} for "running_mean" and
      "running_var".

  Returns:
    The tensors; with statistics, unless a scale has some already. The variance is 1 - epsilon, so that
    the normalisation is the scale and the offset exactly.
  """
  arrays = dict(state_dict)
  stems = [name.removesuffix(scale) for name in arrays if name.endswith(scale)]
  means, variances = (
    [stem + statistic.format(kind) for stem in stems] for kind in ("running_mean", "running_var")
  )
  if not any(name in arrays for name in (*means, *variances)):
    for stem, mean, variance in zip(stems, means, variances, strict=True):
      size = np.shape(arrays[stem + scale])
      arrays[mean] = np.zeros(size, np.float32)
      arrays[variance] = np.full(size, 1 - EPSILON, np.float32)
  return arrays
