"""Batches of semantic segmentation from prepared records.

Shapes: B images of this host, H W rows and columns, h w those of the part of a crop that lies on its
image, N images of a split, K canvases. Label maps hold classes 0..num_classes-1, and `VOID` where
there is no class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ml_collections
import numpy as np
from etils import epy
from pycocotools import mask as coco_mask

from fpt_jax.data import canvases, crops, order, transforms
from fpt_jax.data.loader import Batches, assemble
from fpt_jax.data.prepared import DatasetInfo, info
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances, label_map
from fpt_jax.errors import UserError

with epy.lazy_imports():
  import tensorflow as tf

AnyRecord = label_map.LabelRecord | instances.Record


def train_batches(
  data: ml_collections.ConfigDict,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Reads this host's share of the endless training batches: random crops of resized images.

  Args:
    data: the config's `data`.
    batch_size: images of a global batch.
    seed: seed of the image order and the augmentation.
    start_step: step of the first batch.
    process_index: index of this host.
    process_count: number of hosts.

  Returns:
    Batches, of the size `data.crop`, of
      image_BHWC: RGB in 0..255, of dtype `data.image_dtype`, zero on the padding at the bottom and the right.
      label_BHW: int32, `VOID` on the padding.
      size_B2, original_size_B2: int32 (height, width) on the crop and of the file.
      image_id_B: int64; file_name_B: bytes.
      valid_B: bool, all True.

  Raises:
    UserError: the data are not prepared, or do not fit the config. While iterating: a record, its
      image or its label map cannot be read.
  """
  canvas, ranges = tuple(data.crop), tuple(data.color_jitter)
  mirrored_class = crops.mirror_table(_classes(data).swaps)
  reader = Reader(data, data.train_split)
  plan = order.train_plan(
    np.zeros(len(reader), int),
    seed=seed,
    batch_size=batch_size,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )

  def load(position: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    record, image_HWC, label_HW = _read(reader, index)
    crop = crops.draw(
      seed,
      position,
      record.size,
      canvas,
      scale=tuple(data.scale),
      train_sizes=tuple(data.train_sizes),
      flip=data.flip,
    )
    label_hw = crops.cut_label(label_HW, crop)
    if crop.mirrored:
      image_HWC, label_hw = np.ascontiguousarray(image_HWC[:, ::-1]), mirrored_class[label_hw]
    example = _names(record, valid) | {
      "image_BHWC": image_HWC,
      "label_BHW": label_hw,
      "size_B2": np.array(crop.valid, np.int32),
      "resized_B2": np.array(crop.size, np.int32),
      "offset_B2": np.array(crop.offset, np.int32),
    }
    if ranges:
      example["colors"] = transforms.draw_colors(seed, position, ranges)
    return example

  def finish(example: dict[str, tf.Tensor], _: tf.Tensor) -> dict[str, tf.Tensor]:
    image_HWC, label_hw = example["image_BHWC"], example["label_BHW"]
    resized, offset = example.pop("resized_B2"), example.pop("offset_B2")
    if ranges:
      image_HWC = transforms.jitter_colors(image_HWC, example.pop("colors"), ranges)
    image_HWC = crops.cut_image(image_HWC, resized, offset, tf.constant(canvas))
    return example | {
      "image_BHWC": transforms.converted(image_HWC, data.image_dtype),
      "label_BHW": tf.cast(crops.pad_label(label_hw, tf.constant(canvas)), tf.int32),
    }

  fields = _fields() | {"resized_B2": (tf.int32, (2,)), "offset_B2": (tf.int32, (2,))}
  if ranges:
    fields["colors"] = (tf.float32, (4,))
  return assemble(data, reader, plan, fields, load, finish)


def eval_batches(
  data: ml_collections.ConfigDict,
  split: str,
  *,
  batch_size: int,
  remainder: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Reads this host's share of one pass over a split, with every image once and uncropped.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax, such as "val" or "train[:8]".
    batch_size: images of a global batch.
    remainder: pixels of a canvas beyond a multiple, see `views.rounding`.
    process_index: index of this host.
    process_count: number of hosts; all get the same number of batches.

  Returns:
    Batches like those of `train_batches`, in float32, without crops and flips, on canvases of `data.buckets`
    or, if there are none, of the image's size rounded up to multiples of `data.canvas_multiple`, plus the
    remainder. Where an image only fills up the last batch of a canvas, valid_B is False and image_id_B
    is -1. In addition:
      original_label_BHW: uint8, the label map of the file, `VOID` beyond original_size_B2.

  Raises:
    UserError: see `train_batches`.
  """
  _classes(data)
  reader = Reader(data, split)
  sizes_N2 = reader.sizes_N2
  if data.short_edge:
    sizes_N2 = np.array([crops.short_edge_size(size, data.short_edge) for size in sizes_N2])
  canvases_K2 = canvases.canvases(data, sizes_N2, remainder)
  bucket_N = order.assign_buckets(sizes_N2, canvases_K2)
  originals_K2 = np.zeros_like(canvases_K2)
  np.maximum.at(originals_K2, bucket_N, reader.sizes_N2)
  plan = order.eval_plan(
    bucket_N,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )

  def load(_: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    record, image_HWC, label_HW = _read(reader, index)
    height, width = map(int, sizes_N2[index])
    size = (height, width)
    return _names(record, valid) | {
      "image_BHWC": image_HWC,
      "label_BHW": crops.cut_label(label_HW, crops.Crop(size, (0, 0), size, mirrored=False)),
      "original_label_BHW": label_HW,
      "size_B2": np.array(size, np.int32),
    }

  def finish(example: dict[str, tf.Tensor], bucket: tf.Tensor) -> dict[str, tf.Tensor]:
    canvas = tf.gather(tf.constant(canvases_K2, tf.int32), bucket)
    original = tf.gather(tf.constant(originals_K2, tf.int32), bucket)
    image_HWC, label_hw = example["image_BHWC"], example["label_BHW"]
    return example | {
      "image_BHWC": transforms.resize_and_pad(image_HWC, example["size_B2"], canvas),
      "label_BHW": tf.cast(crops.pad_label(label_hw, canvas), tf.int32),
      "original_label_BHW": crops.pad_label(example["original_label_BHW"], original),
    }

  fields = _fields() | {"original_label_BHW": (tf.uint8, (None, None))}
  return assemble(data, reader, plan, fields, load, finish)


def images(
  data: ml_collections.ConfigDict, split: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """Reads the images of a split at the size of their files.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax.

  Yields:
    File name, uint8 RGB [H, W, 3], and the label map, uint8 [H, W].

  Raises:
    UserError: the data are not prepared, or a record, its image or label map cannot be read.
  """
  _classes(data)
  with contextlib.closing(Reader(data, split)) as reader:
    for index in range(len(reader)):
      record, image_HWC, label_HW = _read(reader, index)
      yield record.file_name, image_HWC, label_HW


def label_map_of(record: AnyRecord) -> np.ndarray:
  """Returns a record's label map, uint8 [H, W].

  The label map of instances is drawn from their masks: their labels 1, 2, ..., and 0 elsewhere.

  Raises:
    ValueError: it cannot be decoded.
  """
  if isinstance(record, label_map.LabelRecord):
    return label_map.decode(record)
  label_HW = np.zeros(record.size, np.uint8)
  for label, annotation in zip(record.labels, record.annotations, strict=True):
    mask_HW = coco_mask.decode(instances.decode_annotation(annotation)["segmentation"])
    label_HW[mask_HW.astype(bool)] = label
  return label_HW


def _fields() -> dict[str, tuple[tf.DType, tuple[int | None, ...]]]:
  return {
    "image_BHWC": (tf.uint8, (None, None, 3)),
    "label_BHW": (tf.uint8, (None, None)),
    "size_B2": (tf.int32, (2,)),
    "original_size_B2": (tf.int32, (2,)),
    "image_id_B": (tf.int64, ()),
    "file_name_B": (tf.string, ()),
    "valid_B": (tf.bool, ()),
  }


def _names(record: AnyRecord, valid: bool) -> dict[str, np.ndarray]:
  """Returns the arrays of a batch that name and describe an image."""
  return {
    "original_size_B2": np.array(record.size, np.int32),
    "image_id_B": np.array(record.image_id if valid else -1, np.int64),
    "file_name_B": np.array(record.file_name.encode(), object),
    "valid_B": np.array(valid),
  }


def _read(reader: Reader, index: int) -> tuple[AnyRecord, np.ndarray, np.ndarray]:
  """Reads a record, its image and its label map."""
  record = reader.read(index)
  image_HWC = reader.decode(index, record)
  with reader.reading(index, f"{record.file_name}: labels"):
    return record, image_HWC, label_map_of(record)


def _classes(data: ml_collections.ConfigDict) -> DatasetInfo:
  """Returns the data set's description; raises UserError if it has no label maps."""
  dataset = info(data)
  if not dataset.class_names:
    raise UserError(f"data.name={data.name!r} has no label maps; choose another data set")
  return dataset
