"""TIDE's errors: scenes computed by hand, the authors' program, and pycocotools."""

import json

import numpy as np
import pytest

from fpt_jax.tasks.detection import coco_ap, tide
from tests.conftest import GOLDEN

ONE_OF_TWO = 100 * 51 / 101  # AP50 if half of the objects are found: recalls 0, 0.01, ..., 0.5
# a wrong detection between the right ones: the recalls above 0.5 have a precision of 2/3
WRONG_BETWEEN = 100 * (51 + 50 * 2 / 3) / 101


def thing(x, category=1, crowd=0, width=10):
  return {"category_id": category, "bbox": [x, 0, width, 10], "iscrowd": crowd}


def detection(score, x, category=1):
  """A detection of the size of an object; shifted by x pixels, it has an IoU of (10 - x) / (10 + x)."""
  return {"category_id": category, "bbox": [x, 0, 10, 10], "score": score}


def analysed(objects, detections):
  """Returns AP50 and the errors that are not 0."""
  matched = tide.match([(objects, detections)], "bbox")
  errors = tide.errors(matched)
  assert list(errors) == ["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg"]
  return tide.ap50(matched), {name: value for name, value in errors.items() if value > 1e-9}


@pytest.mark.parametrize(
  ("objects", "detections", "before", "expected"),
  [
    pytest.param(  # category 1: 0; category 2: half of 100, as the wrong one comes first
      [thing(0), thing(100, 2)],
      [detection(0.9, 0, 2), detection(0.8, 100, 2)],
      25,
      {"Cls": 75, "FalsePos": 25, "FalseNeg": 25},
      id="Cls",
    ),
    pytest.param(
      [thing(0), thing(100)],
      [detection(0.9, 4), detection(0.8, 100)],
      ONE_OF_TWO / 2,
      {
        "Loc": 100 - ONE_OF_TWO / 2,
        "FalsePos": ONE_OF_TWO / 2,
        "FalseNeg": 50 - ONE_OF_TWO / 2,
      },
      id="Loc",
    ),
    pytest.param(  # without its missed object, category 1 has no precision
      [thing(0), thing(100, 2)],
      [detection(0.9, 4, 2), detection(0.8, 100, 2)],
      25,
      {"Both": 25, "Miss": 25, "FalsePos": 25, "FalseNeg": 25},
      id="Both",
    ),
    pytest.param(
      [thing(0), thing(100)],
      [detection(0.9, 0), detection(0.8, 1), detection(0.7, 100)],
      WRONG_BETWEEN,
      {"Dupe": 100 - WRONG_BETWEEN, "FalsePos": 100 - WRONG_BETWEEN},
      id="Dupe",
    ),
    pytest.param(  # an IoU of 0.05
      [thing(0), thing(100)],
      [detection(0.9, 0), detection(0.8, 109), detection(0.7, 100)],
      WRONG_BETWEEN,
      {"Bkg": 100 - WRONG_BETWEEN, "FalsePos": 100 - WRONG_BETWEEN},
      id="Bkg",
    ),
    pytest.param(
      [thing(0), thing(100)],
      [detection(0.9, 0)],
      ONE_OF_TWO,
      {"Miss": 100 - ONE_OF_TWO, "FalseNeg": 100 - ONE_OF_TWO},
      id="Miss",
    ),
    pytest.param(  # the second attempt at an object is removed
      [thing(0)],
      [detection(0.9, 4), detection(0.8, -4)],
      0,
      {"Loc": 100},
      id="two attempts",
    ),
    pytest.param(  # an attempt at an object that is found is removed as well
      [thing(0), thing(100)],
      [detection(0.9, 0), detection(0.8, 4), detection(0.7, 100)],
      WRONG_BETWEEN,
      {"Loc": 100 - WRONG_BETWEEN, "FalsePos": 100 - WRONG_BETWEEN},
      id="an attempt at what is found",
    ),
    pytest.param(  # covered by a crowd of its category; that of another category is background
      [thing(0), thing(200, 1, crowd=1, width=90)],
      [detection(0.9, 230), detection(0.8, 0), detection(0.7, 230, 2)],
      100,
      {},
      id="crowd",
    ),
    pytest.param([thing(0)], [], 0, {"Miss": 100, "FalseNeg": 100}, id="nothing found"),
  ],
)
def test_errors_computed_by_hand(objects, detections, before, expected):
  ap50, errors = analysed(objects, detections)
  assert ap50 == pytest.approx(before)
  assert errors == pytest.approx(expected)


def test_without_objects_there_are_no_errors():
  assert tide.errors(tide.match([([], [detection(0.9, 0)])], "bbox")) == {}


def test_only_the_best_hundred_of_a_category_count():
  false = [detection(0.9, 1000 + i) for i in range(100)]
  assert analysed([thing(0)], [*false, detection(0.5, 0)])[0] == 0
  assert analysed([thing(0)], [*false[1:], detection(0.5, 0)])[0] == pytest.approx(1)


@pytest.fixture(scope="module")
def golden():
  return json.loads((GOLDEN / "tide.json").read_text())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_authors_program_finds_the_same_errors(golden, kind):
  evaluations = coco_ap.evaluations(golden["ground_truth"], golden["detections"], (kind,))
  matched = tide.match(coco_ap.images_of(evaluations[kind]), kind)
  expected = golden["expected"][kind]
  assert tide.ap50(matched) == pytest.approx(expected["AP50"])
  assert tide.errors(matched) == pytest.approx(expected["errors"])
  assert min(expected["errors"].values()) > 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_is_wrong_after_all_corrections(golden, kind, seed):
  rng = np.random.default_rng(seed)
  truth = dict(golden["ground_truth"])
  truth["annotations"] = [
    annotation | {"iscrowd": int(rng.random() < 0.3)} for annotation in truth["annotations"]
  ]
  found = [entry for entry in golden["detections"] if rng.random() < 0.8]
  evaluations = coco_ap.evaluations(truth, found, (kind,))
  matched = tide.match(coco_ap.images_of(evaluations[kind]), kind)
  ap50 = coco_ap.metrics_of(evaluations)[f"{kind}/AP50"]
  assert 5 < tide.ap50(matched) < 60 and tide.ap50(matched) == pytest.approx(ap50, rel=1e-12)
  assert "crowd" in matched.kind_D or kind == "segm"
  assert tide.ap50(matched, tide.MAIN) == tide.ap50(matched, tide.SPECIAL) == 100
