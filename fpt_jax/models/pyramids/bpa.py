"""Bottom-up path augmentation of an FPN (Liu et al., Path Aggregation Network, CVPR 2018, 3.1)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import conv
from fpt_jax.models.pyramids.fpn import FeaturePyramidNetwork


class BottomUpPathAugmentation(nnx.Module):
  """An FPN, then a short way up: N2 = P2, N_{i+1} = conv(conv(N_i, stride 2) + P_{i+1}).

  Both convolutions are 3x3 with a ReLU behind. A level's stride is twice that of the one before.
  """

  def __init__(self, in_channels, *, channels: int = 256, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(dtype=dtype, rngs=rngs)
    self.fpn = FeaturePyramidNetwork(in_channels, channels=channels, **options)
    steps = range(len(in_channels) - 1)
    self.down = nnx.List([conv(channels, channels, 3, stride=2, **options) for _ in steps])
    self.fuse = nnx.List([conv(channels, channels, 3, **options) for _ in steps])
    self.channels = channels

  def __call__(self, pyramid: Pyramid) -> Pyramid:
    return self.augment(self.fpn(pyramid))

  def augment(self, pyramid: Pyramid) -> Pyramid:
    """N2..N5 of P2..P5."""
    levels = [pyramid[0]]
    for level, down, fuse in zip(pyramid[1:], self.down, self.fuse, strict=True):
      carried_BHWC = nnx.relu(down(levels[-1].masked()))
      summed = level.with_values(carried_BHWC + level.values_BHWC)
      levels.append(level.with_values(nnx.relu(fuse(summed.masked()))))
    return tuple(levels)
