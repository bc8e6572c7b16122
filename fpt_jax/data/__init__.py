"""Data sets: prepared once as records, read as batches.

The functions here are detection's; `segmentation` has those of the same names for label maps.
`prepare`, `is_prepared` and `info` serve both.
"""

from fpt_jax.data.loader import Batches
from fpt_jax.data.prepared import DatasetInfo, info, is_prepared, num_images, prepare
from fpt_jax.data.records.label_map import VOID
from fpt_jax.tasks.detection.batches import coco_ground_truth, eval_batches, images, train_batches
from fpt_jax.tasks.segmentation import batches

__all__ = [
  "VOID",
  "Batches",
  "DatasetInfo",
  "coco_ground_truth",
  "eval_batches",
  "images",
  "info",
  "is_prepared",
  "num_images",
  "prepare",
  "segmentation",
  "train_batches",
]
