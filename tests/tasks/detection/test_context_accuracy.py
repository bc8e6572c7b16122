"""The accuracy of questions, against values computed by hand."""

import pytest
from etils import epath

from fpt_jax.configs import coco_box
from fpt_jax.tasks.detection import context_accuracy, evaluation, ground_truth

OF_CIRCLE, OF_SQUARE, STRIPED, CHECKED, CIRCLE = 5, 6, 3, 4, 1
BOX = [10.0, 20.0, 10.0, 10.0]
HALF_COVERED = [10.0, 20.0, 10.0, 4.99]  # IoU just below 0.5
MORE_COVERED = [10.0, 20.0, 10.0, 5.01]


def asks(image_id, category_id, question, bbox=BOX, **fields):
  fields = {"iscrowd": 0, "question": question} | fields
  return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox)} | fields


def found(image_id, category_id, score, bbox=BOX):
  return {"image_id": image_id, "category_id": category_id, "score": score, "bbox": list(bbox)}


def evaluate(annotations, results):
  return context_accuracy.evaluate({"annotations": annotations}, results)


TRUTH = [
  asks(1, OF_CIRCLE, "same_level"),
  asks(2, OF_SQUARE, "same_level"),
  asks(3, OF_CIRCLE, "coarse"),
  asks(4, OF_SQUARE, "coarse"),
  asks(5, OF_SQUARE, "coarse"),
  asks(6, STRIPED, "fine"),
  asks(7, CHECKED, "fine"),
  {"image_id": 1, "category_id": CIRCLE, "bbox": [50, 50, 9, 9], "iscrowd": 0},
]


def test_each_question_and_all_satellites():
  results = [
    *(found(1, OF_CIRCLE, 0.6), found(1, OF_SQUARE, 0.5)),
    *(found(2, OF_SQUARE, 0.6), found(2, OF_CIRCLE, 0.7)),  # the wrong one scores higher
    found(3, OF_CIRCLE, 0.01),
    found(4, OF_SQUARE, 0.9, HALF_COVERED),
    found(3, OF_SQUARE, 0.9, [50, 50, 10, 10]),  # elsewhere, like the next one
    found(6, STRIPED, 0.5),
  ]  # the images 5 and 7 have no detections
  assert evaluate(TRUTH, results) == pytest.approx(
    {
      "context/accuracy": 40,
      "context/same_level": 50,
      "context/coarse": 100 / 3,
      "context/fine": 50,
    }
  )


def test_a_box_counts_from_an_iou_of_one_half():
  truth = [asks(1, OF_CIRCLE, "coarse")]
  assert evaluate(truth, [found(1, OF_CIRCLE, 0.9, HALF_COVERED)])["context/coarse"] == 0
  assert evaluate(truth, [found(1, OF_CIRCLE, 0.9, MORE_COVERED)])["context/coarse"] == 100
  better = [found(1, OF_CIRCLE, 0.2), found(1, OF_SQUARE, 0.9, HALF_COVERED)]
  assert evaluate([*truth, asks(2, OF_SQUARE, "coarse")], better)["context/coarse"] == 50


def test_categories_of_other_groups_do_not_compete():
  others = [found(6, category, 0.9) for category in (CIRCLE, OF_CIRCLE, OF_SQUARE)]
  assert evaluate(TRUTH, [found(6, STRIPED, 0.1), *others])["context/fine"] == 50
  # "coarse" has no satellite of a circle here, but shares its group with "same_level"
  truth = [asks(1, OF_CIRCLE, "same_level"), asks(1, OF_SQUARE, "same_level", [50, 50, 9, 9])]
  truth += [asks(2, OF_SQUARE, "coarse")]
  results = [found(2, OF_SQUARE, 0.1), found(2, OF_CIRCLE, 0.2)]
  assert evaluate(truth, results)["context/coarse"] == 0


def test_questions_that_share_categories_with_one_have_all_of_them():
  truth = [asks(1, 1, "a"), asks(2, 3, "c"), asks(3, 1, "b"), asks(3, 2, "b", [50, 50, 9, 9])]
  truth += [asks(4, 2, "d", [50, 50, 9, 9]), asks(4, 3, "d")]
  assert evaluate(truth, [found(1, 1, 0.5), found(1, 3, 0.6)])["context/a"] == 0
  assert evaluate(truth, [found(1, 1, 0.5), found(1, 4, 0.6)])["context/a"] == 100


def test_crowds_and_annotations_without_questions_are_left_out():
  results = [found(1, OF_CIRCLE, 0.5)]
  crowd = asks(1, OF_SQUARE, "coarse", iscrowd=1)
  assert evaluate([asks(1, OF_CIRCLE, "coarse"), crowd], results) == {
    "context/accuracy": 100,
    "context/coarse": 100,
  }
  assert evaluate([crowd, {"image_id": 1, "category_id": 1, "bbox": BOX}], results) == {}
  assert evaluate([], []) == {}


def test_only_satellites_have_an_accuracy_of_their_own():
  truth = [asks(1, STRIPED, "fine"), asks(2, 9, "other")]
  assert evaluate(truth, [found(1, STRIPED, 0.5)]) == {"context/fine": 100, "context/other": 0}


def test_line_for_the_log():
  metrics = {"accuracy": 93.14, "same_level": 95, "coarse": 91.2, "fine": 88, "other": 1}
  line = context_accuracy.format_line({f"context/{name}": v for name, v in metrics.items()})
  satellites = "satellites 93.1 (same level 95.0, coarse 91.2)"
  assert line == f"context: {satellites}, fine texture 88.0, other 1.0"
  assert context_accuracy.format_line({"context/fine": 7.0}) == "context: fine texture 7.0"


def test_evaluation_of_context_shapes_has_the_questions(shapes, tmp_path):
  """Results that are right but for the satellites' kinds."""
  truth = ground_truth.coco_ground_truth(shapes, "train+val")
  results = []
  for annotation in truth["annotations"]:
    if not annotation["iscrowd"]:
      category = annotation["category_id"]
      category = OF_SQUARE if category == OF_CIRCLE else category
      results.append(found(annotation["image_id"], category, 0.9, annotation["bbox"]))
  config = coco_box.get_config("demo")
  config.data = shapes
  metrics = evaluation.score(config, truth, results, epath.Path(tmp_path))
  satellites = [
    annotation
    for annotation in truth["annotations"]
    if annotation["category_id"] in (OF_CIRCLE, OF_SQUARE) and not annotation["iscrowd"]
  ]
  squares = sum(annotation["category_id"] == OF_SQUARE for annotation in satellites)
  assert metrics["context/accuracy"] == pytest.approx(100 * squares / len(satellites))
  assert metrics["context/fine"] == 100
  assert {"context/same_level", "context/coarse", "bbox/AP"} < set(metrics)
