"""Figures that show whether attention works: how it is distributed, and how much each part varies.

They are measured at a fixed grid of positions of each level, and only in steps that are logged, so that their
cost is small.

Shapes: B batch, H W rows and columns of a map, h w those of the source map, S sampled positions, C channels,
M parts of the mixture, D channels of a part, K keys.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction
from fpt_jax.ops.local_attention import MASKED

SIDE = 8  # rows and columns of the grid of sampled positions


@dataclasses.dataclass
class Figures:
  """Figures that a compiled function computes in some of its calls.

  Attributes:
    wanted: whether to compute them, a Python or a traced bool.
    values: float32 scalars by name; zeros if they are not wanted.
  """

  wanted: bool | jax.Array = True
  values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  def add(self, compute: Callable[[], dict[str, jax.Array]]) -> None:
    """Adds what `compute` returns, without gradients; it runs only if the figures are wanted."""

    def figures():
      return jax.lax.stop_gradient(compute())

    def zeros():
      return jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))

    self.values |= jax.lax.cond(self.wanted, figures, zeros)


def sampled_positions(valid_BHW: jax.Array) -> jax.Array:
  """[B, S, 2]: rows and columns of a regular grid over the valid part of each map, which is a rectangle."""
  sizes_B2 = jnp.stack([jnp.sum(jnp.any(valid_BHW, axis=axis), axis=1) for axis in (2, 1)], axis=-1)
  grid_S2 = pairs((jnp.arange(SIDE) + 0.5) / SIDE)
  return jnp.floor(grid_S2[None] * sizes_B2[:, None]).astype(jnp.int32)


def pairs(values_G: jax.Array) -> jax.Array:
  """[G * G, 2]: all pairs of the values."""
  return jnp.stack(jnp.meshgrid(values_G, values_G, indexing="ij"), axis=-1).reshape(-1, 2)


def at(values_BHWC: jax.Array, positions_BS2: jax.Array) -> jax.Array:
  """[B, S, C]: the values at the positions."""
  return jax.vmap(lambda values_HWC, p_S2: values_HWC[p_S2[:, 0], p_S2[:, 1]])(
    values_BHWC, positions_BS2
  )


def variation(values_BHWC: jax.Array, positions_BS2: jax.Array) -> jax.Array:
  """The root mean square of the deviations from the mean over positions, averaged over images."""
  x_BSC = at(values_BHWC, positions_BS2).astype(jnp.float32)
  deviation_BSC = x_BSC - jnp.mean(x_BSC, axis=1, keepdims=True)
  return jnp.mean(jnp.sqrt(jnp.mean(jnp.square(deviation_BSC), axis=(1, 2))))


def attention_figures(
  interaction: NonLocalInteraction,
  query: FeatureMap,
  source: FeatureMap,
  positions_BS2: jax.Array,
) -> dict[str, jax.Array]:
  """Measures the attention of the sampled queries.

  Args:
    interaction: the interaction of a Self- or a Grounding Transformer.
    query: the map that is transformed.
    source: the map of keys and values.
    positions_BS2: [B, S, 2] rows and columns of the sampled queries.

  Returns:
    Float32 scalars, averaged over images. "entropy": of the attention of a query over the logarithm of the
    number of keys: 1 if all keys have the same weight. "busiest_key": the largest share of all queries'
    attention that one key draws; in a local window, the largest weight, averaged over queries.
    "mixture": the largest weight of a part in the mixture of softmaxes.
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
    k_BSKMD, valid_BSK = windows(interaction, query, source, k_BhwMD, positions_BS2)
  weight_BSK = attention_weights(interaction, q_BSMD, k_BSKMD, valid_BSK, pi_BM)
  count_BS = jnp.maximum(jnp.sum(valid_BSK, axis=-1), 2)
  entropy_BS = -jnp.sum(jax.scipy.special.xlogy(weight_BSK, weight_BSK), axis=-1)
  draws_BK = jnp.mean(weight_BSK, axis=1)
  busiest = jnp.max(weight_BSK if interaction.window else draws_BK, axis=-1)
  return {
    "entropy": jnp.mean(entropy_BS / jnp.log(count_BS)),
    "busiest_key": jnp.mean(busiest),
    "mixture": jnp.mean(jnp.max(pi_BM, axis=-1)),
  }


def windows(interaction, query, source, k_BhwMD, positions_BS2) -> tuple[jax.Array, jax.Array]:
  """Returns the keys in the window of each sampled query, [B, S, K, M, D], and which take part."""
  margin = interaction.window // 2
  ratio_2 = jnp.array([-(-n // m) for n, m in zip(query.size, source.size, strict=True)])
  offsets_K2 = pairs(jnp.arange(-margin, margin + 1))
  places_BSK2 = (positions_BS2 // ratio_2[None, None])[:, :, None] + offsets_K2[None, None]
  size_2 = jnp.array(source.size)[None, None, None]
  inside_BSK = jnp.all((places_BSK2 >= 0) & (places_BSK2 < size_2), axis=-1)
  flat_BS2 = jnp.clip(places_BSK2, 0, size_2 - 1).reshape(len(places_BSK2), -1, 2)

  def taken(x_Bhw):
    return at(x_Bhw, flat_BS2).reshape(*inside_BSK.shape, *x_Bhw.shape[3:])

  valid_BSK = inside_BSK & taken(source.valid_BHW)
  k_BSKMD = jnp.where(valid_BSK[..., None, None], taken(k_BhwMD), 0)
  return k_BSKMD, valid_BSK if interaction.outside == "masked" else jnp.ones_like(valid_BSK)


def attention_weights(interaction, q_BSMD, k_BSKMD, valid_BSK, pi_BM) -> jax.Array:
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
