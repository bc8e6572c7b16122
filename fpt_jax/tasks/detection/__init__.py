"""Detection of objects, with or without their masks: see `fpt_jax.tasks` for the functions' roles.

Shapes: B images of a batch, D detections, G ground truths, m side of a mask.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict, FrozenConfigDict
from pycocotools import mask as coco_mask

from fpt_jax import data
from fpt_jax.data import DatasetInfo, canvases, transforms
from fpt_jax.errors import UserError
from fpt_jax.models.heads.rpn import anchors_of_canvas, sampled_anchors
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.ops.masks import paste, paste_rle, rasterize
from fpt_jax.ops.sampling import BACKGROUND, FOREGROUND
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.metrics import Countdown
from fpt_jax.tasks import pictures
from fpt_jax.tasks.detection import coco_ap, views
from fpt_jax.tasks.detection.categories import label_table, take_categories

BATCH_KEYS = (
  "image_BHWC", "size_B2", "gt_boxes_BG4", "gt_labels_BG", "gt_masks_BGmm", "gt_valid_BG",
)  # fmt: skip
MAIN_METRIC = "bbox/AP"
RESULTS_FILE = "eval/coco_instances_results.json"
NEGATIVES_DRAWN = 12  # of the anchors that an example is drawn with
_sampled_anchors = jax.jit(sampled_anchors, static_argnums=0)


def settle(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Takes the data set's categories into a config that names none.

  Raises:
    UserError: the data set has no instances, no masks for the model's mask head, or a category that the
      model has not.
  """
  if config.model.mask_head.enabled and not dataset.has_masks:
    raise UserError(
      "the data's annotations are boxes without masks; take configs/coco_box.py or set "
      "--config.model.mask_head.enabled=False"
    )
  take_categories(config, dataset)
  label_table(config, dataset)


