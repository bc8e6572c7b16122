"""Bottom-up Feature Pyramid: the levels of the backbone, all with the same number of channels."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.pyramids.level_conv import LevelConv


class BottomUpFeaturePyramid(nnx.Module):
  """One 1x1 convolution per level: the paper's baseline and the input of FPT (Lin et al. 2017, fig. 1).

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
    self.channels = (channels,) * len(in_channels)

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    return tuple(
      level.with_values(lateral(level.values_BHWC, level.valid_BHW, train=train))
      for lateral, level in zip(self.lateral, levels, strict=True)
    )
