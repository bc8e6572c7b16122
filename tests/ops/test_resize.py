"""Bilinear upsampling against a loop, and resizes against the data pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.data import transforms
from fpt_jax.models.feature_map import valid_positions
from fpt_jax.ops.resize import resized, upsample_bilinear


def enlarged(x_hwC, factor, height, width, align_corners=False):
  """Upsamples position by position; beyond the outermost centres, values of the border repeat."""
  out = np.zeros((height, width, x_hwC.shape[-1]))
  for r in range(height):
    for c in range(width):
      places = []
      for p, n in ((r, x_hwC.shape[0]), (c, x_hwC.shape[1])):
        at = p / factor if align_corners else (p + 0.5) / factor - 0.5
        at = min(max(at, 0), n - 1)
        low = int(at)
        places.append(((low, 1 - at + low), (min(low + 1, n - 1), at - low)))
      out[r, c] = sum(a * b * x_hwC[i, j] for i, a in places[0] for j, b in places[1])
  return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("factor", "size"), [(8, (33, 17)), (3, (14, 9))])
def test_it_equals_the_loop_and_padding_changes_nothing(factor, size, align_corners, rng):
  upsample = functools.partial(upsample_bilinear, align_corners=align_corners)
  x = rng.standard_normal((1, 5, 3, 2)).astype(np.float32)
  want = enlarged(x[0], factor, *size, align_corners)
  alone = upsample(jnp.asarray(x), jnp.ones((1, 5, 3), bool), factor, *size)
  np.testing.assert_allclose(alone[0], want, atol=1e-5)
  valid = valid_positions(jnp.array([[5, 3]]), 7, 9)
  canvas = np.full((1, 7, 9, 2), np.nan, np.float32)
  canvas[:, :5, :3] = x
  padded = upsample(jnp.asarray(canvas), valid, factor, 7 * factor, 9 * factor)
  rows, columns = (min(n, m * factor) for n, m in zip(size, (5, 3), strict=True))
  np.testing.assert_allclose(padded[0, :rows, :columns], want, atol=1e-5)
  assert np.isfinite(padded).all()
  gradient = jax.grad(lambda x: upsample(x, valid, factor, *size)[0, -1, -1].sum())(canvas)
  assert np.isfinite(gradient).all() and gradient[0, 4, 2, 0] > 0


def torch_weights(n, m):
  """[m, n] weights of torch's `interpolate(size=m, mode="bilinear", align_corners=True)`, float64."""
  weights = np.zeros((m, n))
  for p in range(m):
    at = p * (n - 1) / (m - 1)
    low = min(int(at), n - 2)
    weights[p, low], weights[p, low + 1] = low + 1 - at, at - low
  return weights


def test_aligned_corners_are_those_of_torch(rng):
  """Values, and gradients by the transposed weights, of 8 n + 1 positions."""
  x = rng.standard_normal((2, 6, 4, 3)).astype(np.float32)
  rows, columns = torch_weights(6, 41), torch_weights(4, 25)
  found, gradient_of = jax.vjp(
    lambda x: upsample_bilinear(x, jnp.ones((2, 6, 4), bool), 8, 41, 25, align_corners=True), x
  )
  want = np.einsum("Hh,BhwC,Ww->BHWC", rows, x, columns)
  np.testing.assert_allclose(found, want, atol=1e-6)
  y = rng.standard_normal(found.shape).astype(np.float32)
  (gradient,) = gradient_of(y)
  np.testing.assert_allclose(gradient, np.einsum("Hh,BHWC,Ww->BhwC", rows, y, columns), atol=1e-4)


def test_aligned_corners_keep_the_place_of_positions():
  """What lies at pixels 8 i is found at the same pixels; a linear function is reproduced between them."""
  at_HW2 = np.stack(np.mgrid[:33, :17], axis=-1).astype(np.float32)
  x = jnp.asarray(at_HW2[None, ::8, ::8])
  valid = jnp.ones(x.shape[:3], bool)
  np.testing.assert_array_equal(
    upsample_bilinear(x, valid, 8, 33, 17, align_corners=True)[0], at_HW2
  )
  half_pixel = upsample_bilinear(x, valid, 8, 33, 17)[0]
  np.testing.assert_allclose(half_pixel[4:29, 4:13], at_HW2[4:29, 4:13] - 3.5, atol=1e-5)


def test_a_map_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match=r"a map of \(5, 3\) times 8 does not cover \(41, 24\)"):
    upsample_bilinear(jnp.ones((1, 5, 3, 2)), jnp.ones((1, 5, 3), bool), 8, 41, 24)


@pytest.mark.parametrize("new", [(21, 30), (33, 17), (5, 40), (1, 1)])
def test_resized_equals_the_data_pipeline(new, rng):
  image_HWC = rng.normal(size=(21, 30, 5)).astype(np.float32)
  canvas_HWC = np.full((32, 33, 5), np.inf, np.float32)  # values beyond the image are not used
  canvas_HWC[:21, :30] = image_HWC
  sizes = (np.array([size], np.int32) for size in ((21, 30), new))
  (found,) = resized(canvas_HWC[None], *sizes, (35, 41))
  expected = transforms.resize_and_pad(image_HWC, new, new)
  np.testing.assert_allclose(found[: new[0], : new[1]], expected, atol=2e-5)
  if new == (21, 30):
    np.testing.assert_array_equal(found[:21, :30], image_HWC)
