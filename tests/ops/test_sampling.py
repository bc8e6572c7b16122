"""Matching by hand and against torchvision's targets; sampling by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import sampling

MATCH = jax.jit(
  sampling.match, static_argnames=("fg_threshold", "bg_threshold", "allow_low_quality")
)
SAMPLE = jax.jit(sampling.sample, static_argnums=(2, 3))
SAMPLE_INDICES = jax.jit(sampling.sample_indices, static_argnums=(2, 3))

IOU_GN = jnp.array(
  [
    [0.70, 0.69, 0.30, 0.29, 0.00, 0.10],
    [0.10, 0.69, 0.20, 0.40, 0.40, 0.00],
    [0.99, 0.99, 0.99, 0.99, 0.99, 0.99],  # padding
    [0.00, 0.00, 0.00, 0.00, 0.00, 0.00],  # a box that nothing overlaps
  ]
)
VALID_G = jnp.array([True, True, False, True])


def test_thresholds_and_ties_by_hand():
  matched, label = MATCH(IOU_GN, VALID_G, 0.7, 0.3, False)
  # Foreground from 0.7, background below 0.3; the first one if tied (box 1).
  np.testing.assert_array_equal(label, [1, -1, -1, -1, -1, 0])
  np.testing.assert_array_equal(matched, [0, 0, 0, 1, 1, 0])
  assert matched.dtype == label.dtype == jnp.int32


def test_low_quality_matches_by_hand():
  low = IOU_GN.at[1, 1].set(0.4)  # ground truth 1 is overlapped at most 0.4: boxes 1, 3 and 4
  matched, label = MATCH(low, VALID_G, 0.7, 0.3, True)
  np.testing.assert_array_equal(label, [1, 1, -1, 1, 1, 0])
  np.testing.assert_array_equal(matched, [0, 0, 0, 1, 1, 0])  # box 1 overlaps 0 more


def test_without_ground_truth_all_is_background():
  for low_quality in (True, False):
    _, label = MATCH(IOU_GN, jnp.zeros(4, bool), 0.5, 0.5, low_quality)
    np.testing.assert_array_equal(label, np.zeros(6))


def test_match_refuses_wrong_arguments():
  with pytest.raises(ValueError, match=r"\(0, 6\)"):
    sampling.match(IOU_GN[:0], VALID_G[:0], 0.7, 0.3, True)
  with pytest.raises(ValueError, match=r"\(3,\)"):
    sampling.match(IOU_GN, VALID_G[:3], 0.7, 0.3, True)
  with pytest.raises(ValueError, match=r"0\.3.*0\.2"):
    sampling.match(IOU_GN, VALID_G, 0.2, 0.3, True)


def _labels(num_foreground, num_background, num_ignored, rng):
  labels = np.repeat([1, 0, -1], [num_foreground, num_background, num_ignored])
  return jnp.asarray(rng.permutation(labels), jnp.int32)


@pytest.mark.parametrize(
  ("foreground", "background", "expected"),
  [
    (30, 50, (5, 15)),  # enough of both: a quarter of 20
    (2, 50, (2, 18)),  # background takes the place of missing foreground
    (30, 3, (5, 3)),  # but not vice versa
    (0, 0, (0, 0)),
  ],
)
def test_counts(rng, foreground, background, expected):
  labels = _labels(foreground, background, 80 - foreground - background, rng)
  drawn = np.asarray(SAMPLE(labels, jax.random.key(1), 20, 0.25))
  assert (drawn & (labels == 1)).sum() == expected[0]
  assert (drawn & (labels == 0)).sum() == expected[1]
  assert not (drawn & (labels == -1)).any()

  indices, positive, valid = map(np.asarray, SAMPLE_INDICES(labels, jax.random.key(1), 20, 0.25))
  assert indices.shape == positive.shape == valid.shape == (20,)
  # Foreground, background, padding; each index once; the same boxes as the mask.
  np.testing.assert_array_equal(positive, np.arange(20) < expected[0])
  np.testing.assert_array_equal(valid, np.arange(20) < sum(expected))
  np.testing.assert_array_equal(positive, (np.asarray(labels)[indices] == 1) & valid)
  np.testing.assert_array_equal(np.sort(indices[valid]), np.nonzero(drawn)[0])
  assert not indices[~valid].any()


def test_all_boxes_are_sampled_if_there_is_room(rng):
  labels = _labels(30, 40, 10, rng)
  drawn = SAMPLE(labels, jax.random.key(0), 10**6, 0.99999)
  np.testing.assert_array_equal(drawn, labels >= 0)
  indices, _, valid = SAMPLE_INDICES(labels, jax.random.key(0), 4000, 0.9999)
  assert indices.shape == (80,) and valid.sum() == 70


def test_every_box_is_drawn_equally_often(rng):
  labels = _labels(8, 12, 4, rng)
  keys = jax.random.split(jax.random.key(3), 2000)
  drawn = jax.jit(jax.vmap(lambda key: sampling.sample(labels, key, 8, 0.25)))(keys)
  frequency = np.asarray(drawn).mean(axis=0)
  expected = np.where(labels == 1, 2 / 8, np.where(labels == 0, 6 / 12, 0))
  # Four standard deviations of 2000 draws are 0.045.
  np.testing.assert_allclose(frequency, expected, atol=0.045)
  np.testing.assert_array_equal(drawn[0], sampling.sample(labels, keys[0], 8, 0.25))
