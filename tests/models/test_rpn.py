"""The RPN's outputs of sampled anchors from patches against those of all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.heads.rpn import RegionProposalNetwork, selected
from fpt_jax.ops import target

CHANNELS, SIZES = 5, ((7, 6), (4, 3), (1, 2))  # smaller than a patch, too


def network(convs):
  config = ConfigDict(
    dict(
      convs=convs,
      anchor_sizes=((8.0,), (16.0,), (32.0,)),
      aspect_ratios=(0.5, 1.0, 2.0),
      round_anchors=False,
      fg_threshold=0.7,
      bg_threshold=0.3,
      samples=20,
      positive_fraction=0.5,
    )
  )
  rpn = RegionProposalNetwork(CHANNELS, config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  weights = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(0, 0.3, w.shape), w.dtype), nnx.state(rpn, nnx.Param)
  )
  nnx.update(rpn, weights)
  return rpn


def pyramid_of(values):
  return tuple(
    FeatureMap(x, jnp.ones(x.shape[:3], bool), 4 << level) for level, x in enumerate(values)
  )


@pytest.fixture
def values(rng):
  shapes = [(2, *size, CHANNELS) for size in SIZES]
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("convs", [1, 2, 3])
def test_patches_give_the_values_of_all_positions(rng, values, convs):
  rpn = network(convs)
  anchors = rpn.anchors(pyramid_of(values), (28, 24))
  total = sum(grid.total for grid in anchors)
  index_BS = jnp.asarray(np.stack([rng.permutation(total) for _ in range(2)]))  # all of them

  def of_patches(rpn, values):
    return rpn.from_patches(pyramid_of(values), anchors, index_BS)

  def of_positions(rpn, values):
    select = lambda *outputs: selected(anchors, *outputs)
    return jax.vmap(select)(*rpn(pyramid_of(values)), index_BS)

  weights = [jnp.asarray(rng.standard_normal((2, total, *x)), jnp.float32) for x in ((), (4,))]

  @nnx.jit(static_argnums=0)
  def run(function, rpn, values):
    def total(rpn, values):
      found = function(rpn, values)
      return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    return nnx.grad(total, argnums=(0, 1), has_aux=True)(rpn, values)

  found, want = run(of_patches, rpn, values), run(of_positions, rpn, values)
  assert np.linalg.norm(jax.tree.leaves(want)[0]) > 0
  for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_losses_are_the_same_in_both_forms(values):
  rpn = network(1)
  boxes_BG4 = jnp.tile(jnp.array([[[2.0, 1, 14, 12], [0, 0, 20, 20]]]), (2, 1, 1))
  valid_BG = jnp.array([[True, True], [True, False]])

  def gradients(platform):
    def total(rpn, values):
      pyramid = pyramid_of(values)
      outputs = rpn(pyramid)
      anchors = rpn.anchors(pyramid, (28, 24))
      sample = rpn.sample(anchors, boxes_BG4, valid_BG, jax.random.key(3))
      found = rpn.losses(pyramid, *outputs, anchors, sample)
      return sum(found.values()), found

    with target.tracing_for(platform):
      return nnx.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))(rpn, values)

  found, want = gradients("cpu"), gradients("tpu")
  assert all(loss > 0.1 for loss in want[1].values())
  for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
