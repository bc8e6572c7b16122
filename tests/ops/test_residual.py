"""The end of a residual block against relu(x + y), value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import target
from fpt_jax.ops.residual import relu_of_sum


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_relu_of_the_sum(rng, platform, dtype):
  x, y = (jnp.asarray(rng.standard_normal((4, 50)), dtype) for _ in range(2))
  odd = jnp.array([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, jnp.nan], dtype)
  x, y = (
    jnp.concatenate([z.ravel(), w]) for z, w in ((x, jnp.repeat(odd, 7)), (y, jnp.tile(odd, 7)))
  )
  with target.tracing_for(platform):
    value, gradient = jax.vjp(relu_of_sum, x, y)
  want = np.maximum(np.float32(x + y), 0)
  np.testing.assert_array_equal(np.float32(value), want)
  for dz in gradient(jnp.full_like(x, 3)):
    np.testing.assert_array_equal(np.float32(dz), np.where(want > 0, 3, 0))
