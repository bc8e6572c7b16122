"""Semantic segmentation, a class for every pixel: the functions of `tasks.task.Task`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax.data import info
from fpt_jax.run import config_values
from fpt_jax.run.config_values import POSITIVE, SHARE
from fpt_jax.tasks.labels import model_batches
from fpt_jax.tasks.segmentation import batches, queries
from fpt_jax.tasks.segmentation.classes import adopt_classes, class_table
from fpt_jax.tasks.segmentation.draw import draw_example, draw_prediction
from fpt_jax.tasks.segmentation.evaluation import check_evaluation, eval_program, evaluator
from fpt_jax.tasks.segmentation.prediction import (
  eval_images,
  predictor,
  to_entries,
  to_result,
  write_prediction,
)
from fpt_jax.tasks.segmentation.program import image_program

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

BATCH_KEYS: tuple[str, ...] = ("image_BHWC", "label_BHW", "size_B2")
QUERIES = queries
MAIN_METRIC = "mIoU"
FROM_DATA: tuple[str, ...] = ("class_names", "num_classes", "palette", "swaps")
NOT_OF_THE_WEIGHTS: tuple[str, ...] = (
  "palette",
  "swaps",
  "backbone.masks_padding",
  "hard_pixels",
  "hard_probability",
  "edges.",
  "dtype",
  "fpt.implementation",
  "remat",
)
_SIZE = config_values.Rule(
  "(height, width), two positive numbers of pixels",
  lambda size: len(size) == 2 and min(size) >= 1,
)
_RULES = {
  "data.crop": _SIZE,
  "data.scale": config_values.FACTORS,
  "model.backbone.output_stride": POSITIVE,
  "model.hard_pixels": config_values.NOT_NEGATIVE,
  "model.hard_probability": SHARE,
  "model.head.hidden": POSITIVE,
  "model.head.dropout": SHARE,
  "model.auxiliary.weight": config_values.NOT_NEGATIVE,
  "model.auxiliary.hidden": POSITIVE,
  "model.edges.radius": POSITIVE,
  "model.edges.weight": config_values.NOT_NEGATIVE,
  "model.edges.class_weight": config_values.NOT_NEGATIVE,
  "model.edges.threshold": SHARE,
  "model.edges.gradient_weight": config_values.NOT_NEGATIVE,
  "model.edges.temperature": config_values.ABOVE_ZERO,
  "eval.window": config_values.Rule(
    "(height, width), two positive numbers of pixels, or () for the whole image",
    lambda size: not size or (len(size) == 2 and min(size) >= 1),
  ),
  "eval.overlap": SHARE,
  "eval.scales": config_values.Rule(
    "positive factors, such as (1.0,)", lambda scales: len(scales) >= 1 and min(scales) > 0
  ),
}


def check_config(config: ConfigDict) -> None:
  """See `tasks.task.Task.check_config`."""
  config_values.check(config, _RULES)


def metric_names(config: ConfigDict) -> tuple[str, ...]:
  """See `tasks.task.Task.metric_names`."""
  del config
  return "mIoU", "mAcc", "aAcc", "IoU/"


def train_batches(
  config: ConfigDict, start_step: int
) -> AbstractContextManager[Iterator[dict[str, np.ndarray]]]:
  """See `tasks.task.Task.train_batches`; the arrays are those of `batches.train_batches`."""
  class_of_label = class_table(config, info(config.data)).astype(np.int32)
  return model_batches(batches.train_batches, config, start_step, "label_BHW", class_of_label)


def canvas(config: ConfigDict) -> tuple[int, int]:
  """See `tasks.task.Task.canvas`: the size of a training crop."""
  height, width = config.data.crop
  return height, width


def batch_shapes(
  config: ConfigDict, images: int, canvas: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """See `tasks.task.Task.batch_shapes`."""
  dtype = jnp.dtype(config.data.image_dtype)
  return {
    "image_BHWC": jax.ShapeDtypeStruct((images, *canvas, 3), dtype),
    "label_BHW": jax.ShapeDtypeStruct((images, *canvas), jnp.int32),
    "size_B2": jax.ShapeDtypeStruct((images, 2), jnp.int32),
  }


def forward(model: nnx.Module, image_BHWC: jax.Array, size_B2: jax.Array) -> jax.Array:
  """See `tasks.task.Task.forward`: the logits, see `models.segmenter.Segmenter.logits`."""
  return model.logits(image_BHWC, size_B2)


def cost_notes(config: ConfigDict) -> dict[str, str]:
  """See `tasks.task.Task.cost_notes`: every module runs once."""
  del config
  return {}
