"""CFNet: co-occurrent features (Zhang et al. 2019, reference [41] of the paper).

Shapes: B batch, H W rows and columns, h w those of the co-occurrent features, C channels, M parts of
the mixture of softmaxes, D channels of a part, Q = H W, K = h w.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, average_pool, mean_over_valid
from fpt_jax.models.layers import ConvNorm, Norm, conv
from fpt_jax.ops.mos_attention import mos_attention

PARTS = 4


class AggregatedCoOccurrentFeature(nnx.Module):
  """A 3x3 convolution and the aggregated co-occurrent feature module (Zhang et al. 2019, section 3).

      y_t = x_t + BN(W sum_c p(c | t) v_c),   p(c | t) = sum_m pi_m softmax_c(q_tm . k_cm / sqrt(M D))

  The co-occurrent feature model p is a mixture of softmaxes whose prior pi is a softmax of w_m . q-bar,
  with q-bar the mean over the image. As in the release, targets and co-occurrent features share their
  1x1 convolution, and the latter are 3x3 means with stride 2. The number of parts and the single head
  are our choices.

  Args:
    in_channels: channels of the map.
    channels: inner and output channels, 512 in CFNet.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the inner channels cannot be divided into the parts.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    inner = channels // 2
    if inner % PARTS:
      raise ValueError(f"head.hidden={channels}: its half cannot be divided into {PARTS} parts")
    options = dict(dtype=dtype, rngs=rngs)
    init = nnx.initializers.lecun_normal()
    self.reduce = ConvNorm(in_channels, channels, 3, norm=norm, **options)
    self.key = conv(channels, inner, 1, kernel_init=init, **options)
    self.value = conv(channels, channels, 1, kernel_init=init, **options)
    self.prior = nnx.Linear(inner, PARTS, use_bias=False, rngs=rngs)
    self.project = conv(channels, channels, 1, bias=norm == "none", kernel_init=init, **options)
    self.norm = Norm(norm, channels, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    x = self.reduce(x, train=train)
    context = average_pool(x)
    B, H, W, _ = x.values_BHWC.shape
    q_BHWX = self.key(x.values_BHWC)
    out_BQC = mos_attention(
      q_BHWX.reshape(B, H * W, PARTS, -1),
      self.key(context.masked()).reshape(B, -1, PARTS, q_BHWX.shape[-1] // PARTS),
      self.value(context.masked()).reshape(B, context.size[0] * context.size[1], -1),
      self.mixture_weights(x.with_values(q_BHWX)),
      scale=q_BHWX.shape[-1] ** -0.5,
      key_valid_BK=context.valid_BHW.reshape(B, -1),
    )
    y_BHWC = self.project(out_BQC.reshape(B, H, W, -1))
    y_BHWC = self.norm(y_BHWC, valid_BHW=x.valid_BHW, train=train)
    return x.with_values(x.values_BHWC + y_BHWC)

  def mixture_weights(self, q: FeatureMap) -> jax.Array:
    """[B, M]: the prior of the parts, from the mean over the image."""
    return jax.nn.softmax(self.prior(mean_over_valid(q)), axis=-1)
