"""A record of a data set with instances as a part of a batch: its image, and its padded objects.

Shapes: B images of this host, G = `max_instances` ground truths, m side of an instance's bitmap in pixels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import ml_collections
import numpy as np
from absl import logging
from etils import epy

from fpt_jax.data.crops import Crop
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances
from fpt_jax.tasks.detection.objects import Objects, objects_in

with epy.lazy_imports():
  import tensorflow as tf


class Loaded(NamedTuple):
  """An image before its resize.

  Attributes:
    record: its record.
    image_HWC: uint8 RGB at the size of the file, mirrored if the window is.
    crop: the window of the resized image that is used.
    objects: the objects in this window.
  """

  record: instances.Record
  image_HWC: np.ndarray
  crop: Crop
  objects: Objects


def read(reader: Reader, index: int) -> instances.Record:
  """Reads a record of a data set with instances."""
  return cast(instances.Record, reader.read(index))


def load_image(reader: Reader, index: int, crop: Crop, *, with_bitmaps: bool = True) -> Loaded:
  """Reads an image, without resizing it, and its objects in a window.

  Args:
    reader: reader of the records.
    index: the image in the reader's split.
    crop: the window of the resized image.
    with_bitmaps: whether to unpack the masks.
  """
  record = read(reader, index)
  image_HWC = reader.decode(index, record)
  if crop.mirrored:
    image_HWC = np.ascontiguousarray(image_HWC[:, ::-1])
  return Loaded(record, image_HWC, crop, objects_in(record, crop, with_bitmaps))


def example_of(
  data: ml_collections.ConfigDict, loaded: Loaded, overfull: set[int]
) -> dict[str, np.ndarray]:
  """Returns an image and its padded ground truth.

  Args:
    data: the config's `data`.
    loaded: the image.
    overfull: ids of images with too many instances that the log has warned of; this one may be added.

  Returns:
    The image's part of the arrays of `train_batches` but valid_B; `image_BHWC` is uint8 at the size of the
    file.
  """
  record, objects, most = loaded.record, loaded.objects, data.max_instances
  count = len(objects.labels_G)
  if count > most:
    if record.image_id not in overfull:
      overfull.add(record.image_id)
      logging.warning(
        "image id %d (%s) has %d instances; the largest %d are kept (data.max_instances); "
        "%d such images so far",
        record.image_id,
        record.file_name,
        count,
        most,
        len(overfull),
      )
    x0_G, y0_G, x1_G, y1_G = objects.boxes_G4.T
    largest = np.argsort(-(x1_G - x0_G) * (y1_G - y0_G), kind="stable")[:most]
    objects = objects.take(np.sort(largest))
  return {
    "image_BHWC": loaded.image_HWC,
    "size_B2": np.array(loaded.crop.valid, np.int32),
    "original_size_B2": np.array(record.size, np.int32),
    "image_id_B": np.array(record.image_id, np.int64),
    "gt_boxes_BG4": _pad(objects.boxes_G4, most),
    "gt_labels_BG": _pad(objects.labels_G, most),
    "gt_valid_BG": np.arange(most) < count,
    "gt_masks_BGmm": _pad(objects.bitmaps_Gmm, most),
  }


def fields_of(
  data: ml_collections.ConfigDict, *, bitmaps: bool
) -> dict[str, tuple[tf.DType, tuple[int | None, ...]]]:
  """Returns dtype and shape of each array of an example, see `example_of`."""
  most = data.max_instances
  fields = {
    "image_BHWC": (tf.uint8, (None, None, 3)),
    "size_B2": (tf.int32, (2,)),
    "original_size_B2": (tf.int32, (2,)),
    "image_id_B": (tf.int64, ()),
    "valid_B": (tf.bool, ()),
    "gt_boxes_BG4": (tf.float32, (most, 4)),
    "gt_labels_BG": (tf.int32, (most,)),
    "gt_valid_BG": (tf.bool, (most,)),
  }
  if bitmaps:
    fields["gt_masks_BGmm"] = (tf.uint8, (most, instances.BITMAP, instances.BITMAP))
  return fields


def _pad(values_G: np.ndarray, count: int) -> np.ndarray:
  """Pads values with zeros to a length of `count`."""
  padded_G = np.zeros((count, *values_G.shape[1:]), values_G.dtype)
  padded_G[: len(values_G)] = values_G
  return padded_G
