"""Conversion of state dicts from torch's layouts to ours."""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from fpt_jax.errors import UserError, first_of
from fpt_jax.models.backbones.context_blocks import in_context_block

# (our pattern, torch's text) of normalisations and kernels
NORM_NAMES = (
  (r"\.norm\.scale$", ".weight"),
  (r"\.norm\.bias$", ".bias"),
  (r"\.norm\.mean$", ".running_mean"),
  (r"\.norm\.var$", ".running_var"),
  (r"\.kernel$", ".weight"),
)


def renamed(name: str, rules: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
  """Applies regular expressions to a name, one after the other.

  Args:
    name: name of an array.
    rules: pairs of a pattern and its replacement, as for `re.sub`.
  """
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def first_renamed(name: str, rules: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
  """Applies the first of the rules whose pattern matches the whole name; arguments as for `renamed`."""
  for pattern, replacement in rules:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, replacement, name)
  return name


def to_fill(
  shapes: Mapping[str, jax.ShapeDtypeStruct], *, whole: bool
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of our arrays that a file of weights fills.

  Args:
    shapes: shapes of our model by name (`Skeleton.shapes`).
    whole: whether the file has the whole model; otherwise it has a backbone, which fills the names under
      "backbone.", or all names if the model is a backbone alone. Context blocks are in no file.
  """
  whole = whole or not any(name.startswith("backbone.") for name in shapes)
  return {
    name: shape
    for name, shape in shapes.items()
    if (whole or name.startswith("backbone.")) and not in_context_block(name)
  }


def fit(
  state_dict: Mapping[str, np.ndarray],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  their_name: Callable[[str], str],
  ignored: Callable[[str], bool],
) -> dict[str, np.ndarray]:
  """Converts a state dict to our arrays, each of which has exactly one tensor.

  Args:
    state_dict: tensors by name, in torch's layouts.
    wanted: shapes of our arrays by name.
    their_name: function from our name to the tensor's name.
    ignored: function from a tensor's name to whether it may remain unused.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, unused or of another shape; the message names them.
  """
  arrays, used, problems = {}, set(), []
  for name, shape in wanted.items():
    theirs = their_name(name)
    if theirs not in state_dict:
      problems.append(f"{theirs} is missing")
      continue
    used.add(theirs)
    array = to_our_layout(name)(np.asarray(state_dict[theirs]), shape.shape)
    if array is None:
      problems.append(
        f"{theirs} is {tuple(np.shape(state_dict[theirs]))} and does not fit {name} {shape.shape}"
      )
      continue
    arrays[name] = array.astype(shape.dtype)
  unused = [n for n in state_dict if n not in used and not ignored(n)]
  problems += [f"{name} has no place in the model" for name in unused]
  if problems:
    raise UserError(f"the weights do not fit the config's model: {first_of(problems, 8, '; ')}")
  return arrays


def to_our_layout(name: str) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]:
  """Returns a function (torch's array, our shape) -> our array, or None if the shape does not fit."""
  if name.endswith("box_head.fc6.kernel"):
    return _flattened_linear
  if name.endswith("deconv.kernel"):
    return _deconvolution
  if name.endswith("conv2.conv.kernel"):
    return _first_channels
  return _plain


def _plain(array, shape):
  if array.ndim == 4:
    array = array.transpose(2, 3, 1, 0)  # OIHW to HWIO
  elif array.ndim == 2:
    array = array.T
  return array if array.shape == shape else None


def _first_channels(array, shape):
  """Converts the first output channels of a convolution; attention has replaced the others."""
  return _plain(array[: shape[-1]], shape)


def _flattened_linear(array, shape):
  """Converts a layer on a flattened 7 x 7 map: torch flattens (C, 7, 7), we flatten (7, 7, C)."""
  hidden, inputs = array.shape
  if (inputs, hidden) != shape or inputs % 49:
    return None
  return array.reshape(hidden, -1, 7, 7).transpose(2, 3, 1, 0).reshape(inputs, hidden)


def _deconvolution(array, shape):
  """Converts a transposed convolution [I, O, 2, 2] to a matrix [I, 2 * 2 * O]."""
  if array.ndim != 4:
    return None
  array = array.transpose(0, 2, 3, 1).reshape(array.shape[0], -1)
  return array if array.shape == shape else None
