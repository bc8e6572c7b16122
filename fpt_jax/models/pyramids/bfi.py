"""Bi-directional feature interaction (Lin et al., ZigZagNet, CVPR 2019): contexts zig-zag through a pyramid.

From the paper's abstract and figure 1: dense pathways top-down and bottom-up, the two exchanging features
level by level, over several stages of which each takes what the one before has fused.

From the authors' detector (github.com/sitingshen/Detectron-ZZNet), where the operations are told: a
top-down and a bottom-up pathway first, then two stages of both; which convolutions there are, all 3x3;
what is multiplied and what is added; GroupNorm and ReLU in front of an exchange; half the channels
inside; nearest-neighbour resizing; a convolution behind each level. It has no encoding of regions, so
neither has this.

Ours: initial weights of LeCun's normal distribution for their uniform one of the same variance, sizes
that are no powers of two (position i of a level lies in position i // 2 of the next), and zeros on padding.

Shapes: B batch, H W rows and columns, C channels.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.layers import ConvNorm, conv

conv3x3 = functools.partial(conv, kernel=3, kernel_init=nnx.initializers.lecun_normal())


class BidirectionalFeatureInteraction(nnx.Module):
  """Two crossing pathways through all levels, then `stages` times an exchange between them.

  Args:
    in_channels: channels of each level, fine to coarse.
    channels: channels of every output level.
    stages: how often the two directions exchange their features, 2 in the authors' detector.
  """

  def __init__(
    self, in_channels, *, channels: int = 256, stages: int = 2, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(dtype=dtype, rngs=rngs)
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
    self.channels = channels

  def __call__(self, pyramid: Pyramid) -> Pyramid:
    down = downwards(self.top_down, convolved(self.lateral, pyramid))
    up = self.bottom_up(convolved(self.rise, down))
    for stage in self.stages:
      down = downwards(stage["down"].pathway, stage["down"].meet(up, down))
      up = stage["up"].pathway(stage["up"].meet(up, down))
    return convolved(self.smooth, up)


class Pathway(nnx.Module):
  """A way through the levels on which each hears every one before it.

  With x_i the level's own features and y_i what goes on: y_i = x_i + y_{i-1} + prod_j conv_ij(y_j) over
  all j < i - 1; of a gated way, the product multiplies x_i. Whatever comes from another level is brought
  to the size of this one.
  """

  def __init__(self, levels: int, channels: int, *, gated: bool = False, dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, rngs=rngs)
    self.far = nnx.List(
      [
        nnx.List([conv3x3(channels, channels, **options) for _ in range(level - 1)])
        for level in range(levels)
      ]
    )
    self.gated = gated

  def __call__(self, pyramid: Pyramid) -> Pyramid:
    """The levels in the order of the way."""
    done = []
    for level, far in zip(pyramid, self.far, strict=True):
      x_BHWC = level.values_BHWC
      heard = convolved(far, done[: len(far)])
      if heard:
        context_BHWC = functools.reduce(operator.mul, [resized(h, level) for h in heard])
        x_BHWC = x_BHWC * context_BHWC if self.gated else x_BHWC + context_BHWC
      if done:
        x_BHWC = x_BHWC + resized(done[-1], level)
      done.append(level.with_values(x_BHWC))
    return tuple(done)


class Exchange(nnx.Module):
  """Where the two directions meet: a level of each, convolved and normalised, multiplied, sent on."""

  def __init__(
    self, levels: int, up_channels: int, down_channels: int, channels: int, *, dtype, rngs: nnx.Rngs
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.of_up, self.of_down = (
      nnx.List([ConvNorm(c, channels, 3, norm="group_norm", **options) for _ in range(levels)])
      for c in (up_channels, down_channels)
    )
    self.pathway = Pathway(levels, channels, **options)

  def meet(self, up: Pyramid, down: Pyramid) -> Pyramid:
    """The product of both at each level, fine to coarse."""
    met = []
    for u, d, of_up, of_down in zip(up, down, self.of_up, self.of_down, strict=True):
      product_BHWC = of_up(u, train=False).values_BHWC * of_down(d, train=False).values_BHWC
      met.append(u.with_values(product_BHWC))
    return tuple(met)


def downwards(pathway: Pathway, pyramid: Pyramid) -> Pyramid:
  """The pathway from coarse to fine; levels in their usual order, fine to coarse."""
  return pathway(pyramid[::-1])[::-1]


def convolved(convs, pyramid) -> Pyramid:
  return tuple(
    level.with_values(conv(level.masked())) for conv, level in zip(convs, pyramid, strict=True)
  )


def resized(source: FeatureMap, target: FeatureMap) -> jax.Array:
  """[B, H, W, C]: the source at the target's positions, by nearest neighbour.

  A factor of 4 is twice a factor of 2, for sizes that are no multiple of it too, so padding moves nothing.
  """
  x_BHWC = source.values_BHWC
  if source.stride < target.stride:
    factor = target.stride // source.stride
    return x_BHWC[:, ::factor, ::factor]
  factor = source.stride // target.stride
  for axis, size in enumerate(target.size, start=1):
    x_BHWC = jax.lax.slice_in_dim(jnp.repeat(x_BHWC, factor, axis), 0, size, axis=axis)
  return x_BHWC
