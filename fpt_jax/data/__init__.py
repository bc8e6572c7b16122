"""Data sets: prepared once as records, read as batches."""

from fpt_jax.data.pipeline import (
  Batches,
  DatasetInfo,
  coco_ground_truth,
  eval_batches,
  images,
  info,
  is_prepared,
  prepare,
  train_batches,
)

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
