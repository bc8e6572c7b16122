"""Asymmetric non-local network: few keys, means over a pyramid of bins (Zhu et al. 2019).

Shapes: B batch, H W rows and columns, C channels, D channels of a key, K means.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.heads.object_context import attend, beside
from fpt_jax.models.layers import ConvNorm, conv
from fpt_jax.ops.bins import bin_means

BINS = (1, 3, 6, 8)  # a side: 110 keys
KEY_CHANNELS = 256  # and of the values


class AsymmetricFusion(nnx.Module):
  """AFNB: C5 asks means of C4 and goes on with the answer beside it (Zhu et al. 2019, 3.3, fig. 4).

  It stands where a pyramid does, and gives one level with the channels of C5.

  Args:
    in_channels: of the backbone's levels; the last two are looked at.
    channels: of keys and values, 256 in the paper.
    norm: see `layers.Norm`.
  """

  def __init__(
    self,
    in_channels,
    *,
    channels: int = KEY_CHANNELS,
    norm: str = "sync_bn",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    low, high = in_channels[-2:]
    options = dict(dtype=dtype, rngs=rngs)
    self.query = ConvNorm(high, channels, 1, norm=norm, **options)
    self.key = ConvNorm(low, channels, 1, norm=norm, **options)
    self.value = conv(low, channels, 1, **options)
    self.project = conv(channels, high, 1, **options)
    self.fuse = ConvNorm(2 * high, high, 1, relu=False, norm=norm, **options)
    self.channels = (high,)

  def __call__(self, pyramid: Pyramid, *, train: bool = False) -> Pyramid:
    low, high = pyramid[-2:]
    query = self.query(high, train=train)
    value = low.with_values(self.value(low.masked()))
    y_BHWC = attend_to_bins(query.values_BHWC, self.key(low, train=train), value)
    return (self.fuse(beside(high.with_values(self.project(y_BHWC)), high), train=train),)


class AsymmetricPyramid(nnx.Module):
  """APNB behind a 3x3 convolution: the map asks means of itself (Zhu et al. 2019, 3.2, fig. 4).

  Queries and keys share their 1x1 convolution.

  Args:
    in_channels: of the map.
    channels: in between and out, 512 in the paper; keys and values have half of them.
    output_stride: of the map; it makes no difference here.
    norm: see `layers.Norm`.
  """

  def __init__(
    self, in_channels, channels, *, output_stride, norm, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    del output_stride
    inner = channels // 2
    options = dict(dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, norm=norm, **options)
    self.key = ConvNorm(channels, inner, 1, norm=norm, **options)
    self.value = conv(channels, inner, 1, **options)
    self.project = conv(inner, channels, 1, **options)
    self.fuse = ConvNorm(2 * channels, channels, 1, norm=norm, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    key = self.key(x, train=train)
    value = x.with_values(self.value(x.masked()))
    y_BHWC = attend_to_bins(key.values_BHWC, key, value)
    return self.fuse(beside(x.with_values(self.project(y_BHWC)), x), train=train)


def attend_to_bins(q_BHWD: jax.Array, key: FeatureMap, value: FeatureMap) -> jax.Array:
  """[B, H, W, C]: attention to the means of keys and values over 1, 9, 36 and 64 bins."""

  def means(x: FeatureMap) -> jax.Array:
    B, *_, C = x.values_BHWC.shape
    pooled = [bin_means(x.values_BHWC, x.valid_BHW, bins).reshape(B, -1, C) for bins in BINS]
    return jnp.concatenate(pooled, axis=1).astype(x.values_BHWC.dtype)

  k_BKD, v_BKC = means(key), means(value)
  everywhere_BK = jnp.ones(k_BKD.shape[:2], bool)
  return attend(q_BHWD * k_BKD.shape[-1] ** -0.5, k_BKD, v_BKC, everywhere_BK)
