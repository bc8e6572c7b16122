"""Neighbours of the positions of a map."""

import jax
import jax.numpy as jnp


def shifted(x_BHW: jax.Array, rows: int, columns: int) -> jax.Array:
  """Returns what lies so many rows below and columns right of every position; zero outside the map.

  Args:
    x_BHW: [B, H, W, ...] array.
    rows, columns: distance, negative for above and left.

  Returns:
    Same shape and dtype.
  """
  rest = [(0, 0, 0)] * (x_BHW.ndim - 3)
  zero = jnp.zeros((), x_BHW.dtype)
  return jax.lax.pad(x_BHW, zero, [(0, 0, 0), (-rows, rows, 0), (-columns, columns, 0), *rest])
