"""Batches of detection from prepared records, and the ground truth in COCO's format.

Shapes: B images of this host, G = `max_instances` ground truths, m side of an instance's bitmap in
pixels, N images of a split, K canvases, V views.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import cast

import ml_collections
import numpy as np
from absl import logging
from etils import epy

from fpt_jax.data import canvases, order, transforms
from fpt_jax.data.loader import Batches, assemble
from fpt_jax.data.prepared import info
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances

with epy.lazy_imports():
  import tensorflow as tf


def train_batches(
  data: ml_collections.ConfigDict,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Reads this host's share of the endless training batches.

  Args:
    data: the config's `data`.
    batch_size: images of a global batch.
    seed: seed of the image order and the augmentation.
    start_step: step of the first batch.
    process_index: index of this host.
    process_count: number of hosts.

  Returns:
    Batches of
      image_BHWC: float32 RGB in 0..255, zero on the padding at the bottom and the right.
      size_B2, original_size_B2: int32 (height, width) on the canvas and of the file.
      image_id_B: int64.
      valid_B: bool, all True.
      gt_boxes_BG4: float32 (x0, y0, x1, y1) in pixels of the canvas.
      gt_labels_BG: int32 in 1..num_classes, 0 on padding.
      gt_masks_BGmm: uint8 0 or 1, relative to the boxes.
      gt_valid_BG: bool; crowds are left out.

  Raises:
    UserError: the data are not prepared, or do not fit the config. While iterating: a record or
      its image cannot be read.
  """
  reader = Reader(data, data.train_split)
  sizes = tuple(data.train_sizes) or (data.short_edge,)
  largest = at_largest_train_size(data)
  bucket_N, canvases_K2 = _assign(largest, reader)
  plan = order.train_plan(
    bucket_N,
    seed=seed,
    batch_size=batch_size,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )

  def augment(position: int) -> tuple[int, bool]:
    short, mirrored = transforms.draw_augmentation(seed, position, sizes)
    return short, mirrored and data.flip

  return _batches((largest,), reader, plan, augment, canvases_K2[:, None], bitmaps=True)


