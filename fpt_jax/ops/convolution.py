"""Convolutions: XLA's own, except on CPUs.

There, 3x3 convolutions of large maps take Winograd's form, which has fewer products (`ops/winograd.py`). And
XLA's gradient of a kernel falls to a fifth of the rate of a matrix product as soon as the map is large. Here
it is one matrix product for each row of the kernel: the gradient of all columns of a row is the product of
the input, shifted by the row, with `dy`, shifted by each column. `scripts/benchmark_convolution.py` compares
them.

Shapes: B batch, H W rows and columns of the output, C D channels of the input and the output, h w rows and
columns of the kernel, E w * D.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fpt_jax.ops import target, winograd
from fpt_jax.ops.conditions import compute_if
from fpt_jax.ops.winograd import Pads

# Bytes of an input and its kernel from which what is made of the kernel waits, which takes longer to compile.
_WAITING_BYTES = 1 << 20

# Channels and positions from which Winograd's form saves more time than its transforms take.
_WINOGRAD_CHANNELS = 128
_WINOGRAD_POSITIONS = 400


def convolve(
  x_BHWC: jax.Array,
  kernel_hwCD: jax.Array,
  strides,
  padding: Pads,
  *,
  rhs_dilation=None,
  feature_group_count: int = 1,
  precision=None,
  **options,
) -> jax.Array:
  """Convolves a map; replaces `lax.conv_general_dilated` in an `nnx.Conv`.

  Args:
    x_BHWC: [B, rows, columns, C] float.
    kernel_hwCD: [h, w, C, D] of the same dtype.
    strides: strides of rows and columns.
    padding: zeros before and after the rows and the columns.
    rhs_dilation: dilations of rows and columns; None for 1.
    feature_group_count: groups of channels; XLA's form is used for more than one.
    precision: precision of the products, see `jax.lax.Precision`.
    options: other arguments that an `nnx.Conv` passes to `lax.conv_general_dilated`.

  Returns:
    [B, H, W, D].
  """
  strides, dilation = tuple(strides), tuple(rhs_dilation or (1, 1))
  if target.platform() == "cpu" and strides == (1, 1) and feature_group_count == 1:
    pads = tuple(tuple(pad) for pad in padding)
    return _with_stride_1(pads, dilation, precision, x_BHWC, kernel_hwCD)
  return lax.conv_general_dilated(
    x_BHWC,
    kernel_hwCD,
    strides,
    padding,
    rhs_dilation=dilation,
    feature_group_count=feature_group_count,
    precision=precision,
    **options,
  )


def pointwise(x_BHWC, kernel_11CD, strides, padding, *, precision, **_) -> jax.Array:
  """A 1x1 convolution as a matrix product, whose gradients XLA computes four times as fast on CPUs."""
  del padding  # a 1x1 kernel has none
  x_BHWC = x_BHWC[:, :: strides[0], :: strides[1]]
  product = _with_gradient if target.platform() == "cpu" else _of_channels
  return product(precision, x_BHWC, kernel_11CD[0, 0])


def _of_channels(precision, x_BHWC, kernel_CD):
  return lax.dot_general(x_BHWC, kernel_CD, (((3,), (0,)), ((), ())), precision=precision)


_with_gradient = jax.custom_vjp(_of_channels, nondiff_argnums=(0,))


def _of_channels_forward(precision, x_BHWC, kernel_CD):
  return _of_channels(precision, x_BHWC, kernel_CD), (x_BHWC, kernel_CD)


def _of_channels_backward(precision, saved, dy_BHWD):
  """JAX's own gradient of the kernel is a transpose, for which XLA copies `dy` transposed."""
  x_BHWC, kernel_CD = saved
  dx_BHWC = lax.dot_general(dy_BHWD, kernel_CD, (((3,), (1,)), ((), ())), precision=precision)
  x_NC, dy_ND = (values.reshape(-1, values.shape[-1]) for values in (x_BHWC, dy_BHWD))
  return dx_BHWC, lax.dot_general(x_NC, dy_ND, (((0,), (0,)), ((), ())), precision=precision)


_with_gradient.defvjp(_of_channels_forward, _of_channels_backward)


def pads_of_gradient(
  x_BHWC: jax.Array, dy_BHWD: jax.Array, kernel_hwCD: jax.Array, strides, pads: Pads, dilation
) -> Pads:
  """Returns the padding of `dy` with which its convolution with the reversed kernel gives the gradient of x.

  That convolution has stride 1 and the same dilation; between the positions of `dy`, strides - 1 zeros are
  inserted before.
  """
  edges = []
  for axis in range(2):
    reach = dilation[axis] * (kernel_hwCD.shape[axis] - 1)
    length = (dy_BHWD.shape[1 + axis] - 1) * strides[axis] + 1
    before = reach - pads[axis][0]
    edges.append((before, x_BHWC.shape[1 + axis] + reach - length - before))
  rows, columns = edges
  return rows, columns


