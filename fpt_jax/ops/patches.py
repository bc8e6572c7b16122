"""Square patches around some positions of a map, and convolutions of them.

Where few outputs of a stack of convolutions count, they and their gradients are computed from patches alone.

Shapes: B batch, H W rows and columns of a map, S positions, p q side of a patch before and after a
convolution, C D channels of the input and the output.
"""

import jax
import jax.numpy as jnp


def inside_of(size: tuple[int, int], cell_BS: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
  """Finds the positions of the patches around some cells of a map.

  Args:
    size: (rows, columns) of the map.
    cell_BS: [B, S] int32, row * columns + column of each patch's centre.
    side: rows and columns of a patch, odd.

  Returns:
    cell_BSpp, int32, the cell of each position, or the nearest one on the map, and inside_BSpp, bool,
    whether the position lies on the map.
  """
  rows, columns = size
  offset_p = jnp.arange(side) - side // 2
  row_BS, column_BS = jnp.divmod(cell_BS, columns)
  row_BSp1 = (row_BS[..., None] + offset_p[None, None])[..., None]
  column_BS1p = (column_BS[..., None] + offset_p[None, None])[..., None, :]
  nearest_BSpp = jnp.clip(row_BSp1, 0, rows - 1) * columns + jnp.clip(column_BS1p, 0, columns - 1)
  inside_BSp1 = (row_BSp1 >= 0) & (row_BSp1 < rows)
  inside_BS1p = (column_BS1p >= 0) & (column_BS1p < columns)
  return nearest_BSpp, inside_BSp1 & inside_BS1p


def patches_of(x_BHWC: jax.Array, cell_BSpp: jax.Array) -> jax.Array:
  """Returns the values of cells of a map, [B, S, p, p, C].

  Args:
    x_BHWC: [B, H, W, C].
    cell_BSpp: [B, S, p, p] int32, see `inside_of`.
  """
  batch, rows, columns, channels = x_BHWC.shape
  first_B = jnp.arange(batch) * (rows * columns)
  # One axis of indices: gathers with a batch axis are several times slower on CPUs.
  return x_BHWC.reshape(-1, channels)[first_B[:, None, None, None] + cell_BSpp]


def convolve_patches(x_BSppC: jax.Array, kernel_33CD: jax.Array, bias_D: jax.Array) -> jax.Array:
  """Convolves patches with a 3x3 kernel, without padding.

  Args:
    x_BSppC: [B, S, p, p, C].
    kernel_33CD: [3, 3, C, D] of the same dtype.
    bias_D: [D] of the same dtype.

  Returns:
    [B, S, q, q, D] with q = p - 2.
  """
  side = x_BSppC.shape[2] - 2
  taps = [x_BSppC[:, :, i : i + side, j : j + side] for i in range(3) for j in range(3)]
  kernel_XD = kernel_33CD.reshape(-1, kernel_33CD.shape[-1])
  return jnp.concatenate(taps, axis=-1) @ kernel_XD + bias_D[None, None, None, None]
