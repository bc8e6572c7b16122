"""The confusion matrix of boxes: which categories a detector takes for which, or for background.

Shapes: D detections, G ground truths, X crowds, K categories, then background.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fpt_jax.tasks.detection import coco_ap

MIN_IOU = 0.5


def count(
  images: Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
  category_ids: Sequence[int],
  min_score: float,
) -> np.ndarray:
  """Counts objects by their true and predicted category.

  In the order of the scores, each detection takes the object of any category with the highest IoU, at least
  0.5, among those that are left. An object that none takes is predicted as background. A detection that
  takes none is background that is predicted as an object, unless a crowd of its category covers half of it.

  Args:
    images: annotations and detections of each image, see `coco_ap.images_of`.
    category_ids: id of category 0, 1, ...
    min_score: detections with a lower score are left out.

  Returns:
    int64 [K + 1, K + 1], true by predicted category; the last row and column are background.
  """
  index = {category: k for k, category in enumerate(category_ids)}
  background = len(index)
  counts_TP = np.zeros((background + 1,) * 2, np.int64)
  for annotations, detections in images:
    kept = [d for d in detections if d["score"] >= min_score]
    kept = sorted(kept, key=lambda d: -d["score"])
    objects = [a for a in annotations if not a["iscrowd"]]
    crowds = [a for a in annotations if a["iscrowd"]]
    iou_DG = coco_ap.iou(kept, objects, "bbox")
    in_crowd_DX = coco_ap.iou(kept, crowds, "bbox") >= MIN_IOU
    free_G = np.ones(len(objects), bool)
    for d, detection in enumerate(kept):
      predicted = index[detection["category_id"]]
      iou_G = iou_DG[d] * free_G
      if len(objects) and iou_G.max() >= MIN_IOU:
        g = int(iou_G.argmax())
        free_G[g] = False
        counts_TP[index[objects[g]["category_id"]], predicted] += 1
      elif not any(
        crowds[x]["category_id"] == detection["category_id"] for x in np.flatnonzero(in_crowd_DX[d])
      ):
        counts_TP[background, predicted] += 1
    for missed in np.flatnonzero(free_G):
      counts_TP[index[objects[missed]["category_id"]], background] += 1
  return counts_TP
