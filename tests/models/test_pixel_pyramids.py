"""The pyramid of global convolutions against float64 NumPy; its parameters, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.pyramids.ufp import GlobalConvolution, UnscathedFeaturePyramid
from fpt_jax.models.state import skeleton
from tests.models.oracle import batch_norm, randomised

CHANNELS = 4


def correlate(x_HWC, kernel_ijCD):
  """A convolution by its definition, with zero padding."""
  height, width, _ = x_HWC.shape
  rows, columns = kernel_ijCD.shape[:2]
  out = np.zeros((height, width, kernel_ijCD.shape[-1]))
  for r, c, i, j in np.ndindex(height, width, rows, columns):
    y, x = r + i - rows // 2, c + j - columns // 2
    if 0 <= y < height and 0 <= x < width:
      out[r, c] += x_HWC[y, x] @ kernel_ijCD[i, j]
  return out


def on_canvas(x_BHWC, rng, height, width):
  """Returns the map in the corner of a larger canvas, with other values on the padding."""
  _, H, W, C = x_BHWC.shape
  canvas = 9 * rng.standard_normal((len(x_BHWC), height, width, C)).astype(np.float32)
  canvas[:, :H, :W] = x_BHWC
  return FeatureMap(
    jnp.asarray(canvas), valid_positions(jnp.array([[H, W]] * len(x_BHWC)), height, width), 8
  )


def whole(x_BHWC):
  return FeatureMap(jnp.asarray(x_BHWC), jnp.ones(x_BHWC.shape[:3], bool), 8)


@pytest.mark.parametrize("kernel", [1, 7])
def test_global_convolution_equals_its_formula(kernel, rng):
  module = GlobalConvolution(CHANNELS, kernel, norm="frozen_bn", rngs=nnx.Rngs(0))
  arrays = randomised(module, rng)
  x = rng.standard_normal((1, 5, 6, CHANNELS)).astype(np.float32)
  structure = skeleton(lambda: module)
  run = jax.jit(lambda x: structure.fill(arrays)(x, train=False).values_BHWC)
  a = {n: np.asarray(v, np.float64) for n, v in arrays.items()}
  assert a["pairs.0.0.kernel"].shape[:2] == a["pairs.1.1.kernel"].shape[:2] == (kernel, 1)
  assert a["pairs.0.1.kernel"].shape[:2] == a["pairs.1.0.kernel"].shape[:2] == (1, kernel)
  total = sum(
    correlate(correlate(x[0], a[f"pairs.{i}.0.kernel"]), a[f"pairs.{i}.1.kernel"]) for i in (0, 1)
  )
  want = np.maximum(batch_norm(total, a, "norm"), 0)
  np.testing.assert_allclose(run(whole(x))[0], want, atol=1e-5)
  padded = run(on_canvas(x, rng, 9, 8))
  np.testing.assert_allclose(padded[:, :5, :6], run(whole(x)), atol=1e-5)


def test_parameters_of_ufp_by_hand():
  shapes = skeleton(
    lambda: UnscathedFeaturePyramid((256, 512, 1024, 2048), rngs=nnx.Rngs(0))
  ).shapes
  total = sum(
    np.prod(s.shape) for n, s in shapes.items() if n.endswith(("kernel", "scale", "bias"))
  )
  # two pairs of two convolutions with k * 256 * 256 numbers, for each k; five normalisations
  assert total == 2048 * 256 + 2 * 2 * (1 + 7 + 15 + 31) * 256**2 + 5 * 2 * 256


def test_impossible_kernels_are_refused():
  for kernels in ((1, 3, 6, 9), (1, 3, 5)):
    with pytest.raises(ValueError, match="must be 4 odd numbers"):
      UnscathedFeaturePyramid((8,), kernels=kernels, rngs=nnx.Rngs(0))