def _product(pads, dilation, precision, x_BHWC, kernel_hwCD):
  if _takes_winograd(x_BHWC, kernel_hwCD, dilation):
    return winograd.convolve(x_BHWC, kernel_hwCD, pads, precision=precision)
  return lax.conv_general_dilated(
    x_BHWC,
    kernel_hwCD,
    (1, 1),
    pads,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )


def _takes_winograd(x_BHWC, kernel_hwCD, dilation) -> bool:
  # bfloat16 would lose digits in the transforms
  return (
    not target.is_written_out()
    and kernel_hwCD.shape[:2] == (3, 3)
    and dilation == (1, 1)
    and x_BHWC.dtype == jnp.float32
    and min(kernel_hwCD.shape[2:]) >= _WINOGRAD_CHANNELS
    and math.prod(x_BHWC.shape[:3]) >= _WINOGRAD_POSITIONS
  )


def _value(pads, dilation, precision, x_BHWC, kernel_hwCD):
  def product():
    return _product(pads, dilation, precision, x_BHWC, kernel_hwCD)

  transforms = _takes_winograd(x_BHWC, kernel_hwCD, dilation)
  waits = transforms and _is_large(x_BHWC, kernel_hwCD)
  return _waiting_for(x_BHWC, product) if waits else product()


_with_stride_1 = jax.custom_vjp(_value, nondiff_argnums=(0, 1, 2))


def _forward(pads, dilation, precision, x_BHWC, kernel_hwCD):
  return _value(pads, dilation, precision, x_BHWC, kernel_hwCD), (x_BHWC, kernel_hwCD)


def _backward(pads, dilation, precision, saved, dy_BHWD):
  x_BHWC, kernel_hwCD = saved

  def gradients():
    return _gradients(pads, dilation, precision, x_BHWC, kernel_hwCD, dy_BHWD)

  return _waiting_for(dy_BHWD, gradients) if _is_large(x_BHWC, kernel_hwCD) else gradients()


def _is_large(x_BHWC: jax.Array, kernel_hwCD: jax.Array) -> bool:
  return x_BHWC.nbytes + kernel_hwCD.nbytes >= _WAITING_BYTES


def _waiting_for(x_BHWC: jax.Array, linear: Callable[[], Any]) -> Any:
  """Returns `linear()`, a linear function of `x_BHWC`: zeros if that is zero.

  Inside a condition, transformed or reversed kernels and shifted inputs wait for `x_BHWC`. Otherwise, XLA
  makes those of all layers at the beginning, a sixth of a step's memory; on CPUs, it drops barriers.
  """
  return compute_if(jnp.any(x_BHWC != 0), linear)


def _gradients(pads, dilation, precision, x_BHWC, kernel_hwCD, dy_BHWD):
  """The gradients of the input and the kernel."""
  back = pads_of_gradient(x_BHWC, dy_BHWD, kernel_hwCD, (1, 1), pads, dilation)
  reversed_hwDC = kernel_hwCD[::-1, ::-1].swapaxes(2, 3)
  dx_BHWC = _product(back, dilation, precision, dy_BHWD, reversed_hwDC)
  if _takes_winograd(x_BHWC, kernel_hwCD, dilation):
    return dx_BHWC, winograd.kernel_gradient(x_BHWC, dy_BHWD, pads, precision=precision)
  rows, columns, channels, out_channels = kernel_hwCD.shape
  dy_BHWE = jnp.concatenate(
    [_shift(dy_BHWD, 2, j * dilation[1] - pads[1][0], x_BHWC.shape[2]) for j in range(columns)],
    axis=-1,
  )
  # One contracted axis: XLA takes 1.4 times as long to contract three.
  dy_NE = dy_BHWE.reshape(-1, columns * out_channels)
  dkernel_hCE = jnp.stack(
    [
      lax.dot_general(
        _shift(x_BHWC, 1, pads[0][0] - i * dilation[0], dy_BHWD.shape[1]).reshape(-1, channels),
        dy_NE,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
      )
      for i in range(rows)
    ]
  )
  dkernel_hCwD = dkernel_hCE.reshape(rows, channels, columns, out_channels)
  return dx_BHWC, dkernel_hCwD.transpose(0, 2, 1, 3).astype(kernel_hwCD.dtype)


def _shift(x_BHWC: jax.Array, axis: int, start: int, length: int) -> jax.Array:
  """The map moved by `start` along an axis, and cut off or filled with zeros to a length."""
  edges = [(0, 0, 0)] * 4
  edges[axis] = (start, length - x_BHWC.shape[axis] - start, 0)
  return lax.pad(x_BHWC, jnp.zeros((), x_BHWC.dtype), edges)


_with_stride_1.defvjp(_forward, _backward)
