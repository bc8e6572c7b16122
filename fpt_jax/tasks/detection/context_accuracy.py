"""Accuracy of the categories that only context tells, for annotations that ask a question.

A question is the field `question` of an annotation, such as "coarse" in Context Shapes. Unlike the average
precision, the accuracy separates recognition from the ranking of scores, and one question from another.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# the questions about satellites, and what the log calls each question
ACROSS = {"same_level": "same level", "coarse": "coarse"}
NAMES = ACROSS | {"fine": "fine texture"}
MIN_IOU = 0.5


def evaluate(
  ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
  """Computes how often the best detection of an object has the object's category.

  The categories of a question are those that its annotations have; questions that share a category have
  all categories of each other. Among the detections with such a category whose box has an IoU of more
  than 0.5 with the annotation's, the one of the highest score counts. An annotation without one
  counts as wrong.

  Args:
    ground_truth: `annotations` in COCO's format, some of them with the field `question`. Crowds are left
      out.
    results: entries as `coco_ap.to_coco_results` returns them.

  Returns:
    "context/same_level" and so on for each question, and "context/accuracy" over all satellites
    (questions "same_level" and "coarse"), from 0 to 100. Without questions, {}.
  """
  asked = [
    annotation
    for annotation in ground_truth["annotations"]
    if annotation.get("question") and not annotation.get("iscrowd", 0)
  ]
  categories = _categories(asked)
  results_of = collections.defaultdict(list)
  for result in results if asked else ():
    results_of[result["image_id"]].append(result)
  right = collections.defaultdict(list)
  for annotation in asked:
    question = annotation["question"]
    found = [
      r for r in results_of[annotation["image_id"]] if r["category_id"] in categories[question]
    ]
    best = _best(annotation["bbox"], found)
    right[question].append(best is not None and best["category_id"] == annotation["category_id"])
  metrics = {f"context/{question}": 100 * float(np.mean(right[question])) for question in right}
  across = [is_right for question in ACROSS for is_right in right.get(question, ())]
  return ({"context/accuracy": 100 * float(np.mean(across))} if across else {}) | metrics


def format_line(metrics: Mapping[str, float]) -> str:
  """Formats the metrics of `evaluate` as "context: satellites 93.1 (same level 95.0), ..."."""
  values = {name.removeprefix("context/"): f"{value:.1f}" for name, value in metrics.items()}
  parts = []
  if "accuracy" in values:
    each = [f"{name} {values[question]}" for question, name in ACROSS.items() if question in values]
    parts.append(f"satellites {values['accuracy']} ({', '.join(each)})")
  for question, value in values.items():
    if question != "accuracy" and question not in ACROSS:
      parts.append(f"{NAMES.get(question, question)} {value}")
  return "context: " + ", ".join(parts)


def _categories(asked: Iterable[Mapping[str, Any]]) -> dict[str, set[int]]:
  """Returns the category ids of each question; questions that share one have the same set."""
  categories: dict[str, set[int]] = {}
  for annotation in asked:
    categories.setdefault(annotation["question"], set()).add(annotation["category_id"])
  for question in categories:
    sharing = [q for q in categories if categories[q] & categories[question]]
    union = set().union(*(categories[q] for q in sharing))
    for q in sharing:
      categories[q] = union
  return categories


def _best(bbox_xywh: Sequence[float], results: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """Returns the result of the highest score among those that overlap enough with the box."""
  if not results:
    return None
  boxes_D4 = np.array([result["bbox"] for result in results], np.float64)
  box_14 = np.array([bbox_xywh], np.float64)
  iou_D = coco_mask.iou(boxes_D4, box_14, [0])[:, 0]
  overlapping = [result for result, iou in zip(results, iou_D, strict=True) if iou > MIN_IOU]
  return max(overlapping, key=lambda result: result["score"], default=None)
