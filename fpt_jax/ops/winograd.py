"""3x3 convolutions with stride 1 by Winograd's minimal filtering, F(2x2, 3x3).

Four outputs of two rows and two columns take 16 multiplications of transformed inputs and kernels and not 36.
The 16 products of a strip of tiles are matrix products over the channels. `scripts/benchmark_convolution.py`
compares this form with XLA's own.

Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4.1.

Shapes: B batch, H W rows and columns of the output, C D channels of the input and the output, T tiles of a
strip. "Parts" are lists of 4 rows of 4 arrays, one for each position of a transformed tile.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
Parts = list[list[jax.Array]]

# Bytes of the transformed inputs of a strip, which should stay in a cache.
_STRIP_BYTES = 1 << 24


def convolve(x_BHWC: jax.Array, kernel_33CD: jax.Array, pads: Pads, *, precision=None) -> jax.Array:
  """Convolves a map with a 3x3 kernel.

  Args:
    x_BHWC: [B, rows, columns, C] float32.
    kernel_33CD: [3, 3, C, D] float32.
    pads: zeros before and after the rows and the columns.
    precision: precision of the products, see `jax.lax.Precision`.

  Returns:
    [B, H, W, D]; H is rows + sum(pads[0]) - 2.
  """
  channels, out_channels = kernel_33CD.shape[2:]
  strips = _Strips(x_BHWC.shape, pads, max(channels, out_channels))
  kernels_CD = _both_axes(_transformed_kernel, [list(row) for row in kernel_33CD])

  def one(index, map_BHWX):
    inputs_TC = strips.transformed_input(map_BHWX[..., :channels], index)
    products_TD = _pairwise(
      lambda x, k: jnp.matmul(x, k, precision=precision), inputs_TC, kernels_CD
    )
    outputs_BhWD = strips.joined(_both_axes(_transformed_output, products_TD))
    return lax.dynamic_update_slice_in_dim(map_BHWX, outputs_BhWD, 2 * strips.rows * index, 1)

  # Outputs replace inputs: the strips below do not read the rows that a strip writes.
  spare = [(0, 0, 0)] * 3 + [(0, max(out_channels - channels, 0), 0)]
  map_BHWX = lax.pad(strips.padded_input(x_BHWC, pads), jnp.zeros((), x_BHWC.dtype), spare)
  map_BHWX = lax.fori_loop(0, strips.count, one, map_BHWX)
  return map_BHWX[:, : strips.size[0], : strips.size[1], :out_channels]


def kernel_gradient(
  x_BHWC: jax.Array, dy_BHWD: jax.Array, pads: Pads, *, precision=None
) -> jax.Array:
  """The gradient of `convolve` with respect to the kernel, [3, 3, C, D]; arguments as there."""
  strips = _Strips(x_BHWC.shape, pads, max(x_BHWC.shape[3], dy_BHWD.shape[3]))
  padded_BHWC = strips.padded_input(x_BHWC, pads)
  padded_dy_BHWD = strips.padded_output(dy_BHWD)

  def one(total_CD, index):
    inputs_TC = strips.transformed_input(padded_BHWC, index)
    outputs_TD = _both_axes(_transpose_output, strips.split(padded_dy_BHWD, index))

    def product(x_TC, dy_TD):
      return lax.dot_general(x_TC, dy_TD, (((0,), (0,)), ((), ())), precision=precision)

    return _pairwise(jnp.add, total_CD, _pairwise(product, inputs_TC, outputs_TD)), None

  zeros_CD = jnp.zeros((x_BHWC.shape[3], dy_BHWD.shape[3]), x_BHWC.dtype)
  total_CD, _ = lax.scan(one, [[zeros_CD] * 4] * 4, jnp.arange(strips.count))
  return jnp.stack([jnp.stack(row) for row in _both_axes(_transpose_kernel, total_CD)])


class _Strips:
  """The output of a convolution in strips of rows of 2x2 tiles, equal for all images.

  Attributes:
    size: (rows, columns) of the output.
    rows, columns: tiles of a strip.
    count: number of strips.
  """

  def __init__(self, shape: tuple[int, ...], pads: Pads, channels: int):
    batch = shape[0]
    height, width = (n + sum(pad) - 2 for n, pad in zip(shape[1:3], pads, strict=True))
    self.size = height, width
    rows, self.columns = -(-height // 2), -(-width // 2)
    most = max(_STRIP_BYTES // (16 * 4 * batch * self.columns * channels), 1)
    self.count = -(-rows // most)
    self.rows = -(-rows // self.count)

  def _filled(self, x_BHWC, before, beyond):
    """The map with zeros before it, and so many behind it that all strips have a size, and `beyond`."""
    tiles = (self.count * self.rows, self.columns)
    edges = [
      (first, 2 * n + beyond - first - length, 0)
      for first, n, length in zip(before, tiles, x_BHWC.shape[1:3], strict=True)
    ]
    return lax.pad(x_BHWC, jnp.zeros((), x_BHWC.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

  def padded_input(self, x_BHWC: jax.Array, pads: Pads) -> jax.Array:
    return self._filled(x_BHWC, (pads[0][0], pads[1][0]), 2)

  def padded_output(self, dy_BHWD: jax.Array) -> jax.Array:
    return self._filled(dy_BHWD, (0, 0), 0)

  def _of_strip(self, padded_BHWC, index, side) -> Parts:
    """The positions (i, j) of each tile of side x side positions of a strip, arrays [T, C]."""
    rows, columns = self.rows, self.columns
    strip_BHWC = lax.dynamic_slice_in_dim(padded_BHWC, 2 * rows * index, 2 * rows + side - 2, 1)
    return [
      [
        strip_BHWC[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].reshape(
          -1, strip_BHWC.shape[3]
        )
        for j in range(side)
      ]
      for i in range(side)
    ]

  def transformed_input(self, padded_BHWC: jax.Array, index) -> Parts:
    return _both_axes(_transformed_input, self._of_strip(padded_BHWC, index, 4))

  def split(self, padded_BHWD: jax.Array, index) -> Parts:
    return self._of_strip(padded_BHWD, index, 2)

  def joined(self, outputs_TD: Parts) -> jax.Array:
    """[B, 2 * rows, 2 * columns, D]: the inverse of `split`."""
    channels = outputs_TD[0][0].shape[1]
    tiles_BhwD = [
      [y_TD.reshape(-1, self.rows, self.columns, channels) for y_TD in row] for row in outputs_TD
    ]
    rows_BhWD = jnp.stack([jnp.stack(row, 3) for row in tiles_BhwD], 2)
    return rows_BhWD.reshape(-1, 2 * self.rows, 2 * self.columns, channels)


# The transforms of Lavin & Gray, section 4.1, along one axis: B^T d, G g, A^T m, and the transposes of the
# last two. The sums are written out, as products with these matrices would be slower.


def _transformed_input(d):
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transformed_kernel(g):
  even, odd = 0.5 * (g[0] + g[2]), 0.5 * g[1]
  return [g[0], even + odd, even - odd, g[2]]


def _transformed_output(m):
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _transpose_output(y):
  return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _transpose_kernel(u):
  return [u[0] + 0.5 * (u[1] + u[2]), 0.5 * (u[1] - u[2]), 0.5 * (u[1] + u[2]) + u[3]]


def _both_axes(transform: Callable[[list], list], parts: Parts) -> Parts:
  """Applies a transform of lists of arrays to the columns and to the rows."""

  def transposed(parts) -> Iterator[list]:
    return map(list, zip(*parts, strict=True))

  by_column = [transform(column) for column in transposed(parts)]
  return [transform(row) for row in transposed(by_column)]


def _pairwise(function: Callable, left: Parts, right: Parts) -> Parts:
  return [
    [function(*pair) for pair in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)
  ]
