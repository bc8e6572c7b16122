"""The non-local interaction of the Self- and the Grounding Transformer (paper, sections 3.1 to 3.3).

Shapes: B batch, H W rows and columns of the query map, h w of the source map, Q = H W queries, K = h w
keys, M parts of the mixture of softmaxes, D channels of a part, C channels.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import conv
from fpt_jax.ops.local_attention import Outside, local_mos_attention
from fpt_jax.ops.mos_attention import mos_attention
from fpt_jax.run.sharding import in_shares

EPSILON = 1e-6  # added to the mean square of a query or a key


class NonLocalInteraction(nnx.Module):
  """q, k, v projections and a mixture of softmaxes (paper, eq. 1 to 5).

  Args:
    query_channels: channels of the map that is transformed.
    source_channels: channels of the map of keys and values.
    channels: channels of queries, keys, values and of the result.
    parts: number of softmaxes N; queries and keys are divided into as many parts.
    similarity: "dot" (eq. 3) or "euclidean" (eq. 4).
    scale: factor of the similarity; None for 1 / sqrt(channels of a part).
    unit_length: whether each part of a query and of a key is divided by the root mean square of its
      channels and multiplied by a trained temperature, which starts at 1. The similarities are bounded
      then, and equation 4 is 2 q.k minus a constant: both similarities differ by their temperature only.
    uniform_mixture: whether w_n of eq. 2 starts at zero, so that all parts have the same weight, or from
      LeCun's normal distribution.
    window: None for all positions, or the odd side of the local square of keys (paper, section 3.3).
    outside: positions outside the map in a window, see `ops.local_attention`.
    implementation: see `ops.mos_attention`. Windows have two implementations: "naive", and one for all
      other values.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the channels cannot be divided into the parts, or `outside` does not exist.
  """

  def __init__(
    self,
    query_channels: int,
    source_channels: int,
    channels: int,
    *,
    parts: int,
    similarity: str,
    scale: float | None = None,
    unit_length: bool = False,
    uniform_mixture: bool = False,
    window: int | None = None,
    outside: Outside = "zero",
    implementation: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if channels % parts:
      raise ValueError(f"channels={channels} cannot be divided into parts={parts}")
    check_choice("outside", outside, get_args(Outside))
    init = nnx.initializers.lecun_normal()
    self.query = conv(query_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    self.key = conv(source_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    self.value = conv(source_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    mixture_init = nnx.initializers.zeros if uniform_mixture else init
    self.mixture = nnx.Linear(channels, parts, use_bias=False, kernel_init=mixture_init, rngs=rngs)
    self.log_temperature = nnx.Param(jnp.zeros(parts)) if unit_length else None
    self.parts = parts
    self.similarity = similarity
    self.scale = (channels // parts) ** -0.5 if scale is None else scale
    self.window = window
    self.outside = outside
    self.implementation = implementation

  def mixture_weights(self, k_BhwC: jax.Array, valid_Bhw: jax.Array) -> jax.Array:
    """[B, M]: pi of eq. 2, a softmax over w_n^T k-bar, with k-bar the mean key over valid positions."""
    weight_BhwC = valid_Bhw[..., None].astype(jnp.float32)
    count_B1 = jnp.maximum(jnp.sum(weight_BhwC, axis=(1, 2)), 1)
    mean_key_BC = jnp.sum(k_BhwC.astype(jnp.float32) * weight_BhwC, axis=(1, 2)) / count_B1
    return jax.nn.softmax(self.mixture(mean_key_BC), axis=-1)

  def divided(self, x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, M, D]: queries or keys divided into parts, of bounded length if asked for."""
    x_BHWMD = x_BHWC.reshape(*x_BHWC.shape[:3], self.parts, -1)
    if self.log_temperature is None:
      return x_BHWMD
    x_BHWMD = x_BHWMD.astype(jnp.float32)
    square_BHWM1 = jnp.mean(jnp.square(x_BHWMD), axis=-1, keepdims=True)
    # half of the temperature for queries and half for keys, so that it scales both similarities
    factor_M1 = jnp.exp(self.log_temperature[...] / 2)[:, None]
    return (x_BHWMD * jax.lax.rsqrt(square_BHWM1 + EPSILON) * factor_M1[None, None, None]).astype(
      x_BHWC.dtype
    )

  def __call__(self, query: FeatureMap, source: FeatureMap) -> jax.Array:
    """Returns [B, H, W, C]: for each position of `query`, a weighted mean of the values of `source`."""
    k_BhwC = self.key(source.values_BHWC)
    v_BhwC = self.value(source.values_BHWC)
    pi_BM = self.mixture_weights(k_BhwC, source.valid_BHW)
    q_BHWMD = self.divided(self.query(query.values_BHWC))
    k_BhwMD = self.divided(k_BhwC)
    if self.window is not None:
      return local_mos_attention(
        q_BHWMD,
        k_BhwMD,
        v_BhwC,
        pi_BM,
        window=self.window,
        similarity=self.similarity,
        scale=self.scale,
        key_valid_Bhw=source.valid_BHW,
        outside=self.outside,
        # "chunked" and "pallas" are forms of the global attention
        implementation="naive" if self.implementation == "naive" else "auto",
      )
    batch, height, width, *part = q_BHWMD.shape

    def attention(q_BQMD, others):
      k_BKMD, v_BKC, pi_BM, valid_BK = others
      return mos_attention(
        q_BQMD,
        k_BKMD,
        v_BKC,
        pi_BM,
        similarity=self.similarity,
        scale=self.scale,
        key_valid_BK=valid_BK,
        implementation=self.implementation,
      )

    out_BQC = in_shares(
      attention,
      q_BHWMD.reshape(batch, height * width, *part),
      (
        k_BhwMD.reshape(batch, -1, *part),
        v_BhwC.reshape(batch, -1, v_BhwC.shape[-1]),
        pi_BM,
        source.valid_BHW.reshape(batch, -1),
      ),
    )
    return out_BQC.reshape(batch, height, width, -1)
