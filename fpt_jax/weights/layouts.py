"""Arrays of ours from a state dict in torch's layouts, given how names translate."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from fpt_jax.errors import UserError


def fit(
  state_dict: Mapping[str, np.ndarray],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  their_name: Callable[[str], str],
  ignored: Callable[[str], bool],
) -> dict[str, np.ndarray]:
  """Our arrays from a state dict; every one has exactly one counterpart.

  Args:
    state_dict: tensors in torch's layouts.
    wanted: the shapes to fill, by our names.
    their_name: the tensor's name of one of ours.
    ignored: of a tensor's name, whether it may be left over.

  Returns:
    Arrays by our names.

  Raises:
    UserError: tensors are missing, left over, or of another shape; each is named.
  """
  arrays, used, complaints = {}, set(), []
  for name, shape in wanted.items():
    theirs = their_name(name)
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
  left_over = [n for n in state_dict if n not in used and not ignored(n)]
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