def at_largest_train_size(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config's `data` for training images of the largest size.

  A smaller image of multi-scale training is padded to the canvas of the largest.
  """
  largest = canvases.at_short_edge(data, max(tuple(data.train_sizes) or (data.short_edge,)))
  if data.train_long_edge:
    largest = ml_collections.ConfigDict(largest)
    largest.long_edge = data.train_long_edge
  return largest


def eval_batches(
  data: ml_collections.ConfigDict,
  split: str,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  short_edges: tuple[int, ...] = (),
) -> Batches:
  """Reads this host's share of one pass over a split, with every image once.

  Args:
    data: the config's `data`.
    split: in TFDS syntax, such as "val" or "train[:8]".
    batch_size: images of a global batch.
    process_index: index of this host.
    process_count: number of hosts; all get the same number of batches.
    short_edges: shorter edges of the images in pixels; () for `data.short_edge`. Longest edge and
      buckets scale with them.

  Returns:
    Batches like those of `train_batches`, without flips and gt_masks_BGmm. Where an image only fills
    up the last batch of a canvas, valid_B is False and image_id_B is -1. image_BHWC, size_B2 and
    gt_boxes_BG4 are those at the first of the shorter edges; `other_views` is a tuple with a dict of
    image_BHWC and size_B2 for each of the others.

  Raises:
    UserError: see `train_batches`.
  """
  reader = Reader(data, split)
  views = tuple(canvases.at_short_edge(data, short) for short in short_edges or (data.short_edge,))
  # images of a batch share a canvas in every view
  assigned = [_assign(view, reader) for view in views]
  combined_KV, bucket_N = np.unique(
    np.stack([bucket_N for bucket_N, _ in assigned], axis=1), axis=0, return_inverse=True
  )
  canvases_KV2 = np.stack(
    [canvases_K2[combined_KV[:, v]] for v, (_, canvases_K2) in enumerate(assigned)], axis=1
  )
  plan = order.eval_plan(
    bucket_N.reshape(-1),
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )

  def augment(_: int) -> tuple[int, bool]:
    return views[0].short_edge, False

  return _batches(views, reader, plan, augment, canvases_KV2, bitmaps=False)


def largest_canvas(data: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns the largest canvas (height, width): that of `data.buckets`, or of the widest image.

  Args:
    data: the config's `data` for images of one size, see `canvases.at_short_edge`.
  """
  if data.buckets:
    height, width = max(data.buckets, key=math.prod)
    return height, width
  size = (data.short_edge, data.long_edge)
  return transforms.smallest_canvas(size, (), canvases.multiple_of(data))


def coco_ground_truth(data: ml_collections.ConfigDict, split: str) -> dict:
  """Rebuilds the annotation file of a split from its records, without decoding images.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax.

  Returns:
    COCO's `images`, `annotations` (segmentation, area, iscrowd, bbox as x, y, w, h, category_id as
    in the data set's file, and any further fields of the record) and `categories`.

  Raises:
    UserError: the data are not prepared, or a record cannot be read.
  """
  dataset = info(data)
  truth = {"images": [], "annotations": [], "categories": []}
  for category_id, name in zip(dataset.category_ids, dataset.category_names, strict=True):
    truth["categories"].append({"id": category_id, "name": name})
  with contextlib.closing(Reader(data, split)) as reader:
    for index in range(len(reader)):
      record = _read(reader, index)
      height, width = record.size
      truth["images"].append(
        {"id": record.image_id, "file_name": record.file_name, "height": height, "width": width}
      )
      truth["annotations"] += _annotations(record, dataset.category_ids)
  return truth


def images(
  data: ml_collections.ConfigDict, split: str
) -> Iterator[tuple[str, np.ndarray, list[dict]]]:
  """Reads the images of a split at the size of their files.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax.

  Yields:
    File name, uint8 RGB [H, W, 3], and the image's annotations as in `coco_ground_truth`.

  Raises:
    UserError: the data are not prepared, or a record or its image cannot be read.
  """
  category_ids = info(data).category_ids
  with contextlib.closing(Reader(data, split)) as reader:
    for index in range(len(reader)):
      record = _read(reader, index)
      image_HWC = reader.decode(index, record)
      yield record.file_name, image_HWC, _annotations(record, category_ids)


def _read(reader: Reader, index: int) -> instances.Record:
  """Reads a record of a data set with instances."""
  return cast(instances.Record, reader.read(index))


def _annotations(record: instances.Record, category_ids: tuple[int, ...]) -> list[dict]:
  """Returns the record's objects in the format of COCO's annotation file."""
  return [
    instances.decode_annotation(annotation)
    | {
      "id": int(record.annotation_ids[i]),
      "image_id": record.image_id,
      "category_id": category_ids[record.labels[i] - 1],
      "iscrowd": int(record.crowd[i]),
    }
    for i, annotation in enumerate(record.annotations)
  ]


def _assign(data: ml_collections.ConfigDict, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
  """Returns the index of each image's canvas, int [N], and the canvases, int [K, 2]."""
  sizes_N2 = np.array([canvases.resized_size(data, *size) for size in reader.sizes_N2])
  canvases_K2 = canvases.canvases(data, sizes_N2)
  return order.assign_buckets(sizes_N2, canvases_K2), canvases_K2


def _batches(
  views: tuple[ml_collections.ConfigDict, ...],
  reader: Reader,
  plan: order.Plan,
  augment: Callable[[int], tuple[int, bool]],
  canvases_KV2: np.ndarray,
  *,
  bitmaps: bool,
) -> Batches:
  """Returns this host's batches of a plan: each image is read, decoded and resized.

  Args:
    views: the config's `data` at each shorter edge; the ground truth has the scale of the first.
    reader: reader of the records.
    plan: the images of each step.
    augment: function from the image's position in the run to its shorter edge and whether to flip it.
    canvases_KV2: (height, width) of each canvas in each view.
    bitmaps: whether batches have gt_masks_BGmm.
  """
  data, others = views[0], views[1:]
  overfull: set[int] = set()
  fields = {
    "image_BHWC": (tf.uint8, (None, None, 3)),
    "size_B2": (tf.int32, (2,)),
    "original_size_B2": (tf.int32, (2,)),
    "image_id_B": (tf.int64, ()),
    "valid_B": (tf.bool, ()),
    "gt_boxes_BG4": (tf.float32, (data.max_instances, 4)),
    "gt_labels_BG": (tf.int32, (data.max_instances,)),
    "gt_valid_BG": (tf.bool, (data.max_instances,)),
  }
  if bitmaps:
    fields["gt_masks_BGmm"] = (tf.uint8, (data.max_instances, instances.BITMAP, instances.BITMAP))
  if others:
    fields["other_sizes_V2"] = (tf.int32, (len(others), 2))

  def load(position: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    short, mirrored = augment(position)
    example = load_example(data, reader, index, short, mirrored, bitmaps, overfull)
    example["valid_B"] = np.array(valid)
    if not valid:
      example["image_id_B"] = np.array(-1, np.int64)
    if others:
      size = example["original_size_B2"]
      sizes_V2 = [canvases.resized_size(v, *size) for v in others]
      example["other_sizes_V2"] = np.array(sizes_V2, np.int32)
    return example

  def finish(example: dict[str, tf.Tensor], bucket: tf.Tensor) -> dict[str, tf.Tensor]:
    canvases_V2 = tf.gather(tf.constant(canvases_KV2, tf.int32), bucket)
    image_HWC = example["image_BHWC"]

    def view(size: tf.Tensor, v: int) -> dict[str, tf.Tensor]:
      return {
        "image_BHWC": transforms.resize_and_pad(image_HWC, size, canvases_V2[v], data.resize),
        "size_B2": size,
      }

    example |= view(example["size_B2"], 0)
    if others:
      sizes_V2 = example.pop("other_sizes_V2")
      example["other_views"] = tuple(view(sizes_V2[v], v + 1) for v in range(len(others)))
    return example

  return assemble(data, reader, plan, fields, load, finish)


def load_example(
  data: ml_collections.ConfigDict,
  reader: Reader,
  index: int,
  short: int,
  mirrored: bool,
  with_bitmaps: bool,
  overfull: set[int],
) -> dict[str, np.ndarray]:
  """Reads an image, without resizing it, and its padded ground truth.

  Args:
    data: the config's `data`.
    reader: reader of the records.
    index: the image in the reader's split.
    short: shorter edge that the image will be resized to, pixels.
    mirrored: whether the image is mirrored left to right.
    with_bitmaps: whether to unpack the masks.
    overfull: ids of images with too many instances that the log has warned of; this one may be added.

  Returns:
    The image's part of the arrays of `train_batches`; `image_BHWC` is uint8 at the size of the file.
  """
  record = _read(reader, index)
  image_HWC = reader.decode(index, record)
  size = canvases.resized_size(data, *record.size, short)

  x0_G, y0_G, x1_G, y1_G = record.boxes.T
  areas_G = (x1_G - x0_G) * (y1_G - y0_G)
  kept = np.flatnonzero(~record.crowd & (areas_G > 0))
  if len(kept) > data.max_instances:
    if record.image_id not in overfull:
      overfull.add(record.image_id)
      logging.warning(
        "image id %d (%s) has %d instances; the largest %d are kept (data.max_instances); "
        "%d such images so far",
        record.image_id,
        record.file_name,
        len(kept),
        data.max_instances,
        len(overfull),
      )
    largest = np.argsort(-areas_G[kept], kind="stable")[: data.max_instances]
    kept = kept[np.sort(largest)]
  bitmaps_Gmm = instances.unpack_bitmaps([record.bitmaps[i] for i in kept if with_bitmaps])
  boxes_G4 = record.boxes[kept]
  if mirrored:
    image_HWC, boxes_G4, bitmaps_Gmm = transforms.flip(image_HWC, boxes_G4, bitmaps_Gmm)
  return {
    "image_BHWC": np.ascontiguousarray(image_HWC),
    "size_B2": np.array(size, np.int32),
    "original_size_B2": np.array(record.size, np.int32),
    "image_id_B": np.array(record.image_id, np.int64),
    "gt_boxes_BG4": _pad(transforms.scale_boxes(boxes_G4, record.size, size), data.max_instances),
    "gt_labels_BG": _pad(record.labels[kept], data.max_instances),
    "gt_valid_BG": np.arange(data.max_instances) < len(kept),
    "gt_masks_BGmm": _pad(bitmaps_Gmm, data.max_instances),
  }


def _pad(values_G: np.ndarray, count: int) -> np.ndarray:
  """Pads values with zeros to a length of `count`."""
  padded_G = np.zeros((count, *values_G.shape[1:]), values_G.dtype)
  padded_G[: len(values_G)] = values_G
  return padded_G
