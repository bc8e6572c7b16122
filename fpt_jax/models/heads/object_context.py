"""Object context: features of the pixels of the same object (OCNet, Yuan & Wang 2018).

Each module takes the place of the 3x3 convolution of the segmentation head. On the concatenated levels
of a pyramid it is the paper's competitor in table 5, on C5 alone OCNet itself.

From the authors' code (github.com/openseg-group/OCNet.pytorch), where their paper is silent: the leaky ReLU
behind the normalisations, W = 0 at the start, and the widths of keys and values. Unlike that code, ASP-OC
attends at the full resolution of the map, while queries, keys and values there are of maxima of 2 x 2
positions and the context is enlarged with aligned corners; and regions of pyramid-OC are all of one size.
That code drops channels of the result, in front of the classifier, at rates of 0.05 (base-OC) and 0.1
(ASP-OC); here the rate is `model.head.dropout` for all.

Shapes: B batch, H W rows and columns, C channels, D channels of a key, n regions per side, Q = K = H W
positions.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import ConvNorm, conv
from fpt_jax.models.pixel_attention import attend, concatenated
from fpt_jax.ops.bins import extents

REGIONS = (1, 2, 3, 6)  # per side, of the pyramid (OCNet, section 3.3)
RATES = (12, 24, 36)  # of the dilated convolutions at stride 8 (OCNet, section 3.3)
# Added to the similarity of positions of one region: exp(-1024) is 0 in float32. A power of two, which
# bfloat16 represents exactly.
_SAME_REGION = 1024.0
_ConvNorm = functools.partial(ConvNorm, slope=0.01)


class ObjectContextPooling(nnx.Module):
  """The mean of all values, weighted by the similarity of their keys (OCNet, section 3.2, eq. 1, 2).

      c_i = W sum_j softmax_j(k_i . k_j / sqrt(D)) v_j

  As in the release, queries and keys are the same: one 1x1 convolution with a normalisation and a leaky
  ReLU. W is zero at the start, and so is the context.

  Args:
    channels: input and output channels C; keys have half as many.
    values: channels of the values; None for C.
    regions: n; a position attends within its own region, one of n x n regions of the image.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    *,
    values: int | None = None,
    regions: int = 1,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    values = values or channels
    options = dict(dtype=dtype, rngs=rngs)
    self.key = _ConvNorm(channels, channels // 2, 1, norm=norm, **options)
    self.value = conv(channels, values, 1, **options)
    self.project = conv(values, channels, 1, kernel_init=nnx.initializers.zeros, **options)
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
  """base-OC: a 3x3 convolution, its object context, and a 1x1 convolution of both (section 3.3, fig. 4a).

  Values have half the channels, as in the release.

  Args:
    in_channels: channels of the map.
    channels: inner and output channels, 512 in OCNet.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = _ConvNorm(in_channels, channels, 3, **options)
    self.context = ObjectContextPooling(channels, values=channels // 2, **options)
    self.fuse = _ConvNorm(2 * channels, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    return self.fuse(concatenated(self.context(x, train=train), x), train=train)


class PyramidObjectContext(nnx.Module):
  """pyramid-OC: contexts of the image, its quarters, ninths and thirty-sixths (section 3.3, fig. 4b).

  The contexts are concatenated with the map, which a 1x1 convolution widens to as many channels as the
  four contexts have together; another 1x1 convolution follows. As in the release, the first convolution
  has no activation. Regions divide the image without its padding. Each context is computed over all pairs
  of positions, and a term of the similarity restricts it to one region: dense products without gathers, at
  four times the cost of base-OC.

  Arguments are those of `BaseObjectContext`.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, relu=False, **options)
    self.contexts = nnx.List(
      [ObjectContextPooling(channels, regions=regions, **options) for regions in REGIONS]
    )
    self.widen = _ConvNorm(channels, len(REGIONS) * channels, 1, **options)
    self.fuse = _ConvNorm(2 * len(REGIONS) * channels, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    contexts = [context(x, train=train) for context in self.contexts]
    return self.fuse(concatenated(self.widen(x, train=train), *contexts), train=train)


class AtrousObjectContext(nnx.Module):
  """ASP-OC: object context as the fifth branch of an atrous pyramid (section 3.3, fig. 4c).

  A 3x3 convolution reduces the map. Five branches follow, with half the channels: a 3x3 convolution, its
  object context and a 1x1 convolution; a 1x1 convolution; and 3x3 convolutions with rates 12, 24 and 36 at
  stride 8. A 1x1 convolution fuses them.

  Args:
    in_channels: channels of the map.
    channels: output channels, 512 in OCNet.
    output_stride: stride of the map, pixels.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_channels: int,
    channels: int,
    *,
    output_stride: int,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    inner = channels // 2
    rates = [max(1, rate * 8 // output_stride) for rate in RATES]
    self.reduce = _ConvNorm(in_channels, channels, 3, **options)
    self.narrow = _ConvNorm(channels, inner, 3, **options)
    self.context = ObjectContextPooling(inner, **options)
    self.of_context = _ConvNorm(inner, inner, 1, **options)
    self.branches = nnx.List(
      [
        _ConvNorm(channels, inner, 1, **options),
        *(_ConvNorm(channels, inner, 3, dilation=rate, **options) for rate in rates),
      ]
    )
    self.fuse = _ConvNorm((2 + len(rates)) * inner, channels, 1, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    context = self.context(self.narrow(x, train=train), train=train)
    context = self.of_context(context, train=train)
    branches = [branch(x, train=train) for branch in self.branches]
    return self.fuse(concatenated(context, *branches), train=train)


def of_region(valid_BHW: jax.Array, regions: int) -> jax.Array:
  """Marks the region of every position.

  Args:
    valid_BHW: [B, H, W] bool, a rectangle in the upper left corner; regions divide it.
    regions: n, regions per side.

  Returns:
    [B, H, W, n * n]: one where the position lies in the region, else zero; regions row by row.
  """

  def one_hot(extent_B, size):
    index_BH = jnp.arange(size)[None] * regions // jnp.maximum(extent_B, 1)[:, None]
    return jax.nn.one_hot(index_BH, regions)

  rows_BHn, columns_BWm = (
    one_hot(extent_B, size)
    for extent_B, size in zip(extents(valid_BHW), valid_BHW.shape[1:], strict=True)
  )
  place_BHWnm = rows_BHn[:, :, None, :, None] * columns_BWm[:, None, :, None, :]
  return place_BHWnm.reshape(*valid_BHW.shape, regions**2)
