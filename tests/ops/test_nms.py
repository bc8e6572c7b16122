"""NMS against torchvision's results, a loop in float64, and cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.nms import batched_nms, nms
from tests.conftest import GOLDEN

IMPLEMENTATIONS = ("sequential", "tiled")
STATIC = ("iou_threshold", "max_outputs", "implementation")
NMS = jax.jit(nms, static_argnames=STATIC)
BATCHED_NMS = jax.jit(batched_nms, static_argnames=STATIC)


def _kept(result):
  indices, valid = map(np.asarray, result)
  count = valid.sum()
  assert valid[:count].all() and not indices[count:].any()
  return indices[:count].tolist()


def _greedy(boxes, scores, classes, threshold):
  """The textbook loop, pair by pair: the IoU is a float32, compared in float64."""
  kept = []
  for i in np.argsort(-scores, kind="stable"):
    x0, y0, x1, y1 = boxes[i].astype(np.float64)
    for j in kept:
      u0, v0, u1, v1 = boxes[j].astype(np.float64)
      inter = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
      union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inter
      if classes[i] == classes[j] and union > 0 and float(np.float32(inter / union)) > threshold:
        break
    else:
      kept.append(int(i))
  return kept


@pytest.mark.parametrize(
  ("percent", "max_outputs", "implementation"),
  [(30, 100, "tiled"), (50, 600, "auto"), (70, 100, "sequential"), (70, 600, "tiled")],
)
def test_equal_to_torchvision(percent, max_outputs, implementation):
  golden = np.load(GOLDEN / "nms.npz")
  result = NMS(
    golden["boxes_xyxy"],
    golden["scores"],
    percent / 100,
    max_outputs,
    implementation=implementation,
  )
  assert _kept(result) == golden[f"keep_{percent}"][:max_outputs].tolist()
  assert result[0].shape == result[1].shape == (max_outputs,)
  assert result[0].dtype == jnp.int32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batched_equal_to_torchvision(implementation):
  golden = np.load(GOLDEN / "nms.npz")
  classes = golden["classes"].astype(np.int32)
  result = BATCHED_NMS(
    golden["boxes_xyxy"], golden["scores"], classes, 0.5, 500, implementation=implementation
  )
  assert _kept(result) == golden["keep_batched_50"].tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_boxes", [1, 257, 600])
def test_equal_to_the_loop_with_equal_scores_and_boxes(rng, implementation, num_boxes):
  corner = rng.integers(0, 30, (num_boxes, 2))
  boxes = np.concatenate([corner, corner + rng.integers(0, 9, corner.shape)], 1).astype(np.float32)
  scores = rng.integers(0, 20, num_boxes).astype(np.float32)
  classes = rng.integers(0, 3, num_boxes).astype(np.int32)
  result = BATCHED_NMS(boxes, scores, classes, 0.4, num_boxes, implementation=implementation)
  assert _kept(result) == _greedy(boxes, scores, classes, 0.4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threshold_is_strict_and_kept_in_float64(implementation):
  # IoU exactly 1/2 stays at 0.5. 3/10 in float32 is above 0.3 in float64, so it falls at 0.3.
  half = np.array([[0, 0, 4, 1], [0, 0, 2, 1]], np.float32)
  three_tenths = np.array([[0, 0, 10, 1], [0, 0, 3, 1]], np.float32)
  scores = np.array([1, 0.5], np.float32)
  assert float(np.float32(0.3)) > 0.3
  assert _kept(NMS(half, scores, 0.5, 2, implementation=implementation)) == [0, 1]
  assert _kept(NMS(three_tenths, scores, 0.3, 2, implementation=implementation)) == [0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_chain_keeps_every_second_box(implementation):
  # Each box overlaps only its neighbours, so the greedy result takes as many steps as there are boxes.
  x = np.arange(300, dtype=np.float32) * 2
  boxes = np.stack([x, 0 * x, x + 4, 0 * x + 1], axis=1)
  result = NMS(boxes, -x, 0.3, 300, implementation=implementation)
  assert _kept(result) == list(range(0, 300, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invalid_boxes_neither_appear_nor_suppress_under_vmap(rng, implementation):
  corner = rng.uniform(0, 20, (2, 3, 40, 2))
  boxes = np.concatenate([corner, corner + 8], -1).astype(np.float32)
  scores = rng.random((2, 3, 40)).astype(np.float32)
  valid = rng.random((2, 3, 40)) < 0.6
  valid[1, 2] = False

  def one(boxes, scores, valid):
    return NMS(boxes, scores, 0.3, 25, valid_N=valid, implementation=implementation)

  indices, kept = jax.jit(jax.vmap(jax.vmap(one)))(boxes, scores, valid)
  for i in np.ndindex(2, 3):
    (rows,) = np.nonzero(valid[i])
    expected = _greedy(boxes[i][rows], scores[i][rows], np.zeros(len(rows)), 0.3)
    assert _kept((indices[i], kept[i])) == rows[expected].tolist()
  assert not kept[1, 2].any()


def test_more_outputs_than_boxes():
  indices, valid = NMS(jnp.array([[0.0, 0, 1, 1]]), jnp.array([0.5]), 0.5, 3)
  assert (indices.tolist(), valid.tolist()) == ([0, 0, 0], [True, False, False])


def test_wrong_arguments_are_quoted():
  boxes, scores = jnp.zeros((3, 4)), jnp.zeros(3)
  with pytest.raises(ValueError, match=r"\(3, 5\)"):
    NMS(jnp.zeros((3, 5)), scores, 0.5, 3)
  with pytest.raises(ValueError, match=r"\(2,\)"):
    NMS(boxes, jnp.zeros(2), 0.5, 3)
  with pytest.raises(ValueError, match="'fast'"):
    NMS(boxes, scores, 0.5, 3, implementation="fast")
  with pytest.raises(ValueError, match="float32"):
    BATCHED_NMS(boxes, scores, scores, 0.5, 3)
