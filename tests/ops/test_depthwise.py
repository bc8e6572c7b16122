"""Depthwise convolution against sums written out in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.depthwise import depthwise

CASES = [  # rows, columns, kernel, stride, dilation, padding
  (9, 7, 3, 1, 1, "SAME"),
  (9, 7, 3, 2, 1, "SAME"),
  (8, 10, 5, 2, 1, "SAME"),  # pads more after than before
  (10, 8, 3, 1, 4, "SAME"),
  (7, 9, 3, 2, 2, ((2, 1), (0, 3))),
  (6, 6, 5, 3, 1, "VALID"),  # the last positions are in no window
  (2, 3, 5, 1, 1, "SAME"),  # the kernel is larger than the map
]


def pads_of(padding, sides, reach, stride):
  if padding == "VALID":
    return ((0, 0), (0, 0))
  if padding != "SAME":
    return padding
  missing = [max(0, (-(-side // stride) - 1) * stride + reach + 1 - side) for side in sides]
  return tuple((m // 2, m - m // 2) for m in missing)


def written_out(x, kernel, dy, stride, dilation, padding):
  """Returns the convolution and, if `dy` is given, the gradients of its product with it; float64."""
  reach = dilation * (kernel.shape[0] - 1)
  (top, bottom), (left, right) = pads_of(padding, x.shape[1:3], reach, stride)
  padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
  rows = (padded.shape[1] - reach - 1) // stride + 1
  columns = (padded.shape[2] - reach - 1) // stride + 1
  y = np.zeros((len(x), rows, columns, x.shape[-1]))
  dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
  for r in range(rows):
    for c in range(columns):
      for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
          at = (slice(None), r * stride + i * dilation, c * stride + j * dilation)
          y[:, r, c] += padded[at] * kernel[i, j, 0]
          if dy is not None:
            dx[at] += dy[:, r, c] * kernel[i, j, 0]
            dkernel[i, j, 0] += np.sum(padded[at] * dy[:, r, c], 0)
  return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


@pytest.mark.parametrize(("rows", "columns", "kernel", "stride", "dilation", "padding"), CASES)
def test_equals_the_sum_written_out(rng, rows, columns, kernel, stride, dilation, padding):
  x = rng.standard_normal((2, rows, columns, 3))
  w = rng.standard_normal((kernel, kernel, 1, 3))
  shape = written_out(x, w, None, stride, dilation, padding)[0].shape
  dy = rng.standard_normal(shape)

  def convolve(x, w):
    return depthwise(
      x,
      w,
      (stride, stride),
      padding,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=3,
    )

  y, gradients = jax.vjp(convolve, jnp.float32(x), jnp.float32(w))
  expected = written_out(x, w, dy, stride, dilation, padding)
  for found, value in zip((y, *gradients(jnp.float32(dy))), expected, strict=True):
    np.testing.assert_allclose(found, value, atol=1e-5)
