"""Max pooling, with a gradient of its own on CPUs.

XLA's gradient there keeps the four indices of every maximum, four bytes each, and scatters by them. Here, the
forward pass keeps one byte per maximum, and the backward pass gathers.

Shapes: B batch, H W rows and columns of the input, h w those of the output, C channels.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.ops import target

_SIDE = 3
# Of the positions of an axis of the padded input, 2a is row 0 of window a and row 2 of window a - 1, and
# 2a + 1 is row 1 of window a. Of both: rows of the windows, and how many windows back.
_COVERS = (((0, 0), (2, 1)), ((1, 0),))


def max_pool(x_BHWC: jax.Array) -> jax.Array:
  """Maxima of windows of 3x3 positions with stride 2, padded by one position.

  The gradient of a maximum goes to the first position of its window that has it.

  Args:
    x_BHWC: [B, H, W, C] float.

  Returns:
    [B, ceil(H / 2), ceil(W / 2), C].
  """
  if target.platform() == "cpu":
    return _with_gradient(x_BHWC.shape[1:3], x_BHWC)
  return _maxima(x_BHWC)


def _maxima(x_BHWC: jax.Array) -> jax.Array:
  return nnx.max_pool(x_BHWC, (_SIDE, _SIDE), strides=(2, 2), padding=((1, 1), (1, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(size: tuple[int, int], x_BHWC: jax.Array) -> jax.Array:
  del size
  return _maxima(x_BHWC)


def _forward(size, x_BHWC):
  y_BhwC = _maxima(x_BHWC)
  rows, columns = y_BhwC.shape[1:3]
  pads = ((0, 0), (1, 1), (1, 1), (0, 0))
  padded_BHWC = jnp.pad(x_BHWC, pads, constant_values=-jnp.inf)
  place_BhwC = jnp.zeros(y_BhwC.shape, jnp.uint8)
  for place in reversed(range(_SIDE * _SIDE)):  # the first place is written last
    i, j = divmod(place, _SIDE)
    value_BhwC = padded_BHWC[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
    place_BhwC = jnp.where(value_BhwC == y_BhwC, jnp.uint8(place), place_BhwC)
  return y_BhwC, place_BhwC


def _backward(size, place_BhwC, dy_BhwC):
  def moved(i, j, down, right):
    """The gradient of the positions (i, j) of all windows, one position further if `down` or `right` is 1."""
    part_BhwC = jnp.where(place_BhwC == _SIDE * i + j, dy_BhwC, 0)
    return jnp.pad(part_BhwC, ((0, 0), (down, 1 - down), (right, 1 - right), (0, 0)))

  pairs = [
    jnp.stack(
      [sum(moved(i, j, a, b) for i, a in rows for j, b in columns) for columns in _COVERS], 3
    )
    for rows in _COVERS
  ]
  batch, rows, columns, channels = dy_BhwC.shape
  padded_BHWC = jnp.stack(pairs, 2).reshape(batch, 2 * rows + 2, 2 * columns + 2, channels)
  return (padded_BHWC[:, 1 : size[0] + 1, 1 : size[1] + 1],)


_with_gradient.defvjp(_forward, _backward)
