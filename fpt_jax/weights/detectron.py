"""ImageNet ResNets from Detectron: R-50.pkl and R-101.pkl, which MSRA trained.

Our names are those of `models.state`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.weights.detectron2 import with_statistics
from fpt_jax.weights.layouts import fit, renamed, to_fill

# (our pattern, Detectron's text), all applied in turn
_NAMES = (
  (r"conv2\.conv\.", "conv2."),  # the convolution's part of an attention-augmented one
  (r"stages\.(\d+)\.(\d+)\.", lambda match: f"res{int(match[1]) + 2}_{match[2]}_"),
  (r"^bn1\.", "res_conv1_bn."),
  (r"_conv([123])\.", lambda match: f"_branch2{' abc'[int(match[1])]}."),
  (r"_bn([123])\.", lambda match: f"_branch2{' abc'[int(match[1])]}_bn."),
  (r"_shortcut\.conv\.", "_branch1."),
  (r"_shortcut\.bn\.", "_branch1_bn."),
  (r"^fc\.", "fc1000."),
  (r"\.norm\.scale$", "_s"),
  (r"\.norm\.mean$", "_running_mean"),
  (r"\.norm\.var$", "_running_var"),
  (r"(\.norm)?\.bias$", "_b"),
  (r"\.kernel$", "_w"),
)
# Tensors without a counterpart in our models: the optimizer's, and the classifier.
_IGNORED = re.compile(r"_momentum$|^(fc1000|pred)_[wb]$")


def detectron_name(name: str) -> str:
  """Returns Detectron's name for one of our arrays."""
  return renamed(name.removeprefix("backbone."), _NAMES)


def from_detectron(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
  """Converts the blobs of a ResNet from Detectron to our arrays.

  Args:
    state_dict: blobs by name, in Caffe2's layouts, which are torch's.
    shapes: shapes of our model by name (`Skeleton.shapes`), see `to_fill`.

  Returns:
    Arrays by our names. The normalisations of the file are a scale and an offset.

  Raises:
    UserError: blobs are missing, unused or of another shape; the message names them.
  """
  return fit(
    with_statistics(without_biases(state_dict), "_bn_s", "_bn_{}"),
    to_fill(shapes, whole=False),
    detectron_name,
    lambda name: bool(_IGNORED.search(name)),
  )


def without_biases(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Moves the biases of convolutions, which Caffe has, into the normalisations behind them."""
  arrays = dict(state_dict)
  for name in state_dict:
    layer = name.removesuffix("_b")
    norm = "res_conv1_bn" if layer == "conv1" else f"{layer}_bn"
    scale, offset = (state_dict.get(norm + end) for end in ("_s", "_b"))
    if not name.endswith("_b") or f"{layer}_w" not in state_dict or scale is None or offset is None:
      continue
    bias = np.ravel(state_dict[name])
    if bias.shape == np.shape(scale) == np.shape(offset):  # otherwise it is named as unused
      arrays[f"{norm}_b"] = offset + scale * bias
      del arrays[name]
  return arrays
