"""A detector as one function of an image, see `tasks.program`.

Shapes: D detections, m side of a mask.
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


def image_program(
  config: ConfigDict, structure: Skeleton, canvas: tuple[int, int] | None
) -> program.ImageProgram:
  """See `tasks.task.Task.image_program`.

  The program returns boxes_xyxy [D, 4] float32 in pixels of the image, scores [D] float32 in descending
  order, labels [D] int32, the data set's category ids, valid [D] bool and, with a mask head, masks
  [D, m, m] float32, probabilities relative to the boxes. Entries that are not valid are no detections; they
  are filled with zeros.
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

  def run(arrays, image_HWC):
    old_2 = program.size_of(image_HWC)
    size_2 = resize(old_2)
    view = {
      "image_BHWC": program.on_canvas(image_HWC, size_2, chosen),
      "size_B2": size_2[None],
    }
    found = {name: values[0] for name, values in detect(arrays, [view]).items()}
    ratio_2 = old_2.astype(jnp.float32) / size_2.astype(jnp.float32)
    result = {
      "boxes_xyxy": found["boxes_BD4"] * jnp.tile(ratio_2[::-1], 2)[None],
      "scores": found["scores_BD"],
      "labels": jnp.asarray(category_ids)[found["labels_BD"] - 1],
    }
    if "masks_BDmm" in found:
      result["masks"] = found["masks_BDmm"]
    valid_D = found["valid_BD"]
    shown = {
      name: jnp.where(jnp.expand_dims(valid_D, range(1, values.ndim)), values, 0)
      for name, values in result.items()
    }
    return shown | {"valid": valid_D}

  def difference(outputs, image_HWC, expected, min_score):
    return _difference(
      _to_result(outputs, image_HWC, aligned=model.aligned), image_HWC, expected, min_score
    )

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
  found: dict[str, np.ndarray],
  image_HWC: np.ndarray,
  expected: dict[str, np.ndarray],
  min_score: float,
) -> float:
  """Returns the largest difference between detections and the most similar ones of the other set.

  Of two detections of one category it is the largest of the difference of their scores, of their boxes as a
  share of the image's longer edge, and of the share of the image in which their masks differ. Without
  another one of its category, it is 1 for a detection.
  """
  if not len(found["scores"]) or not len(expected["scores"]):
    others = np.concatenate([found["scores"], expected["scores"]])
    return float((others >= min_score).any())
  boxes = np.abs(found["boxes_xyxy"][:, None] - expected["boxes_xyxy"][None]).max(axis=-1)
  cost = np.maximum(
    boxes / max(image_HWC.shape[:2]),
    np.abs(found["scores"][:, None] - expected["scores"][None]),
  )
  cost = np.where(found["labels"][:, None] == expected["labels"][None], cost, 1.0)
  worst = [0.0]
  for costs, one, other in ((cost, found, expected), (cost.T, expected, found)):
    for i in np.flatnonzero(one["scores"] >= min_score):
      j = np.argmin(costs[i])
      worst.append(float(costs[i, j]))
      if "masks" in one:
        worst.append(float((one["masks"][i] != other["masks"][j]).mean()))
  return max(worst)
