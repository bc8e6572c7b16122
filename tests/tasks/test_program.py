"""The sizes of images inside an exported program equal those of the data pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.data import crops, transforms
from fpt_jax.errors import UserError
from fpt_jax.tasks import program


@pytest.fixture(scope="module")
def sizes():
  """Sizes of images: squares, where float64 cuts off a pixel, multiples of an edge, and random ones."""
  rng = np.random.default_rng(0)
  edges = np.arange(1, 1500)
  squares = np.stack([edges, edges], axis=1)
  multiples = np.stack([edges, edges * rng.integers(1, 5, len(edges))], axis=1)
  return np.concatenate([squares, multiples, multiples[:, ::-1], rng.integers(1, 6000, (2000, 2))])


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (64, 64), (333, 5000), (1024, 1024)])
def test_sizes_of_detection_equal_the_data_pipeline(short, long, sizes):
  found_N2 = jax.jit(jax.vmap(program.Resize(short, long)))(jnp.asarray(sizes, jnp.int32))
  expected_N2 = [transforms.resized_size(*map(int, size), short, long) for size in sizes]
  np.testing.assert_array_equal(found_N2, expected_N2)
  squares = np.array(expected_N2[:1499])
  assert (squares == min(short, long) - 1).any()  # which exact integers would not give


@pytest.mark.parametrize("short", [65, 512])
def test_sizes_of_segmentation_equal_the_data_pipeline(short, sizes):
  resize = program.Resize(short, round_half_up=True)
  found_N2 = jax.jit(jax.vmap(resize))(jnp.asarray(sizes, jnp.int32))
  expected_N2 = [crops.short_edge_size(tuple(map(int, size)), short) for size in sizes]
  np.testing.assert_array_equal(found_N2, expected_N2)


@pytest.mark.parametrize("canvas", [(800, 1344), (1344, 800), (1344, 1344), (960, 1024)])
def test_what_the_limits_allow_fits_on_the_canvas(canvas, sizes):
  limits = program.limits_of_sizes(canvas, 800, 1333)
  for height, width in sizes[::7].tolist():
    within = all(a * height + b * width <= most for a, b, most in limits)
    new = transforms.resized_size(height, width, 800, 1333)
    fits = new[0] <= canvas[0] and new[1] <= canvas[1]
    # an image that is less than a pixel too long is left out
    assert within == fits or (fits and max(n - c for n, c in zip(new, canvas, strict=True)) == 0)


def test_limits_are_the_constraints_of_jax_export():
  limits = program.limits_of_sizes((800, 1344), 800, 1333)
  assert [str(limit) for limit in limits] == [
    "1*h <= 16384",
    "1*w <= 16384",
    "800*h + -800*w <= 0",
  ]
  with pytest.raises(UserError, match=r"--canvas=640,1344 holds no image .*short_edge=800"):
    program.limits_of_sizes((640, 1344), 800, 1333)
