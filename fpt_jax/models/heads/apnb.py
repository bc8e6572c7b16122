"""Asymmetric pyramid non-local block (Zhu et al., Asymmetric Non-local Neural Networks, 2019).

Shapes: B batch, H W rows and columns, C channels.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import ConvNorm, conv
from fpt_jax.models.pixel_attention import attend_to_bins, concatenated


class AsymmetricPyramid(nnx.Module):
  """A 3x3 convolution and APNB: the map attends to means of itself (section 3.2, fig. 4).

  Queries and keys share their 1x1 convolution. As in the authors' code (github.com/MendelXu/ANN), the last
  convolution of the attention is zero at the start. That code drops channels of the result, in front of the
  classifier, at a rate of 0.05; here the rate is `model.head.dropout`.

  Args:
    in_channels: channels of the map.
    channels: inner and output channels, 512 in the paper; keys and values have half as many.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    inner = channels // 2
    options = dict(dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, norm=norm, **options)
    self.key = ConvNorm(channels, inner, 1, norm=norm, **options)
    self.value = conv(channels, inner, 1, **options)
    self.project = conv(inner, channels, 1, kernel_init=nnx.initializers.zeros, **options)
    self.fuse = ConvNorm(2 * channels, channels, 1, norm=norm, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    key = self.key(x, train=train)
    value = x.with_values(self.value(x.masked()))
    y_BHWC = attend_to_bins(key.values_BHWC, key, value)
    return self.fuse(concatenated(x.with_values(self.project(y_BHWC)), x), train=train)
