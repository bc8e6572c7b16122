"""Positions whose attention is explained: one inside each of the largest predicted classes.

Shapes: H W rows and columns of an image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from ml_collections import ConfigDict

from fpt_jax.tasks.queries import Query, Question
from fpt_jax.tasks.segmentation.prediction import on_canvas
from fpt_jax.tasks.segmentation.views import at_scale, rounding

MOST_QUERIES = 2


def view(config: ConfigDict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """See `Queries.view`: the whole image at the first of `config.eval.scales`."""
  image_BHWC, size_B2 = at_scale(
    *on_canvas(config, image_HWC), config.eval.scales[0], **rounding(config)
  )
  return {"image_BHWC": image_BHWC, "size_B2": size_B2}


def queries(
  config: ConfigDict, image_HWC: np.ndarray, found: dict, size: Sequence[int], min_score: float
) -> list[Query]:
  """See `Queries.queries`: the pixel farthest from the border of each of the largest classes."""
  del image_HWC, size, min_score
  label_HW = found["label_map"]
  classes, pixels = np.unique(label_HW, return_counts=True)
  chosen = []
  for k in classes[np.argsort(-pixels, kind="stable")][:MOST_QUERIES]:
    depth_HW = scipy.ndimage.distance_transform_edt(np.pad(label_HW == k, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth_HW), depth_HW.shape)
    chosen.append(Query(config.model.class_names[k], x + 0.5, y + 0.5))
  return chosen


def questions(
  config: ConfigDict, image_HWC: np.ndarray, truth: Any, size: Sequence[int]
) -> list[Question]:
  """See `Queries.questions`: label maps ask none."""
  del config, image_HWC, truth, size
  return []


def level_name(level: int) -> str:
  """See `Queries.level_name`: levels of all pyramids are counted from 0, as in metrics.jsonl."""
  return f"level {level}"
