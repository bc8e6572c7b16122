"""Bilinear upsampling against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.models.feature_map import valid_positions
from fpt_jax.ops.resize import upsample_bilinear


def enlarged(x_hwC, factor, height, width):
  """Upsamples position by position; beyond the outermost centres, values of the border repeat."""
  out = np.zeros((height, width, x_hwC.shape[-1]))
  for r in range(height):
    for c in range(width):
      places = []
      for p, n in ((r, x_hwC.shape[0]), (c, x_hwC.shape[1])):
        at = min(max((p + 0.5) / factor - 0.5, 0), n - 1)
        low = int(at)
        places.append(((low, 1 - at + low), (min(low + 1, n - 1), at - low)))
      out[r, c] = sum(a * b * x_hwC[i, j] for i, a in places[0] for j, b in places[1])
  return out


@pytest.mark.parametrize(("factor", "size"), [(8, (33, 17)), (3, (14, 9))])
def test_it_equals_the_loop_and_padding_changes_nothing(factor, size, rng):
  x = rng.standard_normal((1, 5, 3, 2)).astype(np.float32)
  want = enlarged(x[0], factor, *size)
  alone = upsample_bilinear(jnp.asarray(x), jnp.ones((1, 5, 3), bool), factor, *size)
  np.testing.assert_allclose(alone[0], want, atol=1e-5)
  valid = valid_positions(jnp.array([[5, 3]]), 7, 9)
  canvas = np.full((1, 7, 9, 2), np.nan, np.float32)
  canvas[:, :5, :3] = x
  padded = upsample_bilinear(jnp.asarray(canvas), valid, factor, 7 * factor, 9 * factor)
  rows, columns = (min(n, m * factor) for n, m in zip(size, (5, 3), strict=True))
  np.testing.assert_allclose(padded[0, :rows, :columns], want, atol=1e-5)
  assert np.isfinite(padded).all()
  gradient = jax.grad(lambda x: upsample_bilinear(x, valid, factor, *size)[0, -1, -1].sum())(canvas)
  assert np.isfinite(gradient).all() and gradient[0, 4, 2, 0] > 0


def test_a_map_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match=r"a map of \(5, 3\) times 8 does not cover \(41, 24\)"):
    upsample_bilinear(jnp.ones((1, 5, 3, 2)), jnp.ones((1, 5, 3), bool), 8, 41, 24)
