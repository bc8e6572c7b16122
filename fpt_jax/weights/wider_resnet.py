"""WiderResNet-38 from the release of In-Place Activated BatchNorm (mapillary/inplace_abn).

Our names are those of `models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import NORM_NAMES, fit, renamed, to_fill

# (our pattern, the release's text), all applied in turn
_NAMES = (
  (r"^backbone\.", ""),
  (r"^conv1\.", "mod1.conv1."),
  (
    r"^stages\.(\d+)\.(\d+)\.",
    lambda match: f"mod{int(match[1]) + 2}.block{int(match[2]) + 1}.",
  ),
  (r"\.norms\.0\.", ".bn1."),
  (r"\.norms\.(\d+)\.", lambda match: f".convs.bn{int(match[1]) + 1}."),
  (r"\.convs\.(\d+)\.", lambda match: f".convs.conv{int(match[1]) + 1}."),
  (r"\.shortcut\.", ".proj_conv."),
  *NORM_NAMES,
)
# Tensors without a counterpart in our models: counters, and the classifier with its normalisation.
_IGNORED = re.compile(r"num_batches_tracked$|^(bn_out|fc|classifier)\.")


def release_name(name: str) -> str:
  """Returns the release's name for one of our arrays."""
  return renamed(name, _NAMES)


def from_wider_resnet(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts the release's state dict to our arrays.

  The release trained them with a leaky ReLU of slope 0.01; our network has a ReLU, as GSCNN's.

  Args:
    state_dict: tensors by name, in torch's layouts.
    shapes: shapes of our model by name (`Skeleton.shapes`). Filled are the names under "backbone.", or all
      names if the model is a WiderResNet alone.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  wanted = to_fill(shapes, whole=False)
  return fit(state_dict, wanted, release_name, lambda name: bool(_IGNORED.search(name)))
