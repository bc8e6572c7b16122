"""Atrous Spatial Pyramid Pooling: dilated convolutions with four rates (Chen et al. 2017, DeepLabv3)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import ConvNorm

RATES = (6, 12, 18)  # at stride 16


class AtrousSpatialPyramid(nnx.Module):
  """The parallel convolutions of DeepLabv3 as four levels (Chen et al. 2017, section 3.3, fig. 5a).

  A 1x1 convolution, which is the paper's rate 1, and 3x3 convolutions with rates 6, 12 and 18 at
  stride 16, or 12, 24 and 36 at stride 8 ("the rates are doubled when output stride is 8"), each with a
  normalisation and a ReLU. So a window covers the same part of the image at either stride. DeepLabv3's
  fifth branch, the mean of the image, is not a level: the FPT paper's pyramid (section 4.2) has four
  scales.

  Only the last level is used.

  Args:
    output_stride: stride of the last level, pixels.
    in_channels, channels, norm, dtype, rngs: see `fpt_jax.models.pyramids`.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    channels: int = 256,
    output_stride: int = 8,
    norm: str = "sync_bn",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    rates = [max(1, rate * 16 // output_stride) for rate in RATES]
    self.branches = nnx.List(
      [
        ConvNorm(in_channels[-1], channels, 1, **options),
        *(ConvNorm(in_channels[-1], channels, 3, dilation=rate, **options) for rate in rates),
      ]
    )
    self.channels = (channels,) * len(self.branches)

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    return tuple(branch(levels[-1], train=train) for branch in self.branches)
