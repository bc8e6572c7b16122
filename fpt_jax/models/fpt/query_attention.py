"""What single positions attend to: the weights that the attention itself never keeps in memory.

Shapes: B batch, H W rows and columns of the query map, h w those of the source map, S chosen positions of the
query map, K keys, M parts of the mixture, D channels of a part, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction
from fpt_jax.models.fpt.rendering_transformer import RenderingTransformer
from fpt_jax.ops.local_attention import MASKED


class QueryAttention(NamedTuple):
  """Attention of chosen queries.

  Attributes:
    weight_BSK: [B, S, K] float32 weight of each key; each row sums to 1. The keys are all positions of the
      source map in row-major order, or those of the local window.
    valid_BSK: [B, S, K] bool, or [B, 1, K] without a window: the keys that take part in the softmax.
    pi_BM: [B, M] float32, the weights of the mixture (eq. 2).
  """

  weight_BSK: jax.Array
  valid_BSK: jax.Array
  pi_BM: jax.Array

  def entropy(self) -> jax.Array:
    """[B, S] float32: see `relative_entropy`."""
    return relative_entropy(self.weight_BSK, self.valid_BSK)


class Explanation(NamedTuple):
  """What chosen positions of a level take from a level.

  Attributes:
    map_BShw: [B, S, h, w] float32, see `attention_maps` and `rendered_maps`.
    mixture_BM: [B, M] float32 weights of the mixture; None for a Rendering Transformer.
    entropy_BS: [B, S] float32, see `relative_entropy`; of the weights of all keys, also outside the map.
  """

  map_BShw: jax.Array
  mixture_BM: jax.Array | None
  entropy_BS: jax.Array


def relative_entropy(weight_BSK: jax.Array, valid_BSK: jax.Array) -> jax.Array:
  """[B, S] float32: entropy of each row over the logarithm of the number of keys; 1 if all weigh the same."""
  count_BS = jnp.maximum(jnp.sum(valid_BSK, axis=-1), 2)
  entropy_BS = -jnp.sum(jax.scipy.special.xlogy(weight_BSK, weight_BSK), axis=-1)
  return entropy_BS / jnp.log(count_BS)


def query_attention(
  interaction: NonLocalInteraction,
  query: FeatureMap,
  source: FeatureMap,
  positions_BS2: jax.Array,
) -> QueryAttention:
  """Computes the attention of chosen queries (paper, eq. 2 to 5).

  Args:
    interaction: the interaction of a Self- or a Grounding Transformer.
    query: the map that is transformed.
    source: the map of keys and values.
    positions_BS2: [B, S, 2] int32 rows and columns of the queries on their map.
  """
  k_BhwC = interaction.key(source.values_BHWC)
  pi_BM = interaction.mixture_weights(k_BhwC, source.valid_BHW)
  q_BSC = at(query.values_BHWC, positions_BS2)
  q_BSMD = interaction.divided(interaction.query(q_BSC[:, :, None]))[:, :, 0]
  k_BhwMD = interaction.divided(k_BhwC)
  if interaction.window is None:
    k_BKMD = k_BhwMD.reshape(k_BhwMD.shape[0], -1, *k_BhwMD.shape[3:])
    k_BSKMD, valid_BSK = k_BKMD[:, None], source.valid_BHW.reshape(len(k_BKMD), 1, -1)
  else:
    places_BSK2, inside_BSK = window_places(interaction.window, query, source, positions_BS2)
    k_BSKMD, valid_BSK = keys_at(places_BSK2, inside_BSK, k_BhwMD, source)
    if interaction.outside == "zero":  # zero keys take part
      valid_BSK = jnp.ones_like(valid_BSK)
  weight_BSK = attention_weights(interaction, q_BSMD, k_BSKMD, valid_BSK, pi_BM)
  return QueryAttention(weight_BSK, valid_BSK, pi_BM)


def attention_maps(
  interaction: NonLocalInteraction,
  query: FeatureMap,
  source: FeatureMap,
  positions_BS2: jax.Array,
) -> Explanation:
  """Computes the attention of chosen queries as maps; arguments as for `query_attention`.

  Returns:
    The weights of the positions of the source map, which sum to 1, or to less if a local window has zero
    keys outside the map; and the weights of the mixture.
  """
  attention = query_attention(interaction, query, source, positions_BS2)
  weight_BSK = attention.weight_BSK
  shape = (*weight_BSK.shape[:2], *source.size)
  if interaction.window is None:
    return Explanation(weight_BSK.reshape(shape), attention.pi_BM, attention.entropy())
  places_BSK2, inside_BSK = window_places(interaction.window, query, source, positions_BS2)
  rows_BSK, columns_BSK = places_BSK2[..., 0], places_BSK2[..., 1]
  batch_B11 = jnp.arange(shape[0])[:, None, None]
  query_1S1 = jnp.arange(shape[1])[None, :, None]
  on_map_BSK = jnp.where(inside_BSK, weight_BSK, 0)
  maps_BShw = jnp.zeros(shape).at[batch_B11, query_1S1, rows_BSK, columns_BSK].add(on_map_BSK)
  maps_BShw = jnp.where(source.valid_BHW[:, None], maps_BShw, 0)
  return Explanation(maps_BShw, attention.pi_BM, attention.entropy())


def rendered_maps(
  transformer: RenderingTransformer,
  coarse: FeatureMap,
  fine: FeatureMap,
  positions_BS2: jax.Array,
) -> Explanation:
  """Computes what chosen positions of a rendered map take from the fine map.

  The Rendering Transformer has no weights between positions. Its map is gradient times input: how much each
  position of the fine map contributes, to first order, to the length of the output at the chosen position,
  through the gate and through the strided convolution.

  Args:
    transformer: the transformer.
    coarse: the map that is transformed.
    fine: the map that is rendered onto it.
    positions_BS2: [B, S, 2] int32 rows and columns on the coarse map.

  Returns:
    The absolute contributions divided by their sum, and None for the mixture.
  """

  def outputs(fine_BhwC):
    return at(transformer(coarse, fine.with_values(fine_BhwC)), positions_BS2).astype(jnp.float32)

  output_BSC, pullback = jax.vjp(outputs, fine.values_BHWC)
  norm_BS1 = jnp.linalg.norm(output_BSC, axis=-1, keepdims=True)
  direction_BSC = output_BSC / jnp.maximum(norm_BS1, 1e-12)

  def contributions(chosen_S):
    (gradient_BhwC,) = pullback(direction_BSC * chosen_S[None, :, None])
    product_BhwC = gradient_BhwC.astype(jnp.float32) * fine.masked().astype(jnp.float32)
    return jnp.abs(jnp.sum(product_BhwC, axis=-1))

  maps_SBhw = jax.lax.map(contributions, jnp.eye(positions_BS2.shape[1]))
  total_SB11 = jnp.sum(maps_SBhw, axis=(2, 3), keepdims=True)
  maps_BShw = jnp.moveaxis(maps_SBhw / jnp.maximum(total_SB11, 1e-12), 0, 1)
  weight_BSK = maps_BShw.reshape(*maps_BShw.shape[:2], -1)
  valid_BSK = fine.valid_BHW.reshape(len(weight_BSK), 1, -1)
  return Explanation(maps_BShw, None, relative_entropy(weight_BSK, valid_BSK))


def pairs(values_G: jax.Array) -> jax.Array:
  """[G * G, 2]: all pairs of the values."""
  return jnp.stack(jnp.meshgrid(values_G, values_G, indexing="ij"), axis=-1).reshape(-1, 2)


def at(values_BHWC: jax.Array, positions_BS2: jax.Array) -> jax.Array:
  """[B, S, C]: the values at the positions."""
  return jax.vmap(lambda values_HWC, p_S2: values_HWC[p_S2[:, 0], p_S2[:, 1]])(
    values_BHWC, positions_BS2
  )


def keys_at(
  places_BSK2: jax.Array, inside_BSK: jax.Array, k_BhwMD: jax.Array, source: FeatureMap
) -> tuple[jax.Array, jax.Array]:
  """Returns the keys at positions, [B, S, K, M, D], and which of them are valid; the others are zero."""
  flat_BS2 = places_BSK2.reshape(len(places_BSK2), -1, 2)

  def taken(x_Bhw):
    return at(x_Bhw, flat_BS2).reshape(*inside_BSK.shape, *x_Bhw.shape[3:])

  valid_BSK = inside_BSK & taken(source.valid_BHW)
  return jnp.where(valid_BSK[..., None, None], taken(k_BhwMD), 0), valid_BSK


def window_places(
  window: int, query: FeatureMap, source: FeatureMap, positions_BS2: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the positions in the window of each query, [B, S, K, 2], and which of them are on the map.

  Positions outside the map are moved to its border.
  """
  margin = window // 2
  ratio_2 = jnp.array([-(-n // m) for n, m in zip(query.size, source.size, strict=True)])
  offsets_K2 = pairs(jnp.arange(-margin, margin + 1))
  places_BSK2 = (positions_BS2 // ratio_2[None, None])[:, :, None] + offsets_K2[None, None]
  size_2 = jnp.array(source.size)[None, None, None]
  inside_BSK = jnp.all((places_BSK2 >= 0) & (places_BSK2 < size_2), axis=-1)
  return jnp.clip(places_BSK2, 0, size_2 - 1), inside_BSK


def attention_weights(
  interaction: NonLocalInteraction,
  q_BSMD: jax.Array,
  k_BSKMD: jax.Array,
  valid_BSK: jax.Array,
  pi_BM: jax.Array,
) -> jax.Array:
  """[B, S, K] float32: the mixture of softmaxes of eq. 2, 3 and 5; `k_BSKMD` may be shared by all S."""
  q_BSMD, k_BSKMD = q_BSMD.astype(jnp.float32), k_BSKMD.astype(jnp.float32)
  if k_BSKMD.shape[1] == 1:
    score_BSMK = jnp.einsum("bsmd,bkmd->bsmk", q_BSMD, k_BSKMD[:, 0])
  else:
    score_BSMK = jnp.einsum("bsmd,bskmd->bsmk", q_BSMD, k_BSKMD)
  if interaction.similarity == "euclidean":
    # a constant per query, ||q||^2, does not change the softmax
    score_BSMK = 2 * score_BSMK - jnp.moveaxis(jnp.sum(jnp.square(k_BSKMD), axis=-1), 3, 2)
  score_BSMK = jnp.where(valid_BSK[:, :, None], interaction.scale * score_BSMK, MASKED)
  return jnp.einsum("bm,bsmk->bsk", pi_BM, jax.nn.softmax(score_BSMK, axis=-1))
