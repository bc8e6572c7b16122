"""Maps of attention against the attention itself, and of rendering against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import FeaturePyramidTransformer, RenderingTransformer
from fpt_jax.models.fpt.non_local import NonLocalInteraction
from fpt_jax.models.fpt.query_attention import at, attention_maps, rendered_maps
from tests.models.maps import padded_map

CHANNELS = 8


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize(("window", "outside"), [(None, "zero"), (3, "zero"), (3, "masked")])
def test_the_mean_of_the_values_under_a_map_is_the_output(similarity, window, outside, rng):
  fine, coarse = padded_map(rng, (7, 6, CHANNELS)), padded_map(rng, (4, 3, CHANNELS), stride=2)
  interaction = NonLocalInteraction(
    CHANNELS, CHANNELS, CHANNELS, parts=2, similarity=similarity, window=window, outside=outside,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  positions_BS2 = jnp.array([[[0, 0], [6, 5], [3, 2]], [[0, 5], [4, 4], [2, 1]]])
  maps_BShw, mixture_BM, entropy_BS = nnx.jit(attention_maps)(
    interaction, fine, coarse, positions_BS2
  )
  value_BhwC = np.asarray(interaction.value(coarse.values_BHWC), np.float64)
  expected_BSC = np.einsum("bshw,bhwc->bsc", np.asarray(maps_BShw, np.float64), value_BhwC)
  found_BSC = at(interaction(fine, coarse), positions_BS2)
  np.testing.assert_allclose(found_BSC, expected_BSC, atol=1e-5)
  np.testing.assert_allclose(np.sum(mixture_BM, axis=-1), 1, atol=1e-6)
  total_BS = np.sum(maps_BShw, axis=(2, 3))
  assert np.all(np.asarray(maps_BShw)[1][:, ~np.asarray(coarse.valid_BHW)[1]] == 0)
  if window is None or outside == "masked":
    np.testing.assert_allclose(total_BS, 1, atol=1e-5)
    # the map has all weights: keys are its valid positions, or those of them in the window
    if window is None:
      keys_B = np.asarray(coarse.valid_BHW).sum(axis=(1, 2))
      expected_BS = scipy.stats.entropy(maps_BShw, axis=(2, 3)) / np.log(keys_B)[:, None]
      np.testing.assert_allclose(entropy_BS, expected_BS, rtol=1e-4)
  else:  # zero keys beyond the corner and the padding draw weight
    assert np.all(total_BS[0, :2] < 0.99)


@pytest.mark.parametrize("gate", ["identity", "sigmoid"])
def test_rendered_maps_are_first_order_changes_of_the_output(gate, rng):
  coarse, fine = padded_map(rng, (4, 3, CHANNELS), stride=2), padded_map(rng, (7, 6, CHANNELS))
  transformer = RenderingTransformer(CHANNELS, CHANNELS, gate=gate, rngs=nnx.Rngs(0))
  positions_BS2 = jnp.array([[[0, 0], [2, 1]], [[1, 1], [1, 0]]])
  maps_BShw, mixture, _ = nnx.jit(rendered_maps)(transformer, coarse, fine, positions_BS2)
  assert mixture is None
  np.testing.assert_allclose(np.sum(maps_BShw, axis=(2, 3)), 1, atol=1e-5)

  @nnx.jit
  def lengths(model, factor_hw):
    scaled = fine.with_values(fine.values_BHWC * factor_hw[None, :, :, None])
    return jnp.linalg.norm(at(model(coarse, scaled), positions_BS2), axis=-1)

  changes = np.zeros(maps_BShw.shape)
  for y in range(7):
    for x in range(6):
      step = jnp.zeros((7, 6)).at[y, x].set(0.02)
      more, less = lengths(transformer, 1 + step), lengths(transformer, 1 - step)
      changes[:, :, y, x] = np.abs(np.asarray(more - less, np.float64))
  expected = changes / changes.sum(axis=(2, 3), keepdims=True)
  np.testing.assert_allclose(maps_BShw, expected, atol=0.01 * expected.max())


def test_entropy_is_that_of_all_keys_of_a_window():
  interaction = NonLocalInteraction(
    CHANNELS, CHANNELS, CHANNELS, parts=2, similarity="dot", window=5, rngs=nnx.Rngs(0)
  )
  interaction.query.kernel[...] = jnp.zeros_like(interaction.query.kernel[...])
  level = FeatureMap(jnp.ones((1, 16, 16, CHANNELS)), jnp.ones((1, 16, 16), bool), 1)
  # all scores are equal: 25 keys have the same weight, 16 of them outside the map at a corner
  found = attention_maps(interaction, level, level, jnp.array([[[8, 8], [0, 0]]]))
  np.testing.assert_allclose(found.entropy_BS, 1, rtol=1e-5)
  np.testing.assert_allclose(found.map_BShw.sum(axis=(2, 3)), [[1, 9 / 25]], rtol=1e-5)


def test_explain_covers_every_pair_of_levels_and_finds_the_nearest_position(rng):
  module = FeaturePyramidTransformer(
    (CHANNELS,) * 3, channels=CHANNELS, similarity_norm="none", rngs=nnx.Rngs(0)
  )
  sizes = ((8, 8), (4, 4), (2, 2))
  levels = [jnp.asarray(rng.standard_normal((1, *s, CHANNELS)), jnp.float32) for s in sizes]
  # strides 1, 2 and 4: pixel 5 is nearest to positions 5, 2 and 1 (centred on pixels 5, 4 and 4)
  found = nnx.jit(lambda m, p: m.explain(levels, p))(module, jnp.array([[[5.5, 2.5]]]))
  assert set(found) == {(i, j) for i in range(3) for j in range(3)}
  for (level, source), explanation in found.items():
    assert explanation.map_BShw.shape == (1, 1, *sizes[source])
    assert (explanation.mixture_BM is None) == (source < level)
  for level, place in enumerate([(5, 2), (2, 1), (1, 0)]):
    transformer = module.self_transformers[level]
    this = FeatureMap(levels[level], jnp.ones((1, *sizes[level]), bool), 2**level)
    positions = jnp.array([[place]])
    expected, *_ = attention_maps(transformer.interaction, this, this, positions)
    np.testing.assert_allclose(found[level, level].map_BShw, expected, atol=1e-6)
  assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), found))
