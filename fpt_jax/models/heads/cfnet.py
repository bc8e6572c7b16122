"""CFNet: co-occurrent features (Zhang et al. 2019, reference [41] of the paper).

Their code (zhanghang1989/PyTorch-Encoding, `sseg/atten.py`) also concatenates the mean of the image and
weights all channels by EncNet's context encoding (Zhang et al. 2018, reference [40]). So does this head.
That code has eight heads with one softmax each; the mixture of four softmaxes of one head, of the same
width, is our choice.

Shapes: B batch, H W rows and columns, h w those of the co-occurrent features, C channels, M parts of
the mixture of softmaxes, D channels of a part, Q = H W, K = h w, N codewords.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, average_pool, mean_over_valid
from fpt_jax.models.layers import ConvNorm, Norm, conv
from fpt_jax.models.pixel_attention import concatenated, mean_everywhere
from fpt_jax.ops.mos_attention import mos_attention

PARTS = 4
CODEWORDS = 32


class CoOccurrentFeatureNetwork(nnx.Module):
  """CFNet's head: a 3x3 convolution, two branches side by side, and their context encoding.

  One branch is the mean of the image through a 1x1 convolution, the other the aggregated co-occurrent
  feature. Both have the inner channels, so the output has twice as many.

  Args:
    in_channels: channels of the map.
    channels: inner channels, 512 in CFNet.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the inner channels cannot be divided into the parts.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels, channels, 3, **options)
    self.mean = ConvNorm(channels, channels, 1, **options)
    self.co_occurrent = AggregatedCoOccurrentFeature(channels, **options)
    self.encoding = ContextEncoding(2 * channels, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    """Returns a map with 2 C channels."""
    x = self.reduce(x, train=train)
    mean = mean_everywhere(x, self.mean, train=train)
    both = concatenated(mean, self.co_occurrent(x, train=train))
    return self.encoding(both, train=train)


class AggregatedCoOccurrentFeature(nnx.Module):
  """The aggregated co-occurrent feature module (Zhang et al. 2019, section 3).

      y_t = x_t + BN(W sum_c p(c | t) v_c),   p(c | t) = sum_m pi_m softmax_c(q_tm . k_cm / sqrt(M D))

  The co-occurrent feature model p is a mixture of softmaxes whose prior pi is a softmax of w_m . q-bar,
  with q-bar the mean over the image. As in the release, targets and co-occurrent features share their
  1x1 convolution, and the latter are 3x3 means with stride 2.

  Args:
    channels: input and output channels.
    norm, dtype, rngs: see `CoOccurrentFeatureNetwork`.

  Raises:
    ValueError: the channels cannot be divided into the parts.
  """

  def __init__(self, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    if channels % PARTS:
      raise ValueError(f"head.hidden={channels} cannot be divided into {PARTS} parts")
    options = dict(dtype=dtype, rngs=rngs)
    init = nnx.initializers.lecun_normal()
    self.key = conv(channels, channels, 1, kernel_init=init, **options)
    self.value = conv(channels, channels, 1, kernel_init=init, **options)
    self.prior = nnx.Linear(channels, PARTS, use_bias=False, rngs=rngs)
    self.project = conv(channels, channels, 1, bias=norm == "none", kernel_init=init, **options)
    self.norm = Norm(norm, channels, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
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


class ContextEncoding(nnx.Module):
  """EncNet's context encoding, which weights the channels of a map (Zhang et al. 2018, section 3.1).

      e_n = sum_i softmax_n(s_n ||x_i - d_n||^2) (x_i - d_n),   y_i = ReLU(x_i + x_i sigmoid(W e))

  with codewords d_n, their smoothing factors s_n, and e the mean of the normalised e_n over the
  codewords, behind a ReLU; the paper has the sum. The encoder sees the map behind a 1x1 convolution.

  Args:
    channels: channels of the map.
    norm, dtype, rngs: see `CoOccurrentFeatureNetwork`.
  """

  def __init__(self, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(dtype=dtype, rngs=rngs)
    spread = (CODEWORDS * channels) ** -0.5
    self.conv = ConvNorm(channels, channels, 1, norm=norm, **options)
    self.codewords = nnx.Param(
      jax.random.uniform(rngs.params(), (CODEWORDS, channels), minval=-spread, maxval=spread)
    )
    self.smoothing = nnx.Param(jax.random.uniform(rngs.params(), (CODEWORDS,), minval=-1))
    self.norm = Norm(norm, CODEWORDS, **options)
    self.weigh = nnx.Linear(channels, channels, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    e_BNC = self.encode(self.conv(x, train=train))
    # Each codeword is a channel of the normalisation: its statistics are over images and channels.
    e_B1CN = jnp.swapaxes(e_BNC, 1, 2)[:, None].astype(x.values_BHWC.dtype)
    e_BC = jnp.mean(nnx.relu(self.norm(e_B1CN, train=train)), axis=(1, 3))
    gamma_BC = nnx.sigmoid(self.weigh(e_BC))
    return x.with_values(nnx.relu(x.values_BHWC * (1 + gamma_BC[:, None, None])))

  def encode(self, x: FeatureMap) -> jax.Array:
    """[B, N, C] float32: the residuals of all positions on the image, summed for each codeword."""
    x_BHWC = x.masked().astype(jnp.float32)
    d_NC, s_N = self.codewords[...], self.smoothing[...]
    distance_BHWN = (
      jnp.sum(jnp.square(x_BHWC), axis=-1, keepdims=True)
      - 2 * jnp.einsum("BHWC,NC->BHWN", x_BHWC, d_NC)
      + jnp.sum(jnp.square(d_NC), axis=-1)[None, None, None]
    )
    weight_BHWN = jax.nn.softmax(s_N[None, None, None] * distance_BHWN, axis=-1)
    weight_BHWN = jnp.where(x.valid_BHW[..., None], weight_BHWN, 0)
    total_BN1 = jnp.sum(weight_BHWN, axis=(1, 2))[..., None]
    return jnp.einsum("BHWN,BHWC->BNC", weight_BHWN, x_BHWC) - total_BN1 * d_NC[None]
