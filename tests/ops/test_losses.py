"""Losses against the formulas in float64, and against torchvision's RPN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import anchors, boxes, losses, nms, sampling
from tests.conftest import GOLDEN


def _bce(logits, targets):
  logits = np.asarray(logits, np.float64)
  return np.logaddexp(0, logits) - logits * np.asarray(targets, np.float64)


def _smooth_l1(difference, beta):
  size = np.abs(np.asarray(difference, np.float64))
  return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def _cross_entropy(logits, labels):
  logits = np.asarray(logits, np.float64)
  picked = np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
  return np.log(np.exp(logits).sum(-1)) - picked


def test_elements(rng):
  logits, targets = rng.normal(size=(2, 4, 5)) * 5
  targets = 1 / (1 + np.exp(-targets))
  labels = rng.integers(0, 5, 4)
  np.testing.assert_allclose(
    losses.sigmoid_cross_entropy(logits, targets), _bce(logits, targets), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    losses.softmax_cross_entropy(logits, labels),
    _cross_entropy(logits, labels),
    rtol=1e-5,
    atol=1e-6,
  )
  for beta in (1 / 9, 2.0):
    np.testing.assert_allclose(
      losses.smooth_l1(logits, targets, beta),
      _smooth_l1(logits - targets, beta),
      rtol=1e-5,
      atol=1e-6,
    )
  with pytest.raises(ValueError, match="beta"):
    losses.smooth_l1(logits, targets, 0.0)


def test_elements_are_float32_inside():
  logits = jnp.full((1, 3), 3.0, jnp.bfloat16)
  loss = losses.softmax_cross_entropy(logits, jnp.zeros(1, int))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, [np.log(3)], rtol=1e-6)


def test_rpn_and_box_and_mask_reductions(rng):
  # Two images with different counts: losses are divided by the count of the batch, not of an image.
  labels = np.array([[1, 0, -1, 1, 0], [0, 0, 0, 1, 0]])
  chosen = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
  objectness, deltas, targets = (rng.normal(size=(2, 5, *t)) for t in ((), (4,), (4,)))
  expected_box = _smooth_l1(deltas - targets, 1 / 9).sum(-1)
  objectness_loss, box_loss = losses.rpn_losses(objectness, deltas, labels, targets, chosen)
  np.testing.assert_allclose(objectness_loss, _bce(objectness, labels > 0)[chosen].mean(), 1e-5)
  np.testing.assert_allclose(box_loss, expected_box[chosen & (labels > 0)].sum() / 4, 1e-5)

  labels = np.array([[2, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
  logits, class_deltas = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3, 4))
  own_deltas = np.take_along_axis(class_deltas, labels[..., None, None], 2)[:, :, 0]
  expected_box = _smooth_l1(own_deltas - targets, 1 / 9).sum(-1)
  class_loss, box_loss = losses.box_losses(logits, class_deltas, labels, targets, chosen)
  np.testing.assert_allclose(class_loss, _cross_entropy(logits, labels)[chosen].mean(), 1e-5)
  np.testing.assert_allclose(box_loss, expected_box[chosen & (labels > 0)].sum() / 4, 1e-5)

  logits, targets = rng.normal(size=(2, 5, 3, 3)), rng.random((2, 5, 3, 3))
  np.testing.assert_allclose(
    losses.mask_loss(logits, targets, chosen) / chosen.sum(),
    _bce(logits, targets)[chosen].mean(),
    1e-5,
  )


def test_nothing_sampled_is_zero_with_zero_gradient():
  nothing = jnp.zeros((1, 2), bool)
  labels = jnp.zeros((1, 2), int)

  def total(objectness, deltas, logits, class_deltas, masks):
    rpn = losses.rpn_losses(objectness, deltas, labels, deltas, nothing)
    box = losses.box_losses(logits, class_deltas, labels, deltas, nothing)
    return sum(rpn) + sum(box) + losses.mask_loss(masks, masks, nothing)

  shapes = ((1, 2), (1, 2, 4), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 3))
  inputs = [jnp.ones(shape) for shape in shapes]
  value, gradients = jax.jit(jax.value_and_grad(total, argnums=tuple(range(5))))(*inputs)
  assert value == 0
  assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_shapes_must_agree():
  with pytest.raises(ValueError, match=r"\(1, 3\)"):
    losses.rpn_losses(
      jnp.zeros((1, 2)),
      jnp.zeros((1, 2, 4)),
      jnp.zeros((1, 3), int),
      jnp.zeros((1, 2, 4)),
      jnp.zeros((1, 2), bool),
    )


# torchvision's RPN without its convolutions: anchors, matching, sampling, coding, losses and proposals,
# from the outputs of the head in the golden file.


def _rpn(golden):
  rows = (56, 28, 14, 7, 4)
  sizes = [(32,), (64,), (128,), (256,), (512,)]
  grids = anchors.anchor_grids(
    [(n, n) for n in rows], [224 // n for n in rows], sizes, (0.5, 1.0, 2.0)
  )
  levels = [grid.boxes() for grid in grids]
  objectness = [golden[f"rpn_objectness_{i}"].reshape(2, -1) for i in range(5)]
  deltas = [golden[f"rpn_deltas_{i}"].reshape(2, -1, 4) for i in range(5)]
  return levels, objectness, deltas


def test_box_loss_with_another_beta(rng):
  """Fast R-CNN, eq. 3, with the point where the parabola ends as an argument."""
  deltas = rng.standard_normal((1, 2, 1, 4)).astype(np.float32)
  targets = np.zeros((1, 2, 4), np.float32)
  deltas_K = np.concatenate([np.zeros_like(deltas), deltas], axis=2)
  one = np.ones((1, 2), np.int32)
  for beta in (1 / 9, 1 / 3, 1.0):
    _, found = losses.box_losses(np.zeros((1, 2, 2)), deltas_K, one, targets, one > 0, beta)
    d = np.abs(deltas.astype(float))
    want = np.where(d < beta, 0.5 * d**2 / beta, d - 0.5 * beta).sum() / 2
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_rpn_losses_equal_torchvision():
  golden = np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz")
  levels, objectness, deltas = _rpn(golden)
  anchors_N4 = jnp.asarray(np.concatenate(levels))
  gt_boxes, gt_valid = np.zeros((2, 5, 4), np.float32), np.zeros((2, 5), bool)
  for i in range(2):
    truth = golden[f"gt_boxes_xyxy_{i}"]
    scale = golden["image_sizes_hw"][i] / golden[f"image_HWC_{i}"].shape[:2]
    gt_boxes[i, : len(truth)] = truth * np.tile(scale[::-1], 2).astype(np.float32)
    gt_valid[i, : len(truth)] = True

  def of_sample(objectness_N, deltas_N4, gt_boxes_G4, gt_valid_G, key):
    matched_N, labels_N = sampling.match_anchors(gt_boxes_G4, gt_valid_G, anchors_N4.T, 0.7, 0.3)
    index_S, positive_S, valid_S = sampling.sample(labels_N, key, 10**6, 0.99999)
    gt_boxes_S4 = gt_boxes_G4[matched_N[index_S]]
    targets_S4 = boxes.encode(gt_boxes_S4, anchors_N4[index_S], (1.0,) * 4)
    labels_S = positive_S.astype(jnp.int32)
    return objectness_N[index_S], deltas_N4[index_S], labels_S, targets_S4, valid_S

  @jax.jit
  def rpn_losses(objectness_BN, deltas_BN4):
    keys = jax.random.split(jax.random.key(0), 2)
    samples = jax.vmap(of_sample)(objectness_BN, deltas_BN4, gt_boxes, gt_valid, keys)
    return losses.rpn_losses(*samples)

  objectness_loss, box_loss = rpn_losses(np.concatenate(objectness, 1), np.concatenate(deltas, 1))
  np.testing.assert_allclose(objectness_loss, golden["loss_objectness"], rtol=1e-5)
  np.testing.assert_allclose(box_loss, golden["loss_rpn_box_reg"], rtol=1e-4)


def test_proposals_equal_torchvision():
  golden = np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz")
  levels, objectness, deltas = _rpn(golden)

  @jax.jit
  def propose(objectness, deltas, height, width):
    candidates = []
    for level, (anchors_N4, scores_N, deltas_N4) in enumerate(
      zip(levels, objectness, deltas, strict=True)
    ):
      scores_K, index_K = jax.lax.top_k(scores_N, min(300, len(scores_N)))
      decoded = boxes.decode(deltas_N4[index_K], jnp.asarray(anchors_N4)[index_K], (1.0,) * 4)
      candidates.append((decoded, scores_K, jnp.full(len(scores_K), level)))
    boxes_N4, scores_N, level_N = map(jnp.concatenate, zip(*candidates, strict=True))
    boxes_N4 = boxes.clip(boxes_N4, height, width)
    large_N = jnp.all(boxes_N4[:, 2:] - boxes_N4[:, :2] >= 1e-3, axis=-1)
    index_K, valid_K = nms.batched_nms(boxes_N4, scores_N, level_N, 0.7, 150, valid_N=large_N)
    return boxes_N4[index_K], valid_K

  for i in range(2):
    expected = golden[f"proposals_xyxy_{i}"]
    proposals, valid = propose(
      [level[i] for level in objectness],
      [level[i] for level in deltas],
      *golden["image_sizes_hw"][i],
    )
    assert valid.sum() == len(expected)
    np.testing.assert_allclose(proposals[: len(expected)], expected, rtol=1e-4, atol=1e-3)


def test_segmentation_loss_is_over_labelled_pixels(rng):
  logits = 3 * rng.standard_normal((2, 5, 3, 4))
  labels = rng.integers(0, 4, (2, 5, 3))
  labels[0, :, 1:] = 255
  labels[1, 2, 2] = -1
  terms = []
  for place in np.ndindex(labels.shape):
    if 0 <= labels[place] < 4:
      row = logits[place]
      terms.append(np.log(np.exp(row).sum()) - row[labels[place]])
  loss = jax.jit(losses.segmentation_loss)
  value = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
  np.testing.assert_allclose(value, np.mean(terms), rtol=1e-6)
  assert loss(jnp.asarray(logits, jnp.float32), jnp.full((2, 5, 3), 255)) == 0
  gradient = jax.jit(jax.grad(losses.segmentation_loss))(logits.astype(np.float32), labels)
  assert (np.asarray(gradient)[labels == 255] == 0).all() and np.any(gradient)


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 2.0, 7.0)])
@pytest.mark.parametrize(("pixels", "probability"), [(7, 0.01), (1, 0.5), (1000, 0.1)])
def test_segmentation_loss_of_hard_pixels(pixels, probability, weights, rng):
  logits = 3 * rng.standard_normal((2, 5, 3, 4))
  labels = rng.integers(0, 4, (2, 5, 3))
  labels[0, :, 1:] = 255
  terms = []
  for place in np.ndindex(labels.shape):
    if labels[place] < 4:
      p = np.exp(logits[place][labels[place]]) / np.exp(logits[place]).sum()
      terms.append((p, weights[labels[place]] if weights else 1.0, place))
  terms.sort()
  hard = [term for i, term in enumerate(terms) if i < pixels or term[0] <= probability]
  assert len(hard) == {7: 7, 1000: 20}.get(pixels, len(hard)) and (pixels > 1 or 1 < len(hard) < 20)
  want = sum(-w * np.log(p) for p, w, _ in hard) / sum(w for _, w, _ in hard)
  options = dict(hard_pixels=pixels, hard_probability=probability)
  loss = functools.partial(losses.segmentation_loss, weights_K=weights, **options)
  value, slopes = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  found = np.argwhere(np.any(np.asarray(slopes) != 0, axis=-1))
  assert set(map(tuple, found.tolist())) == {place for *_, place in hard}
  assert loss(jnp.asarray(logits, jnp.float32), jnp.full((2, 5, 3), 255)) == 0


def test_segmentation_loss_weighs_classes(rng):
  logits = 3 * rng.standard_normal((2, 5, 3, 4))
  labels = rng.integers(0, 4, (2, 5, 3))
  labels[0, :, 1:] = 255
  weights = (0.5, 1.0, 2.0, 7.0)
  total = count = 0.0
  for place in np.ndindex(labels.shape):
    if labels[place] < 4:
      row, weight = logits[place], weights[labels[place]]
      total += weight * (np.log(np.exp(row).sum()) - row[labels[place]])
      count += weight
  logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
  value = losses.segmentation_loss(logits, labels, weights)
  np.testing.assert_allclose(value, total / count, rtol=1e-6)
  alike = losses.segmentation_loss(logits, labels, (3.0,) * 4)
  np.testing.assert_allclose(alike, losses.segmentation_loss(logits, labels), rtol=1e-6)
  assert losses.segmentation_loss(logits, jnp.full((2, 5, 3), 255), weights) == 0
  with pytest.raises(ValueError, match="3 weights for 4 classes"):
    losses.segmentation_loss(logits, labels, weights[:3])
