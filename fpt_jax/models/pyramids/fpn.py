"""Feature Pyramid Network (Lin et al. 2017)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import conv, resize_nearest


class FeaturePyramidNetwork(nnx.Module):
  """1x1 laterals, summed top-down by nearest-neighbour upsampling, smoothed by a 3x3 convolution."""

  def __init__(self, in_channels, *, channels: int = 256, dtype=jnp.float32, rngs: nnx.Rngs):
    self.lateral = nnx.List([conv(c, channels, 1, dtype=dtype, rngs=rngs) for c in in_channels])
    self.smooth = nnx.List(
      [conv(channels, channels, 3, dtype=dtype, rngs=rngs) for _ in in_channels]
    )
    self.channels = channels

  def __call__(self, pyramid: Pyramid) -> Pyramid:
    levels, top_down = [], None
    for level, lateral, smooth in reversed(
      list(zip(pyramid, self.lateral, self.smooth, strict=True))
    ):
      x = lateral(level.values_BHWC)
      if top_down is not None:
        x = x + resize_nearest(top_down, *level.size)
      top_down = x
      levels.append(level.with_values(smooth(x)))
    return tuple(reversed(levels))
