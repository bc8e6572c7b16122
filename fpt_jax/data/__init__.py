"""Data sets: prepared once as records, read as batches."""

from fpt_jax.data.batches import Batches
from fpt_jax.data.pipeline import coco_ground_truth, eval_batches, images, train_batches
from fpt_jax.data.prepared import DatasetInfo, info, is_prepared, prepare

__all__ = [
  "Batches",
  "DatasetInfo",
  "coco_ground_truth",
  "eval_batches",
  "images",
  "info",
  "is_prepared",
  "prepare",
  "train_batches",
]
