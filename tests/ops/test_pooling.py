"""Max pooling against windows written out, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import target
from fpt_jax.ops.pooling import max_pool


def written_out(x, dy):
  """Maxima, and the gradient of their product with `dy`: of equal values, the first one has it."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  y, dx = np.zeros_like(dy), np.zeros_like(padded)
  for b, r, c, k in np.ndindex(*dy.shape):
    window = padded[b, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3, k]
    i, j = np.unravel_index(np.argmax(window), (3, 3))
    y[b, r, c, k] = window[i, j]
    dx[b, 2 * r + i, 2 * c + j, k] += dy[b, r, c, k]
  return y, dx[:, 1:-1, 1:-1]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 2), (5, 1)])
def test_equals_the_windows_written_out(rng, size, platform):
  x = np.round(2 * rng.standard_normal((2, *size, 3)))  # with equal values in a window

  @jax.jit
  def value_and_gradient(x, dy):
    y, gradient = jax.vjp(max_pool, x)
    return y, *gradient(dy)

  rows, columns = size
  dy = rng.standard_normal((2, -(-rows // 2), -(-columns // 2), 3))
  with target.tracing_for(platform):
    found = value_and_gradient(jnp.float32(x), jnp.float32(dy))
  for value, want in zip(found, written_out(x, dy), strict=True):
    np.testing.assert_allclose(value, want, atol=1e-5)


def test_in_bfloat16(rng):
  x_BHWC = jnp.asarray(rng.standard_normal((1, 6, 6, 2)), jnp.bfloat16)
  y_BhwC, gradient = jax.vjp(max_pool, x_BHWC)
  (dx_BHWC,) = gradient(jnp.ones_like(y_BhwC))
  assert y_BhwC.dtype == dx_BHWC.dtype == jnp.bfloat16
  assert jnp.sum(dx_BHWC) == y_BhwC.size
