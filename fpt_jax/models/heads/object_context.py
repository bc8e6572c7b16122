"""Object context: what the pixels of the same object say (OCNet, Yuan & Wang 2018).

Each module stands where the segmentation head has its 3x3 convolution: on the concatenated levels of
a pyramid it is the paper's competitor of table 5, on C5 alone OCNet itself.

Shapes: B batch, H W rows and columns, C channels, D channels of a key, n regions a side, Q = K = H W
positions, M = 1 softmax.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import ConvNorm, conv
from fpt_jax.ops.bins import extents
from fpt_jax.ops.mos_attention import mos_attention

REGIONS = (1, 2, 3, 6)  # a side, of the pyramid (OCNet, 3.3)
RATES = (12, 24, 36)  # of the atrous convolutions at stride 8 (OCNet, 3.3)
# Added to the similarity of positions of one region: exp(-1024) is 0 in float32. A power of two, which
# bfloat16 holds exactly.
_SAME_REGION = 1024.0


class ObjectContextPooling(nnx.Module):
  """The mean of all positions' values, weighted with how alike their keys are (OCNet, 3.2, eq. 1, 2).

      c_i = W sum_j softmax_j(k_i . k_j / sqrt(D)) v_j

  As in the release, queries are keys: one 1x1 convolution with a normalisation makes both.

  Args:
    channels: C, in and out.
    regions: n; a position attends to those of its own of n x n regions of the image.
    norm: see `layers.Norm`.
  """

  def __init__(
    self, channels: int, *, regions: int = 1, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    inner = channels // 2
    options = dict(dtype=dtype, rngs=rngs)
    self.key = ConvNorm(channels, inner, 1, relu=False, norm=norm, **options)
    self.value = conv(channels, channels, 1, **options)
    self.project = conv(channels, channels, 1, **options)
    self.regions = regions

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    k_BHWD = self.key(x, train=train).values_BHWC
    scale = k_BHWD.shape[-1] ** -0.5
    q_BHWD = k_BHWD * scale
    if self.regions > 1:
      place_BHWR = of_region(x.valid_BHW, self.regions).astype(k_BHWD.dtype)
      q_BHWD = jnp.concatenate([q_BHWD, _SAME_REGION * place_BHWR], axis=-1)
      k_BHWD = jnp.concatenate([k_BHWD, place_BHWR], axis=-1)
    v_BHWC = self.value(x.masked())
    return x.with_values(self.project(attend(q_BHWD, k_BHWD, v_BHWC, x.valid_BHW)))


class BaseObjectContext(nnx.Module):
  """base-OC: a 3x3 convolution, its object context beside it, a 1x1 convolution (OCNet, 3.3, fig. 4a).

  Args:
    in_channels: of the map.
    channels: in between and out, 512 in OCNet.
    output_stride: of the map; it makes no difference here.
    norm: see `layers.Norm`.
  """

  def __init__(
    self, in_channels, channels, *, output_stride, norm, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    del output_stride
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, **options)
    self.context = ObjectContextPooling(channels, **options)
    self.fuse = ConvNorm(2 * channels, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    return self.fuse(beside(self.context(x, train=train), x), train=train)


class PyramidObjectContext(nnx.Module):
  """pyramid-OC: contexts of the whole, of quarters, ninths and thirty-sixths (OCNet, 3.3, fig. 4b).

  The map goes through a 1x1 convolution to as many channels as the four contexts have together, and
  beside them through another. Regions divide the image without its padding. All four contexts are
  computed over all pairs of positions, whose similarity decides by whether they share a region: one
  dense product, no gathers, at four times the cost of base-OC.

  Args: see `BaseObjectContext`.
  """

  def __init__(
    self, in_channels, channels, *, output_stride, norm, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    del output_stride
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, **options)
    self.contexts = nnx.List(
      [ObjectContextPooling(channels, regions=regions, **options) for regions in REGIONS]
    )
    self.widen = ConvNorm(channels, len(REGIONS) * channels, 1, **options)
    self.fuse = ConvNorm(2 * len(REGIONS) * channels, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    contexts = [context(x, train=train) for context in self.contexts]
    return self.fuse(beside(self.widen(x, train=train), *contexts), train=train)


class AtrousObjectContext(nnx.Module):
  """ASP-OC: object context as the fifth branch of an atrous pyramid (OCNet, 3.3, fig. 4c).

  Five branches of half the channels: a 3x3 convolution and its object context, a 1x1 convolution, and
  3x3 convolutions with rates 12, 24 and 36 at stride 8; together through a 1x1 convolution.

  Args:
    in_channels: of the map.
    channels: out, 512 in OCNet.
    output_stride: of the map.
    norm: see `layers.Norm`.
  """

  def __init__(
    self, in_channels, channels, *, output_stride, norm, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    inner = channels // 2
    rates = [max(1, rate * 8 // output_stride) for rate in RATES]
    self.reduce = ConvNorm(in_channels, inner, 3, **options)
    self.context = ObjectContextPooling(inner, **options)
    self.branches = nnx.List(
      [
        ConvNorm(in_channels, inner, 1, **options),
        *(ConvNorm(in_channels, inner, 3, dilation=rate, **options) for rate in rates),
      ]
    )
    self.fuse = ConvNorm((2 + len(rates)) * inner, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    context = self.context(self.reduce(x, train=train), train=train)
    return self.fuse(beside(context, *(b(x, train=train) for b in self.branches)), train=train)


def attend(q_BHWD, k_BhwD, v_BhwC, valid_Bhw) -> jax.Array:
  """[B, H, W, C]: attention under one softmax, of similarities that are scaled already."""
  B, H, W, D = q_BHWD.shape
  out_BQC = mos_attention(
    q_BHWD.reshape(B, H * W, 1, D),
    k_BhwD.reshape(B, -1, 1, D),
    v_BhwC.reshape(B, -1, v_BhwC.shape[-1]),
    jnp.ones((B, 1), jnp.float32),
    key_valid_BK=valid_Bhw.reshape(B, -1),
  )
  return out_BQC.reshape(B, H, W, -1)


def of_region(valid_BHW: jax.Array, regions: int) -> jax.Array:
  """[B, H, W, n * n]: one where a position lies in a region of its image, row by row of regions."""

  def one_hot(extent_B, size):
    index_BH = jnp.arange(size)[None] * regions // jnp.maximum(extent_B, 1)[:, None]
    return jax.nn.one_hot(index_BH, regions)

  rows_BHn, columns_BWm = (
    one_hot(extent_B, size)
    for extent_B, size in zip(extents(valid_BHW), valid_BHW.shape[1:], strict=True)
  )
  place_BHWnm = rows_BHn[:, :, None, :, None] * columns_BWm[:, None, :, None, :]
  return place_BHWnm.reshape(*valid_BHW.shape, regions**2)


def beside(*maps: FeatureMap) -> FeatureMap:
  """Maps of one size as one, channels behind each other."""
  return maps[0].with_values(jnp.concatenate([m.values_BHWC for m in maps], axis=-1))