@contextlib.contextmanager
def train_batches(config: ConfigDict, start_step: int) -> Iterator[Iterator[dict]]:
  """This host's training batches from a step on, their labels the model's classes.

  As of `data.train_batches`, which says what is raised.
  """
  to_class = label_table(config, data.info(config.data))
  reading = data.train_batches(
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with reading as batches:
    yield (batch | {"gt_labels_BG": to_class[batch["gt_labels_BG"]]} for batch in batches)


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
  detect = views.detector(config, structure, sharding.replicated(mesh))
  split = config.data.eval_split
  ground_truth = data.coco_ground_truth(config.data, split)
  results, done = [], 0
  countdown = Countdown(split, len(ground_truth["images"]), every_seconds=30)
  batches = data.eval_batches(
    config.data,
    split,
    batch_size=config.eval.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    short_edges=views.short_edges(config),
  )
  with batches:
    for batch in batches:
      first = {k: batch[k] for k in ("image_BHWC", "size_B2")}
      views = [sharding.to_devices(v, mesh) for v in (first, *batch.get("other_views", ()))]
      detections = jax.device_get(detect(arrays, views))
      described = sharding.from_all_hosts(
        {k: batch[k] for k in ("size_B2", "original_size_B2", "image_id_B", "valid_B")}
      )
      for i in np.flatnonzero(described["valid_B"]):
        found = to_original_image(
          {name: values[i] for name, values in detections.items()},
          described["size_B2"][i],
          described["original_size_B2"][i],
          config.model,
        )
        results += coco_ap.to_coco_results(described["image_id_B"][i], **found)
      done += int(described["valid_B"].sum())
      countdown.tell(done)
  return score(config, ground_truth, results, workdir)


def score(config: ConfigDict, ground_truth: dict, results: list[dict], workdir: str) -> dict:
  """Writes the results file, logs the table, returns the figures."""
  iou_types = ("bbox", "segm") if config.model.mask_head.enabled else ("bbox",)
  metrics = coco_ap.evaluate(ground_truth, results, iou_types)
  if jax.process_index() == 0:
    path = checkpoints.folder(workdir) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    logging.info(
      "%s, %d detections in %d images:\n%s",
      *(config.data.eval_split, len(results), len(ground_truth["images"])),
      coco_ap.format_table(metrics),
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


def predictor(
  config: ConfigDict, structure: Skeleton, arrays: Arrays
) -> Callable[[np.ndarray], dict]:
  """A function from an image, uint8 RGB [H, W, 3], to its detections as `to_original_image` has them."""
  detect = views.detector(config, structure)
  sizes = [canvases.at_short_edge(config.data, s) for s in views.short_edges(config)]

  def view(image_HWC: np.ndarray, data: ConfigDict) -> views.View:
    size = transforms.resized_size(*image_HWC.shape[:2], data.short_edge, data.long_edge)
    canvas = transforms.smallest_canvas(size, data.buckets, canvases.multiple_of(data))
    image = np.asarray(transforms.resize_and_pad(image_HWC, size, canvas))
    return {"image_BHWC": image[None], "size_B2": np.array([size], np.int32)}

  def find(image_HWC: np.ndarray) -> dict:
    views = [view(image_HWC, data) for data in sizes]
    detections = jax.device_get(detect(arrays, views))
    return to_original_image(
      {name: values[0] for name, values in detections.items()},
      views[0]["size_B2"][0],
      np.array(image_HWC.shape[:2]),
      config.model,
    )

  return find


def result(found: dict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """An image's detections as `Restored.predict` gives them."""
  detections = {k: found[k] for k in ("boxes_xyxy", "scores")} | {"labels": found["category_ids"]}
  if found["rles"] is not None:
    masks = [coco_mask.decode(rle).astype(bool) for rle in found["rles"]]
    detections["masks"] = np.stack(masks) if masks else np.zeros((0, *image_HWC.shape[:2]), bool)
  return detections


def images(config: ConfigDict) -> Iterator[tuple[str, np.ndarray, list[dict]]]:
  """The images of `config.data.eval_split`: file name, uint8 RGB, annotations in COCO's format."""
  return data.images(config.data, config.data.eval_split)


def entries(config: ConfigDict, name: str, found: dict) -> list[dict]:
  """COCO results with the `file_name` of the image in place of its id."""
  del config
  return [
    {"file_name": name} | {k: v for k, v in entry.items() if k != "image_id"}
    for entry in coco_ap.to_coco_results(0, **found)
  ]


def save(config: ConfigDict, workdir: str, stem: str, name: str, found: dict) -> None:
  """Does nothing: `entries` and the picture are all there is of detections."""
  del config, workdir, stem, name, found


def draw(
  config: ConfigDict,
  image_HWC: np.ndarray,
  found: dict,
  truth: list[dict] | None,
  min_score: float,
) -> np.ndarray:
  """The image with its detections; with ground truth, that on the left and the detections right."""
  model = config.model
  names = dict(zip(model.category_ids, model.category_names, strict=False))
  shown = np.flatnonzero(found["scores"] >= min_score)
  detected = pictures.draw_detections(
    image_HWC,
    found["boxes_xyxy"][shown],
    [names.get(int(i), str(i)) for i in found["category_ids"][shown]],
    found["scores"][shown],
    masks=None if found["rles"] is None else [found["rles"][i] for i in shown],
  )
  if truth is None:
    return detected
  xywh = np.array([a["bbox"] for a in truth], np.float64).reshape(-1, 4)
  true = pictures.draw_detections(
    image_HWC,
    np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
    [names.get(a["category_id"], str(a["category_id"])) for a in truth],
    masks=[rasterize(a["segmentation"], *image_HWC.shape[:2]) for a in truth],
  )
  return pictures.contact_sheet([true, detected], columns=2, titles=["ground truth", "detected"])


def draw_example(config: ConfigDict, batch: dict[str, np.ndarray], step: int, i: int) -> np.ndarray:
  """A training image as it is fed: its objects, and a sample of anchors as the RPN trains on them.

  Anchors in an object's colour are trained to be its box, grey ones, of which a few are drawn, to be
  background.

  Args:
    config: of the run.
    batch: see `train_batches`.
    step: whose batch it is; seeds the sample.
    i: which image.
  """
  image_HWC = np.clip(np.round(batch["image_BHWC"][i]), 0, 255).astype(np.uint8)
  canvas = image_HWC.shape[:2]
  boxes_G4, valid_G = batch["gt_boxes_BG4"][i], batch["gt_valid_BG"][i]
  true_G4 = boxes_G4[valid_G]
  bitmaps_Gmm = batch["gt_masks_BGmm"][i][valid_G].astype(np.float32)
  names = [config.model.category_names[k - 1] for k in batch["gt_labels_BG"][i][valid_G]]
  objects = pictures.draw_detections(
    image_HWC, true_G4, names, masks=list(paste(bitmaps_Gmm, true_G4, *canvas, aligned=True) >= 0.5)
  )
  rpn = config.model.rpn
  anchors_A4 = anchors_of_canvas(rpn, canvas)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), i)
  sample = _sampled_anchors(FrozenConfigDict(rpn), anchors_A4, boxes_G4, valid_G, key)
  matched_A, labels_A, selected_A = map(np.asarray, sample)
  positive_A = selected_A & (labels_A == FOREGROUND)
  negatives = np.flatnonzero(selected_A & (labels_A == BACKGROUND))
  # of the padded ground truths, positions among the valid ones
  place_G = np.cumsum(valid_G) - 1
  sampled = pictures.draw_anchors(
    image_HWC,
    true_G4,
    names,
    anchors_A4[positive_A],
    place_G[matched_A[positive_A]],
    anchors_A4[negatives[:: max(1, len(negatives) // NEGATIVES_DRAWN)]],
  )
  titles = [
    "objects",
    f"anchors: {positive_A.sum()} of objects, {(selected_A & ~positive_A).sum()} not",
  ]
  return pictures.contact_sheet([objects, sampled], columns=2, titles=titles)
