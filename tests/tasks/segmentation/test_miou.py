"""mIoU against a pixel-by-pixel count in plain Python, and against values computed by hand."""

import math

import numpy as np
import pytest

from fpt_jax.tasks.segmentation import miou


def _count(truth, prediction, num_classes):
  """Returns IoU and accuracy of each class (None where undefined), and the accuracy of all pixels."""
  pixels = [(int(t), int(p)) for t, p in zip(truth.flat, prediction.flat, strict=True) if t != 255]
  ious, accuracies = [], []
  for c in range(num_classes):
    both = sum(t == c and p == c for t, p in pixels)
    either = sum(t == c or p == c for t, p in pixels)
    true = sum(t == c for t, _ in pixels)
    ious.append(100 * both / either if either else None)
    accuracies.append(100 * both / true if true else None)
  return ious, accuracies, 100 * sum(t == p for t, p in pixels) / len(pixels)


def _mean(values):
  values = [v for v in values if v is not None]
  return sum(values) / len(values)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 13), (31, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_metrics_equal_a_plain_count(rng, height, width, dtype):
  names = ("sky", "road", "car", "bus", "tree", "dog")
  truth = rng.choice([0, 1, 2, 4, 255], (height, width)).astype(dtype)
  truth[0, 0] = 2
  prediction = np.where(
    rng.random((height, width)) < 0.6, truth, rng.choice([0, 1, 2, 3], (height, width))
  ).astype(dtype)
  prediction[truth == 255] = 5  # never counted, so that 5 is absent from truth and prediction
  found = miou.scores(miou.confusion_matrix(truth, prediction, 6), names)
  ious, accuracies, overall = _count(truth, prediction, 6)
  assert math.isnan(found["IoU/dog"]) and ious[5] is None
  for name, iou in zip(names, ious, strict=True):
    np.testing.assert_allclose(found[f"IoU/{name}"], math.nan if iou is None else iou, rtol=1e-12)
  np.testing.assert_allclose(found["mIoU"], _mean(ious), rtol=1e-12)
  np.testing.assert_allclose(found["mAcc"], _mean(accuracies), rtol=1e-12)
  np.testing.assert_allclose(found["aAcc"], overall, rtol=1e-12)


def test_metrics_computed_by_hand():
  truth = np.array([[0, 0, 1], [1, 1, 255]])
  prediction = np.array([[0, 1, 1], [1, 2, 2]])
  confusion = miou.confusion_matrix(truth, prediction, 4)
  assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
  found = miou.scores(confusion, "abcd")
  assert found["IoU/a"] == 50 and found["IoU/b"] == 50
  assert found["IoU/c"] == 0  # predicted but never true, which counts as zero
  assert math.isnan(found["IoU/d"])
  np.testing.assert_allclose(found["mIoU"], 100 / 3)
  np.testing.assert_allclose(found["mAcc"], (50 + 200 / 3) / 2)
  np.testing.assert_allclose(found["aAcc"], 60)


def test_matrices_of_parts_add_up(rng):
  truth = rng.choice([0, 1, 2, 255], (9, 11))
  prediction = rng.integers(0, 3, (9, 11))
  whole = miou.confusion_matrix(truth, prediction, 3)
  parts = sum(
    miou.confusion_matrix(truth[i : i + 2], prediction[i : i + 2], 3) for i in range(0, 9, 2)
  )
  np.testing.assert_array_equal(whole, parts)
  assert whole.dtype == np.int64 and whole.sum() == (truth != 255).sum()


def test_many_pixels_do_not_overflow():
  truth = np.full((300, 300), 149, np.uint8)  # 149 * 150 + 149 needs more than the maps' 8 bits
  confusion = miou.confusion_matrix(truth, truth, 150)
  assert confusion[149, 149] == 90_000 and confusion.sum() == 90_000


def test_metrics_without_labelled_pixels_are_nan():
  truth = np.full((2, 3), 255, np.uint8)
  confusion = miou.confusion_matrix(truth, np.zeros((2, 3), np.uint8), 2)
  assert all(math.isnan(value) for value in miou.scores(confusion, "ab").values())


def test_another_void_label():
  truth, prediction = np.array([[11, 3]]), np.array([[0, 3]])
  assert miou.confusion_matrix(truth, prediction, 11, void=11).sum() == 1


def test_inputs_that_do_not_fit_are_reported():
  truth = np.array([[0, 1]])
  with pytest.raises(
    ValueError, match=r"truth has shape \(1, 2\) and prediction has shape \(2, 1\)"
  ):
    miou.confusion_matrix(truth, truth.T, 2)
  with pytest.raises(ValueError, match=r"truth has labels \[7\], classes are 0..1"):
    miou.confusion_matrix(np.array([[0, 7]]), truth, 2)
  with pytest.raises(ValueError, match=r"prediction has labels \[-1, 255\], classes are 0..1"):
    miou.confusion_matrix(truth, np.array([[-1, 255]]), 2)
  with pytest.raises(ValueError, match="does not fit 3 class names"):
    miou.scores(np.zeros((2, 2), np.int64), "abc")


def test_the_table_names_every_class():
  found = miou.scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ("road", "traffic light", "bus"))
  assert miou.format_table(found).splitlines() == [
    "mIoU 77.5  mAcc 87.5  aAcc 87.5",
    "road            75.0",
    "traffic light   80.0",
    "bus                -",
  ]
