"""Feature Pyramid Network (Lin et al. 2017)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import resize_nearest
from fpt_jax.models.pyramids.level_conv import LevelConv


class FeaturePyramidNetwork(nnx.Module):
  """1x1 laterals, summed top-down by nearest-neighbour upsampling, smoothed by a 3x3 convolution.

  Arguments are those of all pyramids, see `fpt_jax.models.pyramids`, and `init`, see `LevelConv`.
  """

  def __init__(
    self,
    in_channels,
    *,
    channels: int = 256,
    norm: str = "none",
    init: str = "fan_in",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, init=init, dtype=dtype, rngs=rngs)
    self.lateral = nnx.List([LevelConv(c, channels, 1, **options) for c in in_channels])
    self.smooth = nnx.List([LevelConv(channels, channels, 3, **options) for _ in in_channels])
    self.channels = (channels,) * len(in_channels)
    # torchvision's FPNs, whose weights this one takes, see on padding what their own layers put there.
    self.masks_padding = norm not in ("none", "frozen_bn")

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    outputs, top_down = [], None
    for level, lateral, smooth in reversed(
      list(zip(levels, self.lateral, self.smooth, strict=True))
    ):
      x_BHWC = lateral(level.values_BHWC, level.valid_BHW, train=train)
      if top_down is not None:
        x_BHWC = x_BHWC + resize_nearest(top_down, *level.size)
      top_down = x_BHWC
      seen_BHWC = level.with_values(x_BHWC).masked() if self.masks_padding else x_BHWC
      outputs.append(level.with_values(smooth(seen_BHWC, level.valid_BHW, train=train)))
    return tuple(reversed(outputs))
