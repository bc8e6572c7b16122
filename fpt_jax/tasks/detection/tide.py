"""TIDE: how much average precision each type of error costs a detector.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section 2, with
a foreground threshold of 0.5 and a background threshold of 0.1. Where the paper leaves room, the choices are
those of its authors' program, tidecv 1.0.1; crowds, the number of detections and the categories of the mean
are those of COCO, so that the average precision without corrections is COCO's AP50.

Shapes: D detections, G ground truths, K categories with ground truth.
"""

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpt_jax.tasks.detection import coco_ap

MAIN = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
SPECIAL = ("FalsePos", "FalseNeg")
FOREGROUND = 0.5  # IoU from which a detection finds an object
BACKGROUND = 0.1  # IoU up to which a detection lies on background
MAX_DETECTIONS = 100  # per image and category
_RECALLS = np.linspace(0, 1, 101)
_CORRECT, _IGNORED = "", "crowd"


class Matched(NamedTuple):
  """What the detections of all images are.

  Attributes:
    kind_D: "" for one that finds an object, "crowd" for one that does not count, or its error, "Cls", "Loc",
      "Both", "Dupe" or "Bkg".
    score_D: scores.
    category_D: category ids.
    target_D: with the errors "Cls" and "Loc", the ground truth that the detection would find without the
      error; otherwise -1.
    category_G: category ids of the ground truths without crowds.
    found_G: whether a detection finds them.
  """

  kind_D: np.ndarray
  score_D: np.ndarray
  category_D: np.ndarray
  target_D: np.ndarray
  category_G: np.ndarray
  found_G: np.ndarray


def match(
  images: Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]], iou_type: str
) -> Matched:
  """Finds the error of each detection, by the definitions of the paper's section 2.2.

  A detection that meets several of them has the first error of Loc, Cls, Dupe, Bkg and Both.

  Args:
    images: annotations and detections of each image, see `coco_ap.images_of`.
    iou_type: "bbox", or "segm" for run-length encoded masks.
  """
  parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  objects = 0
  for annotations, detections in images:
    of_image = _match_image(annotations, detections, iou_type)
    target_D = of_image.target_D
    shifted = of_image._replace(target_D=np.where(target_D < 0, -1, target_D + objects))
    objects += len(of_image.category_G)
    for name, values in shifted._asdict().items():
      parts[name].append(values)
  return Matched(**{name: np.concatenate(values) for name, values in parts.items()})


def ap50(matched: Matched, corrected: Collection[str] = ()) -> float:
  """Returns COCO's AP50, from 0 to 100, with some types of errors corrected.

  A detection with the error Cls or Loc gets the category or the place of its ground truth, unless another
  detection finds that one or has such an error and a higher score: then it is removed, as those with Both,
  Dupe and Bkg are. Miss removes the ground truths that no detection finds and that no Cls or Loc is about.
  FalsePos removes all detections that find nothing, FalseNeg all ground truths that are not found. A
  category that has neither ground truths nor detections left does not count in the mean. If no category is
  left, the result is 100; without ground truth, it is nan.

  Args:
    matched: result of `match`.
    corrected: types of errors, of `MAIN` and `SPECIAL`.
  """
  kind_D, category_D = matched.kind_D, matched.category_D.copy()
  correct_D, kept_D = kind_D == _CORRECT, kind_D != _IGNORED
  attempt_D = (kind_D == "Cls") | (kind_D == "Loc")
  repairable_D = _best_attempts(matched, attempt_D)
  for error in set(corrected) - {"Miss", *SPECIAL}:
    repaired_D = repairable_D & (kind_D == error)
    category_D[repaired_D] = matched.category_G[matched.target_D[repaired_D]]
    correct_D |= repaired_D
    kept_D &= (kind_D != error) | repaired_D
  counted_G = np.ones(len(matched.category_G), bool)
  if "Miss" in corrected:
    counted_G = matched.found_G.copy()
    counted_G[matched.target_D[attempt_D]] = True
  if "FalseNeg" in corrected:
    counted_G = matched.found_G
  if "FalsePos" in corrected:
    kept_D &= correct_D
  categories_K = np.unique(matched.category_G)
  if not len(categories_K):
    return float("nan")
  precisions = []
  for category in categories_K:
    of_D = np.flatnonzero(kept_D & (category_D == category))
    count = int((counted_G & (matched.category_G == category)).sum())
    if count or len(of_D):
      order_D = of_D[np.argsort(-matched.score_D[of_D], kind="stable")]
      precisions.append(_average_precision(correct_D[order_D], count))
  return 100 * float(np.mean(precisions)) if precisions else 100.0


