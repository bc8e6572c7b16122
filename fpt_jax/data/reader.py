"""Random access to prepared records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
from etils import epy

from fpt_jax.data.datasets import LABEL_MAPS
from fpt_jax.data.prepared import in_use, prepared_builder
from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.images import decode_image
from fpt_jax.data.records.label_map import LabelRecord
from fpt_jax.errors import UserError, one_line
from fpt_jax.ops import masks

with epy.lazy_imports():
  import tensorflow_datasets as tfds


class Reader:
  """Random access to the records of a split.

  Args:
    data: the config's `data`.
    split: a split in TFDS syntax, such as "val" or "train[:8]".

  Attributes:
    sizes_N2: (height, width) of each image file in pixels, int [N, 2].
    splits: names of the splits that the records are from.

  Raises:
    UserError: the data set is not prepared, or does not have the split.
  """

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    builder = prepared_builder(data)
    metadata, splits = builder.info.metadata, builder.info.splits
    try:
      parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
      self._records = builder.as_data_source(split).data_source
    except (ValueError, KeyError, AssertionError) as error:
      raise UserError(
        f"split {split!r} cannot be read from {builder.data_dir}; choose one of "
        f"{sorted(splits)}, or a part such as 'train[:8]'"
      ) from error
    self.splits = tuple(dict.fromkeys(part.splitname for part in parts))
    self._parse = label_map.parse if data.name in LABEL_MAPS else instances.parse
    self._folder = builder.data_dir
    self._exif = data.exif
    # the split and the place in it of each record, for messages
    self._places = [
      (part.splitname, i)
      for part in parts
      for i in range(splits[part.splitname].num_examples)[part.from_ : part.to]
    ]
    self.sizes_N2 = np.array([metadata["sizes"][name][i] for name, i in self._places])
    self.builder = builder
    in_use.add(builder)

  def __len__(self) -> int:
    return len(self._places)

  def name(self, index: int) -> str:
    """Returns a description of a record for messages: its place, split and folder."""
    split, place = self._places[index]
    return f"record {place} of split {split} in {self._folder}"

  def read(self, index: int) -> instances.Record | LabelRecord:
    """Reads and parses one record: a `LabelRecord` if the data set has no instances."""
    try:
      return self._parse(self._records[index])
    except (ValueError, RuntimeError, IndexError, OSError) as error:
      raise UserError(
        f"{self.name(index)} cannot be read ({one_line(error)}); delete the folder and run "
        "--mode=prepare"
      ) from error

  def decode(self, index: int, record: instances.Record | LabelRecord) -> np.ndarray:
    """Returns the record's image, uint8 RGB [height, width, 3]."""
    with self.reading(index, f"image id {record.image_id}"):
      image_HWC = decode_image(record.image, exif=self._exif)
      if image_HWC.shape[:2] != tuple(record.size):  # prepared by a version that ignored EXIF data
        raise ValueError(f"its size is {image_HWC.shape[:2]}, not {record.size} as in the record")
      return image_HWC

  def decode_label(self, index: int, record: LabelRecord) -> np.ndarray:
    """Returns the record's label map, uint8 [height, width]."""
    with self.reading(index, f"{record.file_name}: labels"):
      return label_map.decode(record)

  @contextlib.contextmanager
  def reading(self, index: int, what: str) -> Iterator[None]:
    """Context in which a ValueError becomes a UserError that names the record and a part of it."""
    try:
      yield
    except ValueError as error:
      raise UserError(
        f"{self.name(index)}, {what}: {error}; delete the folder and run --mode=prepare"
      ) from error

  def close(self) -> None:
    """Closes the files."""
    in_use.discard(self.builder)
    with contextlib.suppress(RuntimeError):  # of damaged files, which `read` reports
      self._records.__exit__(None, None, None)


def num_images(data: ml_collections.ConfigDict, split: str) -> int:
  """Returns the number of images of a split.

  Args:
    data: the config's `data`.
    split: a split in TFDS syntax, such as "val" or "train[:8]".

  Raises:
    UserError: the data set is not prepared, or does not have the split.
  """
  reader = Reader(data, split)
  reader.close()
  return len(reader)


def examples(data: ml_collections.ConfigDict, split: str) -> Iterator[dict[str, Any]]:
  """Reads the images of a prepared split and what is known about them, in NumPy arrays.

  Args:
    data: the config's `data`.
    split: a split in TFDS syntax, such as "val" or "train[:8]".

  Returns:
    An iterator over dictionaries, one per image in the order of the split, of
      image: uint8 RGB [H, W, 3], upright.
      image_id: int, id of the image in the data set; its number if the data set has no ids.
      file_name: str, name of the image file.
    of data sets with instances also
      boxes_xyxy: float32 [N, 4], (x0, y0, x1, y1) in pixels of `image`.
      category_ids: int64 [N], as in the annotation file.
      is_crowd: bool [N].
      masks: bool [N, H, W]; whole boxes if the annotations have no masks.
    and of all other data sets
      label_map: uint8 [H, W], classes 0, 1, ..., and 255 for pixels without a class.

  Raises:
    UserError: the data are not prepared, or do not have the split; on iteration, a record cannot be read.
  """
  reader = Reader(data, split)
  category_ids = np.array(reader.builder.info.metadata.get("category_ids", ()), np.int64)
  return _examples(reader, category_ids)


def _examples(reader: Reader, category_ids: np.ndarray) -> Iterator[dict[str, Any]]:
  with contextlib.closing(reader):
    for index in range(len(reader)):
      record = reader.read(index)
      example = {
        "image": np.require(reader.decode(index, record), requirements="W"),
        "image_id": record.image_id,
        "file_name": record.file_name,
      }
      if isinstance(record, LabelRecord):
        yield example | {"label_map": reader.decode_label(index, record)}
        continue
      masks_NHW = np.zeros((len(record.boxes), *record.size), bool)
      for mask_HW, annotation in zip(masks_NHW, record.annotations, strict=True):
        segmentation = instances.decode_annotation(annotation)["segmentation"]
        mask_HW[:] = masks.rasterize(segmentation, *record.size)
      yield example | {
        "boxes_xyxy": record.boxes,
        "category_ids": category_ids[record.labels - 1],
        "is_crowd": record.crowd,
        "masks": masks_NHW,
      }
