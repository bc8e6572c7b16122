"""Depthwise convolution: a separate kernel for every channel (Howard et al. 2017, section 3.1).

XLA on CPUs computes it as a grouped convolution, one group after another. Here it is the sum over the
kernel's taps of a shifted map times one weight per channel, which XLA fuses;
`scripts/benchmark_convolution.py` compares both. On other platforms, XLA's convolution is used.

Shapes: B batch, H W rows and columns of the output, C channels, h w rows and columns of the kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fpt_jax.ops.convolution import pads_of_gradient
from fpt_jax.ops.winograd import Pads


def depthwise(
  x_BHWC: jax.Array, kernel_hw1C: jax.Array, strides, padding, *, rhs_dilation=None, **options
) -> jax.Array:
  """Convolves every channel; replaces `lax.conv_general_dilated` in an `nnx.Conv`.

  Args:
    x_BHWC: [B, rows, columns, C] float.
    kernel_hw1C: [h, w, 1, C] of the same dtype.
    strides: strides of rows and columns.
    padding: "SAME", or zeros before and after the rows and the columns.
    rhs_dilation: dilations of rows and columns; None for 1.
    options: other arguments of `lax.conv_general_dilated`.

  Returns:
    [B, H, W, C].
  """
  strides, dilation = tuple(strides), tuple(rhs_dilation or (1, 1))
  if isinstance(padding, str):
    sides = [(k - 1) * d + 1 for k, d in zip(kernel_hw1C.shape[:2], dilation, strict=True)]
    padding = lax.padtype_to_pads(x_BHWC.shape[1:3], sides, strides, padding)
  padding = tuple(tuple(pad) for pad in padding)
  grouped = functools.partial(
    lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    rhs_dilation=dilation,
    **options,
  )
  taps = functools.partial(sum_of_taps, strides, padding, dilation)
  return lax.platform_dependent(x_BHWC, kernel_hw1C, cpu=taps, default=grouped)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sum_of_taps(
  strides: tuple[int, int],
  pads: Pads,
  dilation: tuple[int, int],
  x_BHWC: jax.Array,
  kernel_hw1C: jax.Array,
) -> jax.Array:
  """[B, H, W, C]: the convolution as a sum over the taps of the kernel."""
  height, width = kernel_hw1C.shape[:2]
  windows = _windows(x_BHWC, (height, width), strides, pads, dilation)
  return sum(window_BHWC * kernel_hw1C[None, None, i, j] for (i, j), window_BHWC in windows)


def _windows(x_BHWC, kernel, strides, pads, dilation):
  """Yields each tap (i, j) of a kernel and the input values it multiplies, [B, H, W, C]."""
  padded = jnp.pad(x_BHWC, [(0, 0), *pads, (0, 0)])
  # The range of positions of a tap.
  reach = [padded.shape[1 + axis] - dilation[axis] * (kernel[axis] - 1) for axis in range(2)]
  for i in range(kernel[0]):
    for j in range(kernel[1]):
      top, left = i * dilation[0], j * dilation[1]
      yield (
        (i, j),
        padded[:, top : top + reach[0] : strides[0], left : left + reach[1] : strides[1]],
      )


def _forward(strides, pads, dilation, x_BHWC, kernel_hw1C):
  return sum_of_taps(strides, pads, dilation, x_BHWC, kernel_hw1C), (x_BHWC, kernel_hw1C)


def _backward(strides, pads, dilation, saved, dy_BHWC):
  x_BHWC, kernel_hw1C = saved
  kernel = kernel_hw1C.shape[:2]

  # The input's gradient is a convolution with stride 1 and the reversed kernel; zeros are inserted at the
  # positions that the strides skipped.
  back = pads_of_gradient(x_BHWC, dy_BHWC, kernel_hw1C, strides, pads, dilation)
  edges = [(*pad, stride - 1) for pad, stride in zip(back, strides, strict=True)]
  spread_BHWC = lax.pad(dy_BHWC, jnp.zeros((), dy_BHWC.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
  no_pads = ((0, 0), (0, 0))
  dx_BHWC = sum_of_taps((1, 1), no_pads, dilation, spread_BHWC, kernel_hw1C[::-1, ::-1])

  # One image at a time: sums over a whole batch would read it from memory once per tap.
  def add_image(total, image):
    x_HWC, dy_HWC = image
    sums = [
      jnp.sum(window_BHWC[0] * dy_HWC, (0, 1), dtype=jnp.float32)
      for _, window_BHWC in _windows(x_HWC[None], kernel, strides, pads, dilation)
    ]
    return total + jnp.stack(sums), None

  zeros = jnp.zeros((kernel[0] * kernel[1], x_BHWC.shape[-1]), jnp.float32)
  total, _ = lax.scan(add_image, zeros, (x_BHWC, dy_BHWC))
  return dx_BHWC, total.reshape(kernel_hw1C.shape).astype(kernel_hw1C.dtype)


sum_of_taps.defvjp(_forward, _backward)
