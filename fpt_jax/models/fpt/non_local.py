"""The non-local interaction of the Self- and the Grounding Transformer (paper, sections 3.1 to 3.3).

Shapes: B batch, H W rows and columns of the query map, h w of the source map, Q = H W queries, K = h w
keys, M parts of the mixture of softmaxes, D channels of a part, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import conv
from fpt_jax.ops.local_attention import local_mos_attention
from fpt_jax.ops.mos_attention import mos_attention


class NonLocalInteraction(nnx.Module):
  """q, k, v projections and a mixture of softmaxes (paper, eq. 1 to 5).

  Args:
    query_channels: channels of the map that is transformed.
    source_channels: channels of the map of keys and values.
    channels: channels of queries, keys, values and of the result.
    parts: number of softmaxes N; queries and keys are divided into as many parts.
    similarity: "dot" (eq. 3) or "euclidean" (eq. 4).
    scale: factor of the similarity; None for 1 / sqrt(channels of a part).
    window: None for all positions, or the odd side of the local square of keys (paper, section 3.3).
    implementation: see `ops.mos_attention` and `ops.local_attention`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the channels cannot be divided into the parts.
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
    window: int | None = None,
    implementation: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if channels % parts:
      raise ValueError(f"channels={channels} cannot be divided into parts={parts}")
    init = nnx.initializers.lecun_normal()
    self.query = conv(query_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    self.key = conv(source_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    self.value = conv(source_channels, channels, 1, kernel_init=init, dtype=dtype, rngs=rngs)
    self.mixture = nnx.Linear(channels, parts, use_bias=False, rngs=rngs)
    self.parts = parts
    self.similarity = similarity
    self.scale = (channels // parts) ** -0.5 if scale is None else scale
    self.window = window
    self.implementation = implementation

  def mixture_weights(self, k_BhwC: jax.Array, valid_Bhw: jax.Array) -> jax.Array:
    """[B, M]: pi of eq. 2, a softmax over w_n^T k-bar, with k-bar the mean key over valid positions."""
    weight_BhwC = valid_Bhw[..., None].astype(jnp.float32)
    count_B1 = jnp.maximum(jnp.sum(weight_BhwC, axis=(1, 2)), 1)
    mean_key_BC = jnp.sum(k_BhwC.astype(jnp.float32) * weight_BhwC, axis=(1, 2)) / count_B1
    return jax.nn.softmax(self.mixture(mean_key_BC), axis=-1)

  def __call__(self, query: FeatureMap, source: FeatureMap) -> jax.Array:
    """Returns [B, H, W, C]: for each position of `query`, a weighted mean of the values of `source`."""
    q_BHWC = self.query(query.values_BHWC)
    k_BhwC = self.key(source.values_BHWC)
    v_BhwC = self.value(source.values_BHWC)
    pi_BM = self.mixture_weights(k_BhwC, source.valid_BHW)
    batch, height, width, channels = q_BHWC.shape
    parts = (self.parts, channels // self.parts)
    if self.window is not None:
      return local_mos_attention(
        q_BHWC.reshape(batch, height, width, *parts),
        k_BhwC.reshape(*k_BhwC.shape[:3], *parts),
        v_BhwC,
        pi_BM,
        window=self.window,
        similarity=self.similarity,
        scale=self.scale,
        key_valid_Bhw=source.valid_BHW,
        implementation=self.implementation,
      )
    out_BQC = mos_attention(
      q_BHWC.reshape(batch, height * width, *parts),
      k_BhwC.reshape(batch, -1, *parts),
      v_BhwC.reshape(batch, -1, channels),
      pi_BM,
      similarity=self.similarity,
      scale=self.scale,
      key_valid_BK=source.valid_BHW.reshape(batch, -1),
      implementation=self.implementation,
    )
    return out_BQC.reshape(batch, height, width, channels)
