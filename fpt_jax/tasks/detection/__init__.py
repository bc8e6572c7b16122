"""Object detection, with or without masks: the functions of `tasks.task.Task`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax.data import info, transforms
from fpt_jax.data.records.instances import BITMAP
from fpt_jax.errors import UserError
from fpt_jax.models.rcnn import MASK_BLOCK
from fpt_jax.run import config_values
from fpt_jax.run.config_values import NOT_NEGATIVE, POSITIVE, SHARE
from fpt_jax.tasks.detection import batches, coco_ap, queries, tide
from fpt_jax.tasks.detection.categories import adopt_classes, label_table
from fpt_jax.tasks.detection.draw import draw_example, draw_prediction
from fpt_jax.tasks.detection.evaluation import check_evaluation, eval_program, evaluator
from fpt_jax.tasks.detection.prediction import (
  eval_images,
  predictor,
  to_entries,
  to_result,
  write_prediction,
)
from fpt_jax.tasks.detection.program import image_program
from fpt_jax.tasks.labels import model_batches

__all__ = [
  "BATCH_KEYS",
  "FROM_DATA",
  "MAIN_METRIC",
  "NOT_OF_THE_WEIGHTS",
  "QUERIES",
  "adopt_classes",
  "batch_shapes",
  "canvas",
  "check_config",
  "check_evaluation",
  "cost_notes",
  "draw_example",
  "draw_prediction",
  "eval_images",
  "eval_program",
  "evaluator",
  "forward",
  "image_program",
  "metric_names",
  "predictor",
  "to_entries",
  "to_result",
  "train_batches",
  "write_prediction",
]

BATCH_KEYS: tuple[str, ...] = (
  "image_BHWC",
  "size_B2",
  "gt_boxes_BG4",
  "gt_labels_BG",
  "gt_masks_BGmm",
  "gt_valid_BG",
)
LEVELS = 5  # of the RPN: P2 to P6
QUERIES = queries
MAIN_METRIC = "bbox/AP"
FROM_DATA: tuple[str, ...] = ("category_ids", "category_names", "num_classes")
NOT_OF_THE_WEIGHTS: tuple[str, ...] = (
  "test.",
  "rpn.test.",
  "rpn.train.",
  "rpn.min_side",
  "box_head.beta",
  "category_names",
  "backbone.masks_padding",
  "dtype",
  "fpt.implementation",
  "remat",
)
_RULES = {
  "data.short_edge": POSITIVE,
  "data.long_edge": POSITIVE,
  "data.resize": config_values.one_of(*transforms.RESIZES),
  "data.train_long_edge": NOT_NEGATIVE,
  "data.max_instances": POSITIVE,
  "data.crop": config_values.Rule(
    "(height, width), two positive numbers of pixels, or () for whole images",
    lambda size: not size or (len(size) == 2 and min(size) >= 1),
  ),
  "data.scale": config_values.FACTORS,
  "data.copy_paste": config_values.Rule("from 0 to 1", lambda value: 0 <= value <= 1),
  "model.canonical_size": config_values.ABOVE_ZERO,
  "model.rpn.anchor_sizes": config_values.Rule(
    f"{LEVELS} tuples of positive numbers of pixels, one per level",
    lambda sizes: len(sizes) == LEVELS and all(len(level) and min(level) > 0 for level in sizes),
  ),
  "model.rpn.convs": POSITIVE,
  "model.rpn.samples": POSITIVE,
  "model.rpn.train.pre_nms": POSITIVE,
  "model.rpn.train.post_nms": POSITIVE,
  "model.rpn.test.pre_nms": POSITIVE,
  "model.rpn.test.post_nms": POSITIVE,
  "model.box_head.samples": POSITIVE,
  "model.box_head.hidden": POSITIVE,
  "model.box_head.beta": config_values.ABOVE_ZERO,
  "model.box_head.convs": NOT_NEGATIVE,
  "model.mask_head.hidden": POSITIVE,
  "model.mask_head.layers": NOT_NEGATIVE,
  "model.rpn.min_side": NOT_NEGATIVE,
  "model.box_head.sampling_ratio": NOT_NEGATIVE,
  "model.mask_head.sampling_ratio": NOT_NEGATIVE,
  "model.test.score_threshold": SHARE,
  "model.test.min_side": NOT_NEGATIVE,
  "model.test.detections_per_image": POSITIVE,
  "model.test.max_candidates": POSITIVE,
  "eval.short_edges": config_values.PIXELS,
  "eval.confusion_score": SHARE,
  "eval.matcher": config_values.one_of(*coco_ap.MATCHERS),
}


def check_config(config: ConfigDict) -> None:
  """See `tasks.task.Task.check_config`."""
  config_values.check(config, _RULES)
  data = config.data
  if data.short_edge > data.long_edge:
    raise UserError(
      f"config.data.short_edge={data.short_edge} must be at most config.data.long_edge={data.long_edge}"
    )
  largest = max(tuple(data.train_sizes) or (data.short_edge,))
  if 0 < data.train_long_edge < largest:
    raise UserError(
      f"config.data.train_long_edge={data.train_long_edge} must be at least {largest}, the largest shorter "
      "edge of training images, or 0"
    )
  if tuple(data.scale) != (1, 1) and not data.crop:
    raise UserError(
      f"config.data.scale={tuple(data.scale)} needs crops; set config.data.crop, such as (1024, 1024)"
    )
  if data.crop and data.train_sizes:
    raise UserError(
      f"config.data.train_sizes={tuple(data.train_sizes)} and config.data.crop exclude each other; set "
      "config.data.scale to train at several sizes"
    )
  if (data.crop or data.copy_paste) and data.resize != "torchvision":
    raise UserError(
      f"config.data.resize={data.resize!r} has no crops and no copy-paste; set it to 'torchvision'"
    )


def metric_names(config: ConfigDict) -> tuple[str, ...]:
  """See `tasks.task.Task.metric_names`."""
  kinds = ("bbox", "segm") if config.model.mask_head.enabled else ("bbox",)
  names = [*coco_ap.METRICS, *(f"dAP-{error}" for error in (*tide.MAIN, *tide.SPECIAL))]
  return (*(f"{kind}/{name}" for kind in kinds for name in names), "context/")


def train_batches(
  config: ConfigDict, start_step: int
) -> AbstractContextManager[Iterator[dict[str, np.ndarray]]]:
  """See `tasks.task.Task.train_batches`; the arrays are those of `batches.train_batches`."""
  class_of_label = label_table(config, info(config.data))
  return model_batches(batches.train_batches, config, start_step, "gt_labels_BG", class_of_label)


def canvas(config: ConfigDict) -> tuple[int, int]:
  """See `tasks.task.Task.canvas`: the largest canvas of training images."""
  if config.data.crop:
    height, width = config.data.crop
    return height, width
  return batches.largest_canvas(batches.at_largest_train_size(config.data))


def batch_shapes(
  config: ConfigDict, images: int, canvas: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """See `tasks.task.Task.batch_shapes`."""
  most = config.data.max_instances
  shapes = {
    "image_BHWC": ((*canvas, 3), jnp.dtype(config.data.image_dtype)),
    "size_B2": ((2,), jnp.int32),
    "gt_boxes_BG4": ((most, 4), jnp.float32),
    "gt_labels_BG": ((most,), jnp.int32),
    "gt_masks_BGmm": ((most, BITMAP, BITMAP), jnp.uint8),
    "gt_valid_BG": ((most,), jnp.bool_),
  }
  return {n: jax.ShapeDtypeStruct((images, *shape), dtype) for n, (shape, dtype) in shapes.items()}


def forward(model: nnx.Module, image_BHWC: jax.Array, size_B2: jax.Array) -> dict[str, jax.Array]:
  """See `tasks.task.Task.forward`: the detections, see `models.rcnn.RCNN.detect`."""
  return model.detect(image_BHWC, size_B2)


def cost_notes(config: ConfigDict) -> dict[str, str]:
  """See `tasks.task.Task.cost_notes`."""
  model = config.model
  notes = {"box_head": f"{model.rpn.test.post_nms} regions"}
  if model.mask_head.enabled:
    masks = model.test.detections_per_image
    computed = -(-masks // MASK_BLOCK) * MASK_BLOCK  # whole blocks are computed
    notes["mask_head"] = f"{computed} regions for {masks} masks, one class per region"
  return notes
