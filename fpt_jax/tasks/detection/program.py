"""A detector as one function of an image, see `tasks.program`.

Shapes: B images, D detections, m side of a mask; N and M detections of two sets.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from pycocotools import mask as coco_mask

from fpt_jax.data import canvases
from fpt_jax.errors import UserError
from fpt_jax.models.state import Skeleton
from fpt_jax.ops.masks import paste_rle
from fpt_jax.tasks import program
from fpt_jax.tasks.detection import views

MATCH_IOU = 0.95
MATCH_SCORE = 1e-2


def image_program(
  config: ConfigDict, structure: Skeleton, canvas: tuple[int, int] | None
) -> program.ImageProgram:
  """See `tasks.task.Task.image_program`.

  The program returns boxes_xyxy [B, D, 4] float32 in pixels of the images, scores [B, D] float32 in
  descending order, labels [B, D] int32, the data set's category ids, valid [B, D] bool and, with a mask head,
  masks [B, D, m, m] float32, probabilities relative to the boxes. Entries that are not valid are no
  detections; they are filled with zeros.
  """
  data, model = config.data, config.model
  if data.resize != "torchvision":
    raise UserError(
      f"config.data.resize={data.resize!r} cannot be exported; set --config.data.resize=torchvision, or "
      "resize images before the exported program"
    )
  if views.short_edges(config) != (data.short_edge,):
    raise UserError(
      f"config.eval.short_edges={tuple(config.eval.short_edges)}: an exported program has images at one "
      "size, config.data.short_edge; set --config.eval.short_edges='()'"
    )
  chosen = program.chosen_canvas(data, canvas, multiple=canvases.multiple_of(data))
  detect = views.detector(config, structure)
  resize = program.Resize(data.short_edge, data.long_edge)
  category_ids = np.array(model.category_ids, np.int32)

  def run(arrays, image_BHWC):
    old_2 = program.size_of(image_BHWC)
    size_2 = resize(old_2)
    view = {
      "image_BHWC": program.on_canvas(image_BHWC, size_2, chosen),
      "size_B2": program.repeated(size_2, image_BHWC.shape[0]),
    }
    found = detect(arrays, [view])
    ratio_2 = old_2.astype(jnp.float32) / size_2.astype(jnp.float32)
    result = {
      "boxes_xyxy": found["boxes_BD4"] * jnp.tile(ratio_2[::-1], 2)[None, None],
      "scores": found["scores_BD"],
      "labels": jnp.asarray(category_ids)[found["labels_BD"] - 1],
    }
    if "masks_BDmm" in found:
      result["masks"] = found["masks_BDmm"]
    valid_BD = found["valid_BD"]
    shown = {
      name: jnp.where(jnp.expand_dims(valid_BD, range(2, values.ndim)), values, 0)
      for name, values in result.items()
    }
    return shown | {"valid": valid_BD}

  def difference(outputs, image_HWC, expected):
    found = _to_result(outputs, image_HWC, aligned=model.aligned)
    return _difference(found, image_HWC, expected)

  def mismatch(outputs, image_HWC, expected):
    found = _to_result(outputs, image_HWC, aligned=model.aligned)
    return unmatched_share(found, expected, model.test)

  return program.ImageProgram(
    run,
    chosen,
    program.limits_of_sizes(chosen, data.short_edge, data.long_edge),
    {
      "category_ids": [int(i) for i in model.category_ids],
      "category_names": list(model.category_names),
      "aligned": bool(model.aligned),
    },
    difference,
    mismatch,
  )


def _to_result(
  outputs: dict[str, np.ndarray], image_HWC: np.ndarray, *, aligned: bool
) -> dict[str, np.ndarray]:
  """Converts what the program returns to the form of `Restored.predict`."""
  valid_D = outputs["valid"]
  result = {name: outputs[name][valid_D] for name in ("boxes_xyxy", "scores", "labels")}
  if "masks" in outputs:
    height, width = image_HWC.shape[:2]
    result["masks"] = np.zeros((int(valid_D.sum()), height, width), bool)
    for i, (mask, box) in enumerate(
      zip(outputs["masks"][valid_D], result["boxes_xyxy"], strict=True)
    ):
      rle = paste_rle(mask, box, height, width, aligned=aligned)
      result["masks"][i] = coco_mask.decode(rle)
  return result


def _difference(
  found: dict[str, np.ndarray], image_HWC: np.ndarray, expected: dict[str, np.ndarray]
) -> float:
  """Returns the largest difference between detections and the most similar ones of the other set.

  Of two detections of one category it is the largest of the difference of their scores, of their boxes as a
  share of the image's longer edge, and of the share of the image in which their masks differ. Without
  another one of its category, it is 1 for a detection.
  """
  if not len(found["scores"]) or not len(expected["scores"]):
    return float(len(found["scores"]) != len(expected["scores"]))
  boxes = np.abs(found["boxes_xyxy"][:, None] - expected["boxes_xyxy"][None]).max(axis=-1)
  cost = np.maximum(
    boxes / max(image_HWC.shape[:2]),
    np.abs(found["scores"][:, None] - expected["scores"][None]),
  )
  cost = np.where(found["labels"][:, None] == expected["labels"][None], cost, 1.0)
  worst = [0.0]
  for costs, one, other in ((cost, found, expected), (cost.T, expected, found)):
    for i, j in enumerate(np.argmin(costs, axis=1)):
      worst.append(float(costs[i, j]))
      if "masks" in one:
        worst.append(float((one["masks"][i] != other["masks"][j]).mean()))
  return float(np.max(worst))


def unmatched_share(
  found: dict[str, np.ndarray], expected: dict[str, np.ndarray], test: ConfigDict
) -> float:
  """Returns the share of detections without a match in the other set.

  A match has the same category, a score that differs by at most `MATCH_SCORE`, a box whose IoU is at least
  `MATCH_IOU`, and a mask that differs in at most 1 - `MATCH_IOU` of the box. Detections whose score is not
  `MATCH_SCORE` above the lowest that the other set keeps are not counted: it may have another one in their
  place.

  Args:
    found, expected: detections as of `Restored.predict`.
    test: the config's `model.test`.
  """
  unmatched = counted = 0
  for one, other in ((found, expected), (expected, found)):
    is_full = len(other["scores"]) == test.detections_per_image
    lowest = other["scores"].min() if is_full else test.score_threshold
    counts_N = one["scores"] > lowest + MATCH_SCORE
    unmatched += int((counts_N & ~_matches(one, other).any(axis=1)).sum())
    counted += int(counts_N.sum())
  return unmatched / max(counted, 1)


def _matches(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> np.ndarray:
  """Returns bool [N, M]: which detections of two sets match, see `unmatched_share`."""
  if not len(one["scores"]) or not len(other["scores"]):
    return np.zeros((len(one["scores"]), len(other["scores"])), bool)
  near_NM = np.abs(one["scores"][:, None] - other["scores"][None]) <= MATCH_SCORE
  same_NM = one["labels"][:, None] == other["labels"][None]
  xywh = (
    np.float64(np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]))
    for b in (one["boxes_xyxy"], other["boxes_xyxy"])
  )
  matches_NM = near_NM & same_NM & (coco_mask.iou(*xywh, [0] * len(other["scores"])) >= MATCH_IOU)
  if "masks" in one:
    for i, j in np.argwhere(matches_NM):
      left, top, right, bottom = one["boxes_xyxy"][i]
      differing = (one["masks"][i] != other["masks"][j]).sum()
      matches_NM[i, j] = differing <= (1 - MATCH_IOU) * (right - left) * (bottom - top)
  return matches_NM
