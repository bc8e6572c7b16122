"""Regions in blocks against all regions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.blocks import in_blocks


@pytest.mark.parametrize("valid", [(7, 0), (3, 2), (0, 0), (4, 7)])
def test_values_and_gradients_are_those_of_the_valid_regions(rng, valid):
  """Blocks of 3 of 7 regions; a block without a valid region would give NaN."""
  x_BRC = jnp.asarray(rng.standard_normal((2, 7, 4)), jnp.float32)
  valid_BR = jnp.arange(7)[None] < jnp.array(valid)[:, None]
  regions = {"x": x_BRC, "number": jnp.broadcast_to(jnp.arange(7)[None], (2, 7))}
  weights = {"w": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32), "b": jnp.ones(4)}

  def blocks(weights):
    def total(block):
      hidden = jnp.tanh(block["x"] @ weights["w"] + weights["b"][None, None])
      of_region = hidden.sum(-1) * block["number"]
      count = jnp.sum(block["valid"])
      return jnp.sum(jnp.where(block["valid"], of_region, 0)) * count / count

    return in_blocks(total, regions | {"valid": valid_BR}, valid_BR, 3)

  def at_once(weights):
    hidden = jnp.tanh(x_BRC @ weights["w"] + weights["b"][None, None])
    of_region = jnp.where(valid_BR, hidden.sum(-1) * regions["number"], 0)
    padded_BR = jnp.pad(of_region, ((0, 0), (0, 2)))
    return padded_BR.reshape(2, 3, 3).sum((0, 2))

  found, transpose = jax.vjp(blocks, weights)
  expected, transpose_expected = jax.vjp(at_once, weights)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  dy = jnp.array([1.0, 2.0, -3.0])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    transpose(dy),
    transpose_expected(dy),
  )


def test_regions_have_no_gradient(rng):
  x_BRC = jnp.asarray(rng.standard_normal((1, 5, 2)), jnp.float32)
  valid_BR = jnp.ones((1, 5), bool)

  def total(x_BRC, scale):
    return in_blocks(lambda block: jnp.sum(block["x"]) * scale, {"x": x_BRC}, valid_BR, 2).sum()

  of_regions, of_scale = jax.grad(total, argnums=(0, 1))(x_BRC, jnp.float32(2))
  assert not np.any(of_regions)
  np.testing.assert_allclose(of_scale, x_BRC.sum(), rtol=1e-5)
