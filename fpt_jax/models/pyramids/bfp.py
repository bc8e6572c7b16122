"""Bottom-up Feature Pyramid: the backbone's own levels, made equally thick (Lin et al. 2017, fig. 1)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import conv


class BottomUpFeaturePyramid(nnx.Module):
  """A 1x1 convolution a level and nothing between levels: the paper's baseline and FPT's input."""

  def __init__(self, in_channels, *, channels: int = 256, dtype=jnp.float32, rngs: nnx.Rngs):
    self.lateral = nnx.List([conv(c, channels, 1, dtype=dtype, rngs=rngs) for c in in_channels])
    self.channels = channels

  def __call__(self, pyramid: Pyramid) -> Pyramid:
    return tuple(
      level.with_values(lateral(level.values_BHWC))
      for lateral, level in zip(self.lateral, pyramid, strict=True)
    )
