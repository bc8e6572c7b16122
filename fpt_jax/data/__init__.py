"""Data sets: prepared once as records, read at random, and assembled into batches."""

from fpt_jax.data.loader import Batches
from fpt_jax.data.prepared import (
  DatasetInfo,
  info,
  is_prepared,
  prepare,
  prepare_for_all_hosts,
)
from fpt_jax.data.reader import Reader, examples, num_images
from fpt_jax.data.records.label_map import VOID
from fpt_jax.data.trainable import check_trainable, digest

__all__ = [
  "VOID",
  "Batches",
  "DatasetInfo",
  "Reader",
  "check_trainable",
  "digest",
  "examples",
  "info",
  "is_prepared",
  "num_images",
  "prepare",
  "prepare_for_all_hosts",
]
