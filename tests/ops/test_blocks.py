"""Regions in blocks against all regions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.blocks import map_blocks, sum_over_blocks

VALID = [(7, 0), (3, 2), (0, 0), (4, 7)]


def scene(rng, valid):
  """7 regions of 2 images, of which the first are valid, and weights."""
  valid_BR = jnp.arange(7)[None] < jnp.array(valid)[:, None]
  regions = {
    "x": jnp.asarray(rng.standard_normal((2, 7, 4)), jnp.float32),
    "number": jnp.broadcast_to(jnp.arange(7)[None], (2, 7)),
    "valid": valid_BR,
  }
  weights = {"w": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32), "b": jnp.ones(4)}
  return regions, weights


def total(regions, weights):
  """NaN for a block without a valid region."""
  hidden = jnp.tanh(regions["x"] @ weights["w"] + weights["b"][None, None])
  of_region = hidden.sum(-1) * regions["number"]
  count = jnp.sum(regions["valid"])
  return jnp.sum(jnp.where(regions["valid"], of_region, 0)) * count / count


@pytest.mark.parametrize("valid", VALID)
def test_values_are_those_of_the_blocks_with_valid_regions(rng, valid):
  regions, weights = scene(rng, valid)
  found_N = map_blocks(lambda block: total(block, weights), regions, regions["valid"], 3)
  for value, start in zip(found_N, (0, 3, 6), strict=True):
    block = {name: x_BR[:, start : start + 3] for name, x_BR in regions.items()}
    expected = total(block, weights) if np.any(block["valid"]) else 0.0
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sum_and_gradients_are_those_of_the_valid_regions(rng, valid, dtype):
  regions, weights = scene(rng, valid)
  weights = jax.tree.map(lambda x: x.astype(dtype), weights)

  def blocks(weights):
    return sum_over_blocks(lambda block: total(block, weights), regions, regions["valid"], 3)

  def at_once(weights):
    return total(regions, weights) if any(valid) else 0.0 * jnp.sum(weights["w"])

  np.testing.assert_allclose(blocks(weights), at_once(weights), rtol=1e-5, atol=1e-5)
  found, transpose = jax.vjp(blocks, weights)
  expected, transpose_expected = jax.vjp(at_once, weights)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  precision = 1e-5 if dtype == "float32" else 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=precision, atol=precision
    ),
    transpose(-3.0 * jnp.ones_like(found)),
    transpose_expected(-3.0 * jnp.ones_like(expected)),
  )


def test_a_block_is_computed_once_for_value_and_gradient(rng):
  """One loop over blocks, in the forward pass; the backward pass only scales."""
  regions, weights = scene(rng, (7, 7))

  def blocks(weights):
    return sum_over_blocks(lambda block: total(block, weights), regions, regions["valid"], 3)

  program = str(jax.make_jaxpr(jax.grad(blocks))(weights))
  assert program.count(" scan[") == 1 and program.count(" tanh ") == 1


def test_regions_have_no_gradient(rng):
  x_BRC = jnp.asarray(rng.standard_normal((1, 5, 2)), jnp.float32)
  valid_BR = jnp.ones((1, 5), bool)

  def total(x_BRC, scale):
    return sum_over_blocks(lambda block: jnp.sum(block["x"]) * scale, {"x": x_BRC}, valid_BR, 2)

  of_regions, of_scale = jax.grad(total, argnums=(0, 1))(x_BRC, jnp.float32(2))
  assert not np.any(of_regions)
  np.testing.assert_allclose(of_scale, x_BRC.sum(), rtol=1e-5)
