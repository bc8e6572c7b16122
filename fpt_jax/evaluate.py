"""A split and a model's numbers in, COCO's figures out.

Shapes: B images of a batch, D detections, m side of a mask.
"""

import json
import time

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fpt_jax import checkpoints, data, sharding
from fpt_jax.metrics import coco
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.ops.masks import paste_rle

RESULTS_FILE = "eval/coco_instances_results.json"
_TELL_EVERY_SECONDS = 30


def evaluate(
  config: ConfigDict,
  structure: Skeleton,
  arrays: Arrays,
  mesh: jax.sharding.Mesh,
  workdir: str,
) -> dict[str, float]:
  """Detects in every image of `config.data.eval_split` and scores the result with pycocotools.

  Writes `eval/coco_instances_results.json` into the run's folder.

  Args:
    config: of the run.
    structure: of the model.
    arrays: the model's numbers, on `mesh`.
    mesh: whose devices share each batch.
    workdir: the run's folder.

  Returns:
    "bbox/AP", "segm/AP50", ..., x100; the same on every host.
  """
  detect = jax.jit(
    lambda arrays, image, size: structure.fill(arrays).detect(image, size),
    out_shardings=sharding.replicated(mesh),
  )
  split = config.data.eval_split
  ground_truth = data.coco_ground_truth(config.data, split)
  results, done = [], 0
  begun = told = time.monotonic()
  batches = data.eval_batches(
    config.data,
    split,
    batch_size=config.eval.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with batches:
    for batch in batches:
      images = sharding.to_devices({k: batch[k] for k in ("image_BHWC", "size_B2")}, mesh)
      detections = jax.device_get(detect(arrays, images["image_BHWC"], images["size_B2"]))
      described = from_all_hosts(
        {k: batch[k] for k in ("size_B2", "original_size_B2", "image_id_B", "valid_B")}
      )
      for i in np.flatnonzero(described["valid_B"]):
        found = to_original_image(
          {name: values[i] for name, values in detections.items()},
          described["size_B2"][i],
          described["original_size_B2"][i],
          config.model,
        )
        results += coco.to_coco_results(described["image_id_B"][i], **found)
      done += int(described["valid_B"].sum())
      if time.monotonic() - told > _TELL_EVERY_SECONDS:
        told = time.monotonic()
        total = len(ground_truth["images"])
        left = round((told - begun) / done * (total - done))
        logging.info("%s: %d of %d images, %d:%02d left", split, done, total, *divmod(left, 60))
  return score(config, ground_truth, results, workdir)


def score(config: ConfigDict, ground_truth: dict, results: list[dict], workdir: str) -> dict:
  """Writes the results file, logs the table, returns the figures."""
  iou_types = ("bbox", "segm") if config.model.mask_head.enabled else ("bbox",)
  metrics = coco.evaluate(ground_truth, results, iou_types)
  if jax.process_index() == 0:
    path = checkpoints.folder(workdir) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    logging.info(
      "%s, %d detections in %d images:\n%s",
      *(config.data.eval_split, len(results), len(ground_truth["images"])),
      coco.format_table(metrics),
    )
  return metrics


def to_original_image(
  detections: dict[str, np.ndarray],
  size_2: np.ndarray,
  original_size_2: np.ndarray,
  model: ConfigDict,
) -> dict:
  """One image's detections in pixels of its file and in the data set's own categories.

  Args:
    detections: boxes_BD4, scores_BD, labels_BD, valid_BD and perhaps masks_BDmm of this image.
    size_2: (height, width) of the image on the canvas.
    original_size_2: (height, width) of its file.
    model: the config's `model`: its `category_ids` and how it was taught to cut masks, `aligned`.

  Returns:
    boxes_xyxy [D, 4] float32, scores [D], category_ids [D] int and rles, a mask of the image's size a
    detection, or None without masks.
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


def from_all_hosts(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The hosts' parts of a global batch, put together in order."""
  if jax.process_count() == 1:
    return values
  # 64-bit ids travel as pairs of 32 bits: JAX would cut them
  ids_B2 = np.ascontiguousarray(values["image_id_B"]).view(np.int32).reshape(-1, 2)
  gathered = multihost_utils.process_allgather(values | {"image_id_B": ids_B2}, tiled=True)
  gathered["image_id_B"] = np.ascontiguousarray(gathered["image_id_B"]).view(np.int64)[:, 0]
  return gathered
