"""Objects whose attention is explained: detections, and satellites whose beacon is known.

Shapes: N objects.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fpt_jax.ops.masks import rasterize
from fpt_jax.ops.roi_align import assign_levels
from fpt_jax.tasks.detection.context_accuracy import ACROSS
from fpt_jax.tasks.detection.prediction import view_at
from fpt_jax.tasks.detection.views import short_edges
from fpt_jax.tasks.queries import Query, Question

MOST_QUERIES = 4
STRIDES = (4, 8, 16, 32)  # of P2 to P5, from which objects are pooled


def view(config: ConfigDict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """See `Queries.view`: the view that the boxes refer to."""
  return view_at(config, image_HWC, short_edges(config)[0])


def queries(
  config: ConfigDict, image_HWC: np.ndarray, found: dict, size: Sequence[int], min_score: float
) -> list[Query]:
  """See `Queries.queries`: the best detection of each category, the smallest objects first."""
  best: dict[int, int] = {}
  for i in np.argsort(-found["scores"], kind="stable"):
    if found["scores"][i] >= min_score:
      best.setdefault(int(found["category_ids"][i]), int(i))
  boxes_N4 = found["boxes_xyxy"]
  chosen = sorted(best.values(), key=lambda i: np.prod(boxes_N4[i, 2:] - boxes_N4[i, :2]))
  names = dict(zip(config.model.category_ids, config.model.category_names, strict=False))
  ratio = size[0] / image_HWC.shape[0]
  result = []
  for i in chosen[:MOST_QUERIES]:
    category = int(found["category_ids"][i])
    name = f"{names.get(category, category)} {100 * found['scores'][i]:.0f}%"
    result.append(query_of(config, name, boxes_N4[i], ratio))
  return result


def questions(
  config: ConfigDict, image_HWC: np.ndarray, truth: list[dict[str, Any]], size: Sequence[int]
) -> list[Question]:
  """See `Queries.questions`: annotations with a question across positions, see `context_accuracy`.

  The answer is in the objects that ask no question and are not crowds: the beacon of Context Shapes.
  """
  asked = [a for a in truth if a.get("question") in ACROSS and not a["iscrowd"]]
  if not asked:
    return []
  height, width = image_HWC.shape[:2]
  answer_HW = np.zeros((height, width), bool)
  for a in truth:
    if not a.get("question") and not a["iscrowd"]:
      answer_HW |= rasterize(a["segmentation"], height, width)
  ratio = size[0] / height
  found = []
  for a in asked:
    x, y, w, h = a["bbox"]
    box = np.array([x, y, x + w, y + h])
    found.append(Question(query_of(config, a["question"], box, ratio), answer_HW))
  return found


def query_of(config: ConfigDict, name: str, box_4: np.ndarray, ratio: float) -> Query:
  """Returns the centre of a box, (x0, y0, x1, y1) in pixels, with the level that it is pooled from.

  Args:
    config: config of the run.
    name: what is in the box.
    box_4: the box in pixels of the image.
    ratio: size of the image on the canvas, relative to the image's.
  """
  x0, y0, x1, y1 = map(float, box_4)
  boxes_14 = np.array([box_4]) * ratio
  (level,) = assign_levels(boxes_14, STRIDES, config.model.canonical_size).tolist()
  return Query(name, (x0 + x1) / 2, (y0 + y1) / 2, (x0, y0, x1, y1), level)


def level_name(level: int) -> str:
  """See `Queries.level_name`: P2 to P5."""
  return f"P{level + 2}"
