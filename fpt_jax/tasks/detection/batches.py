"""Batches of detection from prepared records, and the ground truth in COCO's format.

Shapes: B images of this host, G = `max_instances` ground truths, m side of an instance's bitmap in
pixels, N images of a split, K canvases, V views.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import cast

import ml_collections
import numpy as np
from absl import logging
from etils import epy

from fpt_jax.data import canvases, crops, order, transforms
from fpt_jax.data.crops import Crop
from fpt_jax.data.loader import Batches, assemble
from fpt_jax.data.prepared import info
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection import copy_paste
from fpt_jax.tasks.detection.copy_paste import Loaded
from fpt_jax.tasks.detection.objects import objects_in

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
  largest = at_largest_train_size(data)
  if data.crop:
    bucket_N, canvases_K2 = np.zeros(len(reader), int), np.array([data.crop])
  else:
    bucket_N, canvases_K2 = _assign(largest, reader)
  if data.filter_empty:
    bucket_N = np.where(_have_objects(reader), bucket_N, -1)  # -1: in no batch
    if (bucket_N < 0).all():
      raise UserError(
        f"data.filter_empty: no image of data.train_split={data.train_split!r} has an object to train on"
      )
  plan = order.train_plan(
    bucket_N,
    seed=seed,
    batch_size=batch_size,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )
  sources = np.flatnonzero(bucket_N >= 0)
  seed_of_sources = copy_paste.partner_seed(seed)
  overfull: set[int] = set()
  ranges = tuple(data.color_jitter)

  def load(position: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    loaded = load_image(reader, index, train_crop(largest, reader, index, seed, position))

    def load_source(i: int) -> Loaded:
      source = int(sources[i])
      crop = train_crop(largest, reader, source, seed_of_sources, position)
      canvas = canvases_K2[bucket_N[index]]  # the image that objects are pasted into may be smaller
      height, width = (min(edge, int(room)) for edge, room in zip(crop.valid, canvas, strict=True))
      return load_image(reader, source, dataclasses.replace(crop, valid=(height, width)))

    pasted = copy_paste.paste(loaded, seed, position, data.copy_paste, len(sources), load_source)
    if pasted:
      loaded = loaded._replace(objects=pasted.objects)
    example = example_of(data, loaded, overfull) | {"valid_B": np.array(valid)}
    example |= _window(loaded.crop, "own")
    example["colors_B4"] = transforms.draw_colors(seed, position, ranges or (0, 0, 0, 0))
    if data.copy_paste:
      if pasted:
        example["size_B2"] = np.array(pasted.size, np.int32)
      source = pasted.source if pasted else loaded
      example |= _window(source.crop, "source")
      example["source_image"] = pasted.source.image_HWC if pasted else np.zeros((1, 1, 3), np.uint8)
      example["source_mask"] = pasted.mask_hw if pasted else np.zeros((1, 1), bool)
    return example

  def finish(example: dict[str, tf.Tensor], bucket: tf.Tensor) -> dict[str, tf.Tensor]:
    canvas = tf.gather(tf.constant(canvases_K2, tf.int32), bucket)
    colors_4 = example.pop("colors_B4")
    windows = {n: example.pop(n) for n in fields if n.startswith(("own_", "source_"))}

    def on_canvas(image_HWC: tf.Tensor, name: str) -> tf.Tensor:
      resized, offset, valid = (windows[f"{name}_{part}"] for part in _WINDOW)
      if ranges:
        image_HWC = transforms.jitter_colors(image_HWC, colors_4, ranges)
      if data.crop or name == "source":
        return crops.cut_image(image_HWC, resized, offset, canvas)
      return transforms.resize_and_pad(image_HWC, valid, canvas, data.resize)

    image_HWC = on_canvas(example["image_BHWC"], "own")
    if data.copy_paste:
      mask_hw = windows["source_mask"]
      mask_HW = tf.pad(mask_hw, [[0, n] for n in tf.unstack(canvas - tf.shape(mask_hw))])
      image_HWC = tf.cond(
        tf.reduce_any(mask_hw),
        lambda: copy_paste.compose(
          image_HWC,
          windows["own_valid"],
          on_canvas(windows["source_image"], "source"),
          mask_HW,
          example["size_B2"],
        ),
        lambda: image_HWC,
      )
    return example | {"image_BHWC": image_HWC}

  fields = _fields(data, bitmaps=True) | _window_fields("own")
  fields["colors_B4"] = (tf.float32, (4,))
  if data.copy_paste:
    fields |= _window_fields("source")
    fields["source_image"] = (tf.uint8, (None, None, 3))
    fields["source_mask"] = (tf.bool, (None, None))
  return assemble(data, reader, plan, fields, load, finish)


def train_crop(
  data: ml_collections.ConfigDict, reader: Reader, index: int, seed: int, position: int
) -> Crop:
  """Draws the window of a training image, as a pure function of the image, the seed and the position.

  Args:
    data: what `at_largest_train_size` returns.
    reader: reader of the records.
    index: the image in the reader's split.
    seed: seed of the run.
    position: position of the image in the run: step * global batch size + index in the batch.
  """
  height, width = map(int, reader.sizes_N2[index])
  if data.crop:
    fit = crops.fit((height, width), tuple(data.crop))
    scale = (data.scale[0] * fit, data.scale[1] * fit)
    return crops.draw(
      seed, position, (height, width), tuple(data.crop), scale=scale, flip=data.flip
    )
  sizes = tuple(data.train_sizes) or (data.short_edge,)
  short, mirrored = transforms.draw_augmentation(seed, position, sizes)
  resized = canvases.resized_size(data, height, width, short)
  return crops.whole(resized, mirrored and data.flip)


_WINDOW = ("resized", "offset", "valid")  # of a window, see `Crop`


def _window(crop: Crop, name: str) -> dict[str, np.ndarray]:
  """Returns a window as arrays of an example."""
  values = (crop.size, crop.offset, crop.valid)
  return {f"{name}_{part}": np.array(v, np.int32) for part, v in zip(_WINDOW, values, strict=True)}


def _window_fields(name: str) -> dict[str, tuple[tf.DType, tuple[int | None, ...]]]:
  """Returns dtype and shape of each array of `_window`."""
  return {f"{name}_{part}": (tf.int32, (2,)) for part in _WINDOW}


def _have_objects(reader: Reader) -> np.ndarray:
  """bool [N]: whether each image has an object that can be trained on; it reads all records."""
  logging.info("data.filter_empty: looking for objects in %d records", len(reader))
  have_N = np.zeros(len(reader), bool)
  for index in range(len(reader)):
    record = _read(reader, index)
    x0_G, y0_G, x1_G, y1_G = record.boxes.T
    have_N[index] = (~record.crowd & ((x1_G - x0_G) * (y1_G - y0_G) > 0)).any()
  logging.info("%d images without an object are left out", np.count_nonzero(~have_N))
  return have_N


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

  others = views[1:]
  overfull: set[int] = set()

  def load(position: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    del position
    window = crops.whole(canvases.resized_size(views[0], *reader.sizes_N2[index]), False)
    loaded = load_image(reader, index, window, with_bitmaps=False)
    example = example_of(data, loaded, overfull) | {"valid_B": np.array(valid)}
    if not valid:
      example["image_id_B"] = np.array(-1, np.int64)
    if others:
      sizes_V2 = [canvases.resized_size(v, *example["original_size_B2"]) for v in others]
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

  fields = _fields(data, bitmaps=False)
  if others:
    fields["other_sizes_V2"] = (tf.int32, (len(others), 2))
  return assemble(data, reader, plan, fields, load, finish)


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


def _fields(
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


def load_image(reader: Reader, index: int, crop: Crop, *, with_bitmaps: bool = True) -> Loaded:
  """Reads an image, without resizing it, and its objects in a window.

  Args:
    reader: reader of the records.
    index: the image in the reader's split.
    crop: the window of the resized image.
    with_bitmaps: whether to unpack the masks.
  """
  record = _read(reader, index)
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


def _pad(values_G: np.ndarray, count: int) -> np.ndarray:
  """Pads values with zeros to a length of `count`."""
  padded_G = np.zeros((count, *values_G.shape[1:]), values_G.dtype)
  padded_G[: len(values_G)] = values_G
  return padded_G
