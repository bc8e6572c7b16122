"""Figures that show whether attention works: how it is distributed, and how much each part varies.

They are measured at a fixed grid of positions of each level, and only in steps that are logged, so that their
cost is small.

Shapes: B batch, H W rows and columns of a map, S sampled positions, C channels, M parts of the mixture,
K keys.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction
from fpt_jax.models.fpt.query_attention import at, pairs, query_attention
from fpt_jax.ops.conditions import compute_if

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
    self.values |= compute_if(self.wanted, lambda: jax.lax.stop_gradient(compute()))


def sampled_positions(valid_BHW: jax.Array) -> jax.Array:
  """[B, S, 2]: rows and columns of a regular grid over the valid part of each map, which is a rectangle."""
  sizes_B2 = jnp.stack([jnp.sum(jnp.any(valid_BHW, axis=axis), axis=1) for axis in (2, 1)], axis=-1)
  grid_S2 = pairs((jnp.arange(SIDE) + 0.5) / SIDE)
  return jnp.floor(grid_S2[None] * sizes_B2[:, None]).astype(jnp.int32)


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
  attention = query_attention(interaction, query, source, positions_BS2)
  draws_BK = jnp.mean(attention.weight_BSK, axis=1)
  busiest = jnp.max(attention.weight_BSK if interaction.window else draws_BK, axis=-1)
  return {
    "entropy": jnp.mean(attention.entropy()),
    "busiest_key": jnp.mean(busiest),
    "mixture": jnp.mean(jnp.max(attention.pi_BM, axis=-1)),
  }
