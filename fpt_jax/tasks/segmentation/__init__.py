"""Semantic segmentation, a class for every pixel: the functions of `tasks.task.Task`."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax.run import config_values
from fpt_jax.run.config_values import POSITIVE, SHARE
from fpt_jax.tasks.segmentation.batches import model_batches as train_batches
from fpt_jax.tasks.segmentation.classes import adopt_classes
from fpt_jax.tasks.segmentation.draw import draw_example, draw_prediction
from fpt_jax.tasks.segmentation.evaluation import evaluate
from fpt_jax.tasks.segmentation.prediction import (
  eval_images,
  predictor,
  to_entries,
  to_result,
  write_prediction,
)

__all__ = [
  "BATCH_KEYS",
  "FROM_DATA",
  "MAIN_METRIC",
  "NOT_OF_THE_WEIGHTS",
  "adopt_classes",
  "batch_shapes",
  "canvas",
  "check_config",
  "cost_notes",
  "draw_example",
  "draw_prediction",
  "eval_images",
  "evaluate",
  "forward",
  "predictor",
  "to_entries",
  "to_result",
  "train_batches",
  "write_prediction",
]

BATCH_KEYS: tuple[str, ...] = ("image_BHWC", "label_BHW", "size_B2")
MAIN_METRIC = "mIoU"
FROM_DATA: tuple[str, ...] = ("class_names", "num_classes", "palette", "swaps")
NOT_OF_THE_WEIGHTS: tuple[str, ...] = ("palette", "swaps", "dtype", "fpt.implementation")
_SIZE = config_values.Rule(
  "(height, width), two positive numbers of pixels",
  lambda size: len(size) == 2 and min(size) >= 1,
)
_RULES = {
  "data.crop": _SIZE,
  "data.scale": config_values.Rule(
    "(low, high), two positive factors, the smaller one first",
    lambda scale: len(scale) == 2 and 0 < scale[0] <= scale[1],
  ),
  "model.backbone.output_stride": POSITIVE,
  "model.head.hidden": POSITIVE,
  "model.head.dropout": SHARE,
  "model.auxiliary.weight": config_values.NOT_NEGATIVE,
  "model.auxiliary.hidden": POSITIVE,
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


def canvas(config: ConfigDict) -> tuple[int, int]:
  """See `tasks.task.Task.canvas`: the size of a training crop."""
  height, width = config.data.crop
  return height, width


def batch_shapes(
  config: ConfigDict, images: int, canvas: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """See `tasks.task.Task.batch_shapes`."""
  del config
  return {
    "image_BHWC": jax.ShapeDtypeStruct((images, *canvas, 3), jnp.float32),
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
