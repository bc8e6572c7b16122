"""What the records of all data sets have in common: the image's fields, and their order on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epy

with epy.lazy_imports():
  import tensorflow as tf
  import tensorflow_datasets as tfds


def image_features() -> dict[str, Any]:
  """Returns the TFDS features of the fields that describe a record's image."""
  return {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "image_id": np.int64,
    "file_name": tfds.features.Text(),
    "height": np.int32,
    "width": np.int32,
  }


def parse_example(
  serialized: bytes, more: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Mapping[str, tf.train.Feature]]:
  """Parses the fields of a record that have one value each.

  Args:
    serialized: a `tf.train.Example` as the ArrayRecord file holds it.
    more: names of further fields that hold bytes.

  Returns:
    `image`, `image_id`, `file_name`, `size` as (height, width), and the fields `more`; and all
    features of the record by name.

  Raises:
    ValueError: the bytes are not a record with these fields.
  """
  try:
    feature = tf.train.Example.FromString(serialized).features.feature
    values = {}
    for key in ("image", "file_name", *more):
      (values[key],) = feature[key].bytes_list.value
    for key in ("image_id", "height", "width"):
      (values[key],) = feature[key].int64_list.value
    values["file_name"] = values["file_name"].decode()
    values["size"] = (values.pop("height"), values.pop("width"))
  except Exception as error:  # the implementations of protobuf raise different classes
    raise ValueError(f"not a record of this data set ({error})") from error
  return values, feature


def ordered_key(index: int, count: int) -> int:
  """Returns the TFDS key of the record at `index` of at most `count`.

  Records are written in the order of their keys. TFDS sorts large splits in a thousand parts of the
  128-bit range of keys, one part in memory at a time: the keys must fill that range evenly.
  """
  return index * (2**128 // count)
