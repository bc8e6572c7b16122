"""Asymmetric fusion of two levels (Zhu et al., Asymmetric Non-local Neural Networks, 2019).

Shapes: B batch, H W rows and columns, C channels.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import ConvNorm, conv
from fpt_jax.models.pixel_attention import attend_to_bins, concatenated


class AsymmetricFusion(nnx.Module):
  """AFNB: C5 attends to means of C4, and the result is concatenated with C5 (section 3.3, fig. 4).

  It takes the place of a pyramid, and returns one level with the channels of C5. As in the authors' code
  (github.com/MendelXu/ANN), the last convolution of the attention is zero at the start. That code also drops
  channels of the result at a rate of 0.05, which is left out here.

  Arguments are those of all pyramids, see `fpt_jax.models.pyramids`; `channels` are those of keys and
  values, 256 in the paper.
  """

  def __init__(
    self,
    in_channels,
    *,
    channels: int = 256,
    norm: str = "sync_bn",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    low, high = in_channels[-2:]
    options = dict(dtype=dtype, rngs=rngs)
    self.query = ConvNorm(high, channels, 1, norm=norm, **options)
    self.key = ConvNorm(low, channels, 1, norm=norm, **options)
    self.value = conv(low, channels, 1, **options)
    self.project = conv(channels, high, 1, kernel_init=nnx.initializers.zeros, **options)
    self.fuse = ConvNorm(2 * high, high, 1, relu=False, norm=norm, **options)
    self.channels = (high,)

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    low, high = levels[-2:]
    query = self.query(high, train=train)
    value = low.with_values(self.value(low.masked()))
    y_BHWC = attend_to_bins(query.values_BHWC, self.key(low, train=train), value)
    attended = high.with_values(self.project(y_BHWC))
    return (self.fuse(concatenated(attended, high), train=train),)