def errors(matched: Matched) -> dict[str, float]:
  """Returns by how much AP50, from 0 to 100, rises if each type of error alone is corrected.

  Returns:
    A value for each name of `MAIN` and `SPECIAL`, 0 or more; {} without ground truth. The errors interact:
    the values do not add up to what AP50 lacks.
  """
  before = ap50(matched)
  if np.isnan(before):
    return {}
  # moving a detection to another category may cost more there than it gains
  return {name: max(0.0, ap50(matched, (name,)) - before) for name in (*MAIN, *SPECIAL)}


def _match_image(
  annotations: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]], iou_type: str
) -> Matched:
  """Matches the detections of one image as COCO does, and finds the errors of those that find nothing."""
  detections = _best_of_each_category(detections)
  objects = [a for a in annotations if not a["iscrowd"]]
  crowds = [a for a in annotations if a["iscrowd"]]
  category_D, category_G, category_X = (
    np.array([entry["category_id"] for entry in entries], np.int64)
    for entries in (detections, objects, crowds)
  )
  iou_DG = coco_ap.iou(detections, objects, iou_type)
  same_DG = category_D[:, None] == category_G[None]
  found_G = np.zeros(len(objects), bool)
  correct_D = np.zeros(len(detections), bool)
  enough_DG = same_DG & (iou_DG >= FOREGROUND)
  for d in np.flatnonzero(enough_DG.any(axis=1)):
    free_G = np.flatnonzero(enough_DG[d] & ~found_G)
    if len(free_G):
      found_G[free_G[np.argmax(iou_DG[d, free_G])]] = correct_D[d] = True
  in_crowd_DX = (category_D[:, None] == category_X[None]) & (
    coco_ap.iou(detections, crowds, iou_type) >= FOREGROUND
  )
  ignored_D = ~correct_D & in_crowd_DX.any(axis=1)

  # a column of zeros, so that there is a maximum without objects
  padded_DG = np.pad(iou_DG, ((0, 0), (0, 1)))
  of_category_DG = padded_DG * np.pad(same_DG, ((0, 0), (0, 1)))
  of_others_DG = padded_DG - of_category_DG
  own_D, other_D = of_category_DG.max(axis=1), of_others_DG.max(axis=1)
  kind_D = np.select(
    [
      correct_D,
      ignored_D,
      (own_D >= BACKGROUND) & (own_D < FOREGROUND),
      other_D >= FOREGROUND,
      own_D >= FOREGROUND,
      np.maximum(own_D, other_D) <= BACKGROUND,
    ],
    [_CORRECT, _IGNORED, "Loc", "Cls", "Dupe", "Bkg"],
    "Both",
  )
  target_D = np.select(
    [kind_D == "Loc", kind_D == "Cls"],
    [of_category_DG.argmax(axis=1), of_others_DG.argmax(axis=1)],
    -1,
  )
  score_D = np.array([detection["score"] for detection in detections], np.float64)
  return Matched(kind_D, score_D, category_D, target_D, category_G, found_G)


def _best_of_each_category(detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Returns the detections that count, in the order of their scores."""
  number: collections.Counter[int] = collections.Counter()
  best = []
  for detection in sorted(detections, key=lambda d: -d["score"]):
    number[detection["category_id"]] += 1
    if number[detection["category_id"]] <= MAX_DETECTIONS:
      best.append(detection)
  return best


def _best_attempts(matched: Matched, attempt_D: np.ndarray) -> np.ndarray:
  """Returns, bool [D], the attempt with the highest score at each ground truth that is not found."""
  best_D = np.zeros(len(attempt_D), bool)
  candidates_D = np.flatnonzero(attempt_D)
  candidates_D = candidates_D[~matched.found_G[matched.target_D[candidates_D]]]
  candidates_D = candidates_D[np.argsort(-matched.score_D[candidates_D], kind="stable")]
  _, first = np.unique(matched.target_D[candidates_D], return_index=True)
  best_D[candidates_D[first]] = True
  return best_D


def _average_precision(correct_D: np.ndarray, count: int) -> float:
  """Returns COCO's average precision, from 0 to 1, of detections in the order of their scores."""
  if not count or not len(correct_D):
    return 0.0
  found_D = np.cumsum(correct_D)
  precision_D = found_D / np.arange(1, len(correct_D) + 1)
  precision_D = np.maximum.accumulate(precision_D[::-1])[::-1]
  at = np.searchsorted(found_D / count, _RECALLS, side="left")
  return float(np.append(precision_D, 0.0)[at].mean())
