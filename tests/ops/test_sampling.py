"""Matching by hand and against torchvision's targets; sampling by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import sampling

THRESHOLDS = ("fg_threshold", "bg_threshold")
MATCH = jax.jit(sampling.match, static_argnames=THRESHOLDS)
MATCH_ANCHORS = jax.jit(sampling.match_anchors, static_argnames=(*THRESHOLDS, "block"))
SAMPLE = jax.jit(sampling.sample, static_argnums=(2, 3))

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
  matched, label = MATCH(IOU_GN, VALID_G, 0.7, 0.3)
  # Foreground from 0.7, background below 0.3; the first one if tied (box 1).
  np.testing.assert_array_equal(label, [1, -1, -1, -1, -1, 0])
  np.testing.assert_array_equal(matched, [0, 0, 0, 1, 1, 0])
  assert matched.dtype == label.dtype == jnp.int32


def test_low_quality_matches_by_hand():
  # in a row of height 10: the ground truths from 0 to 10, from 20 to 30, and one that nothing overlaps
  x = lambda *edges: jnp.array([[low, 0, high, 10] for low, high in edges], jnp.float32)
  gt_boxes_G4 = x((0, 10), (20, 30), (500, 510))
  anchors_N4 = x((0, 10), (0, 8), (4, 14), (14, 24), (26, 36), (60, 70))
  matched, label = MATCH_ANCHORS(gt_boxes_G4, jnp.ones(3, bool), anchors_N4.T, 0.7, 0.3)
  # the overlap of anchors 3 and 4 with ground truth 1 is its largest, a quarter; that of anchor 2 is 6 / 14
  np.testing.assert_array_equal(label, [1, 1, -1, 1, 1, 0])
  np.testing.assert_array_equal(matched, [0, 0, 0, 1, 1, 0])


def test_without_ground_truth_all_is_background():
  nothing = jnp.zeros(4, bool)
  _, label = MATCH(IOU_GN, nothing, 0.5, 0.5)
  np.testing.assert_array_equal(label, np.zeros(6))
  boxes_N4 = jnp.array([[0, 0, 10, 10]] * 4, jnp.float32)
  _, label = MATCH_ANCHORS(boxes_N4, nothing, boxes_N4.T, 0.7, 0.3)
  np.testing.assert_array_equal(label, np.zeros(4))


def test_match_refuses_wrong_arguments():
  with pytest.raises(ValueError, match=r"\(0, 6\)"):
    sampling.match(IOU_GN[:0], VALID_G[:0], 0.7, 0.3)
  with pytest.raises(ValueError, match=r"\(3,\)"):
    sampling.match(IOU_GN, VALID_G[:3], 0.7, 0.3)
  with pytest.raises(ValueError, match=r"0\.3.*0\.2"):
    sampling.match(IOU_GN, VALID_G, 0.2, 0.3)


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("objects", [1, 33, 70])
def test_anchors_in_blocks(rng, block, objects):
  corner_N2, gt_corner_G2 = rng.uniform(0, 90, (300, 2)), rng.uniform(0, 90, (objects, 2))
  # sides of few values, so that boxes of equal IoU occur
  anchors_N4 = np.concatenate([corner_N2 // 8 * 8, corner_N2 // 8 * 8 + 16], 1).astype(np.float32)
  gt_boxes_G4 = np.concatenate([gt_corner_G2, gt_corner_G2 + 12], 1).round().astype(np.float32)
  gt_boxes_G4[0] += 500  # overlaps nothing
  gt_valid_G = rng.uniform(size=objects) < 0.8
  matched_N, labels_N = MATCH_ANCHORS(gt_boxes_G4, gt_valid_G, anchors_N4.T, 0.5, 0.3, block=block)
  # float64, from the definition
  low, high = np.minimum, np.maximum
  sides = [
    low(gt_boxes_G4[:, None, i + 2], anchors_N4[None, :, i + 2])
    - high(gt_boxes_G4[:, None, i], anchors_N4[None, :, i]).astype(float)
    for i in (0, 1)
  ]
  intersection_GN = high(sides[0], 0) * high(sides[1], 0)
  iou_GN = intersection_GN / (12 * 12 + 16 * 16 - intersection_GN)
  iou_GN[~gt_valid_G] = -1
  best_G1 = iou_GN.max(axis=1, keepdims=True)
  foreground_N = (iou_GN.max(0) >= 0.5) | ((iou_GN == best_G1) & (best_G1 > 0)).any(0)
  expected_N = np.where(foreground_N, 1, np.where(iou_GN.max(0) < 0.3, 0, -1))
  np.testing.assert_array_equal(labels_N, expected_N)
  np.testing.assert_array_equal(matched_N, iou_GN.argmax(0))
  assert matched_N.dtype == labels_N.dtype == jnp.int32


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
  indices, positive, valid = map(np.asarray, SAMPLE(labels, jax.random.key(1), 20, 0.25))
  assert indices.shape == positive.shape == valid.shape == (20,)
  # Foreground, background, padding; each index once, ascending in its group.
  np.testing.assert_array_equal(positive, np.arange(20) < expected[0])
  np.testing.assert_array_equal(valid, np.arange(20) < sum(expected))
  of_samples = np.asarray(labels)[indices]
  assert (of_samples[positive] == 1).all() and (of_samples[valid & ~positive] == 0).all()
  for group in (positive, valid & ~positive):
    assert (np.diff(indices[group]) > 0).all()
  assert not indices[~valid].any()


def test_all_boxes_are_sampled_if_there_is_room(rng):
  labels = _labels(30, 40, 10, rng)
  indices, _, valid = SAMPLE(labels, jax.random.key(0), 4000, 0.9999)
  assert indices.shape == (80,)
  np.testing.assert_array_equal(np.sort(indices[valid]), np.flatnonzero(labels >= 0))


def test_every_box_is_drawn_equally_often(rng):
  labels = _labels(8, 12, 4, rng)
  keys = jax.random.split(jax.random.key(3), 2000)
  indices, _, valid = jax.jit(jax.vmap(lambda key: sampling.sample(labels, key, 8, 0.25)))(keys)
  frequency = np.bincount(np.asarray(indices)[np.asarray(valid)], minlength=24) / 2000
  expected = np.where(labels == 1, 2 / 8, np.where(labels == 0, 6 / 12, 0))
  # Four standard deviations of 2000 draws are 0.045.
  np.testing.assert_allclose(frequency, expected, atol=0.045)
  np.testing.assert_array_equal(indices[0], sampling.sample(labels, keys[0], 8, 0.25)[0])
