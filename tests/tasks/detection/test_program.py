"""Which detections of an exported program match those of a prediction."""

import ml_collections
import numpy as np
import pytest

from fpt_jax.tasks.detection import program


def detections(*, score=0.8, box=(10, 20, 110, 220), label=3, rows=(20, 220), others=()):
  """Returns one detection with a rectangle as its mask in an image of 300 x 200, and others far from it."""
  mask_HW = np.zeros((300, 200), bool)
  mask_HW[rows[0] : rows[1], 10:110] = True
  scores = [score, *others]
  boxes = [box] + [(120, 10 * i, 180, 10 * i + 5) for i in range(len(others))]
  return {
    "boxes_xyxy": np.array(boxes, np.float32),
    "scores": np.array(scores, np.float32),
    "labels": np.array([label] + [1] * len(others)),
    "masks": np.stack([mask_HW] * len(scores)),
  }


@pytest.mark.parametrize(
  ("change", "matches"),
  [
    ({}, True),
    ({"score": 0.791}, True),
    ({"score": 0.789}, False),
    ({"box": (10, 20, 110, 211)}, True),  # an IoU of 0.955
    ({"box": (10, 20, 110, 209)}, False),  # 0.945
    ({"rows": (20, 211)}, True),
    ({"rows": (20, 209)}, False),
    ({"label": 4}, False),
    ({"others": (0.055,)}, True),  # as low as detections that may be discarded
    ({"others": (0.07,)}, False),
  ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_what_matches(change, matches, turned):
  test = ml_collections.ConfigDict({"detections_per_image": 10, "score_threshold": 0.05})
  pair = [detections(), detections(**change)]
  share = program.unmatched_share(*(pair[::-1] if turned else pair), test)
  assert share == (0 if matches else 1 if not change.get("others") else 1 / 3)


def test_what_a_full_list_may_lack():
  test = ml_collections.ConfigDict({"detections_per_image": 2, "score_threshold": 0.05})
  pair = [detections(others=(0.4,)), detections(others=(0.405,))]
  pair[1]["boxes_xyxy"][1] += 50
  assert program.unmatched_share(*pair, test) == 0
  pair[1]["scores"][1] = 0.42
  assert program.unmatched_share(*pair, test) == pytest.approx(1 / 3)


def test_nothing_matches_nothing():
  test = ml_collections.ConfigDict({"detections_per_image": 2, "score_threshold": 0.05})
  nothing = {name: values[:0] for name, values in detections().items()}
  assert program.unmatched_share(nothing, nothing, test) == 0
  assert program.unmatched_share(detections(), nothing, test) == 1
  assert program.unmatched_share(nothing, detections(), test) == 1
