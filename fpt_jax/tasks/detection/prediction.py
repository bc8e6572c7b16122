"""Detections in single images, in pixels of the image file and with the data set's categories.

Shapes: D detections, m side of a mask.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from pycocotools import mask as coco_mask

from fpt_jax.data import canvases, info, transforms
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.ops.masks import paste_rle
from fpt_jax.tasks.detection import coco_ap, ground_truth, views
from fpt_jax.tasks.detection.categories import model_category_of


def to_original_image(
  detections: dict[str, np.ndarray],
  size_2: np.ndarray,
  original_size_2: np.ndarray,
  model: ConfigDict,
) -> dict:
  """Converts one image's detections to pixels of its file and the data set's category ids.

  Args:
    detections: boxes_BD4, scores_BD, labels_BD, valid_BD and, with a mask head, masks_BDmm of this image.
    size_2: (height, width) of the image on the canvas.
    original_size_2: (height, width) of its file.
    model: the config's `model`, for its `category_ids` and `aligned`.

  Returns:
    boxes_xyxy [D, 4] float32, scores [D], category_ids [D] int and rles: one mask of the image's size
    per detection, or None without masks.
  """
  valid = detections["valid_BD"]
  height, width = map(int, original_size_2)
  ratio_y, ratio_x = (np.asarray(original_size_2) / np.asarray(size_2)).astype(np.float32)
  boxes = detections["boxes_BD4"][valid] * np.array([[ratio_x, ratio_y] * 2], np.float32)
  rles = None
  if "masks_BDmm" in detections:
    masks = detections["masks_BDmm"][valid]
    rles = [
      paste_rle(mask, box, height, width, aligned=model.aligned)
      for mask, box in zip(masks, boxes, strict=True)
    ]
  return {
    "boxes_xyxy": boxes,
    "scores": detections["scores_BD"][valid],
    "category_ids": np.array(model.category_ids, np.int64)[detections["labels_BD"][valid] - 1],
    "rles": rles,
  }


def predictor(
  config: ConfigDict, structure: Skeleton, arrays: Arrays
) -> Callable[[np.ndarray], dict]:
  """Returns a function from an image, uint8 RGB [H, W, 3], to the result of `to_original_image`."""
  detect = views.detector(config, structure)

  def predict(image_HWC: np.ndarray) -> dict:
    seen = [view_at(config, image_HWC, edge) for edge in views.short_edges(config)]
    detections = jax.device_get(detect(arrays, seen))
    return to_original_image(
      {name: values[0] for name, values in detections.items()},
      seen[0]["size_B2"][0],
      np.array(image_HWC.shape[:2]),
      config.model,
    )

  return predict


def view_at(config: ConfigDict, image_HWC: np.ndarray, short_edge: int) -> dict[str, np.ndarray]:
  """Returns an image, uint8 RGB, on a canvas of a view's size: image_BHWC and size_B2, see `views`."""
  data = canvases.at_short_edge(config.data, short_edge)
  size = canvases.resized_size(data, *image_HWC.shape[:2])
  canvas = canvases.of_prediction(data, size)
  image = transforms.on_canvas(image_HWC, size, canvas, data.resize)
  return {"image_BHWC": image[None], "size_B2": np.array([size], np.int32)}


def to_result(found: dict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """See `tasks.task.Task.to_result`: boxes_xyxy, scores, labels and, with a mask head, masks."""
  detections = {k: found[k] for k in ("boxes_xyxy", "scores")} | {"labels": found["category_ids"]}
  if found["rles"] is not None:
    masks = [coco_mask.decode(rle).astype(bool) for rle in found["rles"]]
    detections["masks"] = np.stack(masks) if masks else np.zeros((0, *image_HWC.shape[:2]), bool)
  return detections


def eval_images(config: ConfigDict) -> Iterator[tuple[str, np.ndarray, list[dict]]]:
  """See `tasks.task.Task.eval_images`: annotations in COCO's format, with the model's category ids."""
  category = model_category_of(config, info(config.data))
  for name, image_HWC, annotations in ground_truth.images(config.data, config.data.eval_split):
    truth = [a | {"category_id": category[a["category_id"]]} for a in annotations]
    yield name, image_HWC, truth


def to_entries(config: ConfigDict, name: str, found: dict) -> list[dict]:
  """See `tasks.task.Task.to_entries`: COCO results with `file_name` instead of `image_id`."""
  del config
  return [
    {"file_name": name} | {k: v for k, v in entry.items() if k != "image_id"}
    for entry in coco_ap.to_coco_results(0, **found)
  ]


def write_prediction(config: ConfigDict, workdir: str, stem: str, name: str, found: dict) -> None:
  """See `tasks.task.Task.write_prediction`: detections need no other files."""
  del config, workdir, stem, name, found
