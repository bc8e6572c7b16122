"""Bottom-up path augmentation of an FPN (Liu et al., Path Aggregation Network, CVPR 2018, section 3.1)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.pyramids.fpn import FeaturePyramidNetwork
from fpt_jax.models.pyramids.level_conv import LevelConv


class BottomUpPathAugmentation(nnx.Module):
  """An FPN and a bottom-up path: N2 = P2, N_{i+1} = conv(conv(N_i, stride 2) + P_{i+1}).

  Both convolutions are 3x3 and followed by a ReLU. The stride of each level is twice that of the level
  before.

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
    self.fpn = FeaturePyramidNetwork(in_channels, channels=channels, **options)
    steps = range(len(in_channels) - 1)
    self.down = nnx.List([LevelConv(channels, channels, 3, stride=2, **options) for _ in steps])
    self.fuse = nnx.List([LevelConv(channels, channels, 3, **options) for _ in steps])
    self.channels = self.fpn.channels

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    return self.augment(self.fpn(levels, train=train), train=train)

  def augment(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    """Returns N2..N5 of P2..P5."""
    outputs = [levels[0]]
    for level, down, fuse in zip(levels[1:], self.down, self.fuse, strict=True):
      carried_BHWC = nnx.relu(down(outputs[-1].masked(), level.valid_BHW, train=train))
      summed = level.with_values(carried_BHWC + level.values_BHWC)
      fused_BHWC = fuse(summed.masked(), level.valid_BHW, train=train)
      outputs.append(level.with_values(nnx.relu(fused_BHWC)))
    return tuple(outputs)
