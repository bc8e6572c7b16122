"""Bi-directional feature interaction (Lin et al., ZigZagNet, CVPR 2019).

From the paper's abstract and figure 1: dense top-down and bottom-up pathways, which exchange features
level by level, over several stages. Each stage takes the fused features of the stage before.

From the authors' detector (github.com/sitingshen/Detectron-ZZNet), which specifies the operations: one
top-down and one bottom-up pathway first, then two stages of both; which convolutions there are, all
3x3; what is multiplied and what is added; GroupNorm and ReLU before an exchange; half the channels
inside; nearest-neighbour resizing; a convolution behind each level. Its encoding of regions is that of
`heads.zigzag`.

Our choices: initial weights from LeCun's normal distribution instead of the uniform one of the same
variance; sizes that are not powers of two (position i of a level lies in position i // 2 of the next
one); zeros on padding.

Shapes: B batch, H W rows and columns, C channels.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.layers import ConvNorm
from fpt_jax.models.pyramids.level_conv import LevelConv

conv3x3 = functools.partial(LevelConv, kernel=3)


class BidirectionalFeatureInteraction(nnx.Module):
  """Two crossing pathways through all levels, then `stages` exchanges between them.

  The exchanges always have GroupNorm; `norm` is that of all other convolutions.

  Args:
    stages: number of exchanges between the two directions, 2 in the authors' detector.
    in_channels, channels, norm, dtype, rngs: see `fpt_jax.models.pyramids`.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    channels: int = 256,
    stages: int = 2,
    norm: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    levels = len(in_channels)
    self.lateral = nnx.List([conv3x3(c, channels, **options) for c in in_channels])
    self.top_down = Pathway(levels, channels, gated=True, **options)
    self.rise = nnx.List([conv3x3(channels, channels, **options) for _ in in_channels])
    self.bottom_up = Pathway(levels, channels, gated=True, **options)
    self.stages = nnx.List([])
    inputs = channels
    for stage in range(stages):
      outputs = channels if stage == stages - 1 else max(1, channels // 2)
      self.stages.append(
        nnx.Dict(
          down=Exchange(levels, inputs, inputs, outputs, **options),
          up=Exchange(levels, inputs, outputs, outputs, **options),
        )
      )
      inputs = outputs
    self.smooth = nnx.List([conv3x3(channels, channels, **options) for _ in in_channels])
    self.channels = (channels,) * levels

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    down = downwards(self.top_down, convolved(self.lateral, levels, train), train)
    up = self.bottom_up(convolved(self.rise, down, train), train=train)
    for stage in self.stages:
      down = downwards(stage["down"].pathway, stage["down"].meet(up, down), train)
      up = stage["up"].pathway(stage["up"].meet(up, down), train=train)
    return convolved(self.smooth, up, train)


class Pathway(nnx.Module):
  """A path through the levels on which each level receives all levels before it.

  With x_i the features of level i and y_i its output: y_i = x_i + y_{i-1} + prod_j conv_ij(y_j) over
  all j < i - 1. In a gated pathway, the product multiplies x_i. Features of another level are resized to
  this level.

  Args:
    levels: number of levels.
    channels: channels of every level.
    gated: whether the product multiplies.
    norm: normalisation behind each convolution, see `layers.Norm`; "none" for a bias.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self, levels: int, channels: int, *, gated: bool = False, norm: str, dtype, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.far = nnx.List(
      [
        nnx.List([conv3x3(channels, channels, **options) for _ in range(level - 1)])
        for level in range(levels)
      ]
    )
    self.gated = gated

  def __call__(self, levels: Pyramid, *, train: bool) -> Pyramid:
    """Returns the levels in the order of the pathway, which is the order of the arguments."""
    done: list[FeatureMap] = []
    for level, far in zip(levels, self.far, strict=True):
      x_BHWC = level.values_BHWC
      received = convolved(far, done[: len(far)], train)
      if received:
        context_BHWC = functools.reduce(operator.mul, [resized(r, level) for r in received])
        x_BHWC = x_BHWC * context_BHWC if self.gated else x_BHWC + context_BHWC
      if done:
        x_BHWC = x_BHWC + resized(done[-1], level)
      done.append(level.with_values(x_BHWC))
    return tuple(done)


class Exchange(nnx.Module):
  """An exchange between the directions: their levels are convolved, normalised and multiplied.

  Args:
    levels: number of levels.
    up_channels, down_channels: channels of the two directions.
    channels: output channels.
    norm: normalisation of the pathway behind the exchange, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    levels: int,
    up_channels: int,
    down_channels: int,
    channels: int,
    *,
    norm: str,
    dtype,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.of_up, self.of_down = (
      nnx.List([ConvNorm(c, channels, 3, norm="group_norm", **options) for _ in range(levels)])
      for c in (up_channels, down_channels)
    )
    self.pathway = Pathway(levels, channels, norm=norm, **options)

  def meet(self, up: Pyramid, down: Pyramid) -> Pyramid:
    """Returns the product of both directions at each level, fine to coarse."""
    met = []
    for u, d, of_up, of_down in zip(up, down, self.of_up, self.of_down, strict=True):
      product_BHWC = of_up(u, train=False).values_BHWC * of_down(d, train=False).values_BHWC
      met.append(u.with_values(product_BHWC))
    return tuple(met)


def downwards(pathway: Pathway, levels: Pyramid, train: bool) -> Pyramid:
  """Runs a pathway from coarse to fine; levels are given and returned fine to coarse."""
  return pathway(levels[::-1], train=train)[::-1]


def convolved(convs, levels, train: bool) -> Pyramid:
  """Returns each level convolved by its own layer."""
  return tuple(
    level.with_values(conv(level.masked(), level.valid_BHW, train=train))
    for conv, level in zip(convs, levels, strict=True)
  )


def resized(source: FeatureMap, target: FeatureMap) -> jax.Array:
  """[B, H, W, C]: the source at the target's positions, by nearest neighbour.

  A factor of 4 equals a factor of 2 applied twice, also for sizes that are not multiples of it, so
  padding moves nothing.
  """
  x_BHWC = source.values_BHWC
  if source.stride < target.stride:
    factor = target.stride // source.stride
    return x_BHWC[:, ::factor, ::factor]
  factor = source.stride // target.stride
  for axis, size in enumerate(target.size, start=1):
    x_BHWC = jax.lax.slice_in_dim(jnp.repeat(x_BHWC, factor, axis), 0, size, axis=axis)
  return x_BHWC
