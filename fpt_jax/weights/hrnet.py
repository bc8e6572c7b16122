"""HRNetV2 from timm, from its release for ImageNet, or with the head of its release for segmentation.

All have the same names; those of a segmentation network may begin with "model.". Our names are those of
`models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import NORM_NAMES, fit, renamed, to_fill

# (our pattern, the release's text), all applied in turn
_NAMES = (
  (r"^backbone\.", ""),
  (r"^head\.mix\.conv\.", "last_layer.0."),
  (r"^head\.mix\.norm\.", "last_layer.1."),
  (r"^head\.classify\.", "last_layer.3."),
  (r"^stem\.(\d+)\.conv\.", lambda match: f"conv{int(match[1]) + 1}."),
  (r"^stem\.(\d+)\.norm\.", lambda match: f"bn{int(match[1]) + 1}."),
  (r"^stages\.0\.", "layer1."),
  (r"^stages\.(\d+)\.", lambda match: f"stage{int(match[1]) + 1}."),
  # the first transition also changes the channels of the finest branch; each branch has its own place
  (r"^transitions\.0\.0\.", "transition1.0."),
  (r"^transitions\.0\.1\.", "transition1.1.0."),
  (r"^transitions\.(\d+)\.0\.", lambda match: "transition{0}.{0}.0.".format(int(match[1]) + 1)),
  (r"\.fuse\.(\d+)\.from_(\d+)\.(\d+)\.", lambda match: fuse_name(*map(int, match.groups()))),
  (r"shortcut\.conv\.", "downsample.0."),
  (r"shortcut\.bn\.", "downsample.1."),
  (r"^(transition.*|stage.*fuse_layers.*)\.conv\.", r"\1.0."),
  (r"^(transition.*|stage.*fuse_layers.*)\.norm\.norm\.", r"\1.1.norm."),
  *NORM_NAMES,
)
_PREFIX = "model."  # of the released segmentation networks
# Tensors without a counterpart in our models: counters, the classifier of ImageNet, the loss's weights.
_IGNORED = re.compile(
  r"num_batches_tracked$|^(incre_modules|downsamp_modules|final_layer|classifier)\.|^loss\."
)
_HEAD_BIAS, _HEAD_MEAN = "last_layer.0.bias", "last_layer.1.running_mean"


def fuse_name(target: int, source: int, layer: int) -> str:
  """Returns the release's name of a layer between branches: only a path to a coarser one has several."""
  inner = f"{layer}." if source < target else ""
  return f".fuse_layers.{target}.{source}.{inner}"


def release_name(name: str) -> str:
  """Returns the release's name for one of our arrays."""
  return renamed(name, _NAMES)


def from_hrnet(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts a state dict of an HRNet to our arrays.

  Args:
    state_dict: tensors by name, in torch's layouts. A bias in front of a normalisation, which the head of
      the release has, is subtracted from the running mean.
    shapes: shapes of our model by name (`Skeleton.shapes`). A classification network fills the names under
      "backbone.", or all names if the model is an HRNet alone; a segmentation network fills all names.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
  bias, mean = tensors.get(_HEAD_BIAS), tensors.get(_HEAD_MEAN)
  if bias is not None and mean is not None and bias.shape == mean.shape:
    tensors[_HEAD_MEAN] = mean - tensors.pop(_HEAD_BIAS)
  segments = any(name.startswith("last_layer.") for name in tensors)
  wanted = to_fill(shapes, whole=segments)
  return fit(tensors, wanted, release_name, lambda name: bool(_IGNORED.search(name)))
