"""The confusion matrix of boxes, computed by hand."""

import numpy as np

from fpt_jax.tasks.detection import confusion

CAT, DOG = 5, 9  # ids; categories 0 and 1, background is 2


def thing(category, x, crowd=0, width=10):
  return {"category_id": category, "bbox": [x, 0, width, 10], "iscrowd": crowd}


def detection(category, x, score=0.9):
  return {"category_id": category, "bbox": [x, 0, 10, 10], "score": score}


def counted(objects, detections):
  """Returns the entries that are not 0."""
  counts_TP = confusion.count([(objects, detections)], (CAT, DOG), min_score=0.5)
  assert counts_TP.dtype == np.int64 and counts_TP.shape == (3, 3)
  return {tuple(map(int, at)): int(counts_TP[tuple(at)]) for at in np.argwhere(counts_TP)}


def test_objects_are_counted_by_true_and_predicted_category():
  objects = [thing(CAT, 0), thing(CAT, 50), thing(DOG, 100), thing(DOG, 150)]
  detections = [detection(CAT, 0), detection(DOG, 51), detection(DOG, 104), detection(CAT, 200)]
  # a dog at an IoU of 0.43 is missed, and found on background
  assert counted(objects, detections) == {
    (0, 0): 1, (0, 1): 1, (1, 2): 2, (2, 0): 1, (2, 1): 1,
  }  # fmt: skip


def test_an_object_is_taken_once_by_the_highest_score():
  both = [detection(DOG, 0, 0.6), detection(CAT, 1, 0.8)]
  assert counted([thing(DOG, 0)], both) == {(1, 0): 1, (2, 1): 1}
  # of two objects, the one with the higher IoU
  assert counted([thing(CAT, 0), thing(DOG, 2)], [detection(DOG, 2)]) == {(0, 2): 1, (1, 1): 1}


def test_low_scores_and_crowds_do_not_count():
  assert counted([thing(CAT, 0)], [detection(CAT, 0, 0.49)]) == {(0, 2): 1}
  crowd = [thing(CAT, 0, crowd=1, width=90)]
  assert counted(crowd, [detection(CAT, 40), detection(DOG, 40)]) == {(2, 1): 1}
  assert counted([], []) == {}


def test_counts_of_images_are_added():
  image = ([thing(CAT, 0)], [detection(CAT, 0)])
  assert confusion.count([image] * 3, (CAT, DOG), 0.5)[0, 0] == 3
