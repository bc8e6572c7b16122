"""Batches of detection from prepared records.

Shapes: B images of this host, G = `max_instances` ground truths, m side of an instance's bitmap in
pixels, N images of a split, K canvases, V views.
"""

from __future__ import annotations

import dataclasses
import math

import ml_collections
import numpy as np
from absl import logging
from etils import epy

from fpt_jax.data import canvases, crops, order, transforms
from fpt_jax.data.crops import Crop
from fpt_jax.data.loader import Batches, assemble
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection import copy_paste
from fpt_jax.tasks.detection.examples import Loaded, example_of, fields_of, load_image, read
from fpt_jax.tasks.detection.objects import trainable

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
      image_BHWC: RGB in 0..255, of dtype `data.image_dtype`, zero on the padding at the bottom and the right.
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
  bucket_N, canvases_K2 = _assign_training(largest, reader)
  plan = order.train_plan(
    bucket_N,
    seed=seed,
    batch_size=batch_size,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )
  sources = np.flatnonzero(bucket_N >= 0)
  seed_of_sources = copy_paste.seed_of_sources(seed)
  overfull: set[int] = set()
  ranges, dtype = tuple(data.color_jitter), data.image_dtype
  with_window = bool(data.crop or data.copy_paste)
  extra = _window_fields("own") if with_window else {}
  if ranges:
    extra["colors"] = (tf.float32, (4,))
  if data.copy_paste:
    extra |= _window_fields("source") | {
      "source_image": (tf.uint8, (None, None, 3)),
      "source_mask": (tf.bool, (None, None)),
    }

  def load(position: int, index: int, valid: bool) -> dict[str, np.ndarray]:
    def load_source(i: int) -> Loaded:
      source = int(sources[i])
      crop = train_crop(largest, reader, source, seed_of_sources, position)
      canvas = canvases_K2[bucket_N[index]]  # the image that objects are pasted into may be smaller
      height, width = (min(edge, int(room)) for edge, room in zip(crop.valid, canvas, strict=True))
      return load_image(reader, source, dataclasses.replace(crop, valid=(height, width)))

    loaded = load_image(reader, index, train_crop(largest, reader, index, seed, position))
    pasted = None
    if data.copy_paste:
      chance = data.copy_paste
      pasted = copy_paste.paste(loaded, seed, position, chance, len(sources), load_source)
    if pasted:
      loaded = loaded._replace(objects=pasted.objects)
    example = example_of(data, loaded, overfull) | {"valid_B": np.array(valid)}
    if with_window:
      example |= _window(loaded.crop, "own")
    if ranges:
      example["colors"] = transforms.draw_colors(seed, position, ranges)
    if pasted:
      example |= _window(pasted.source.crop, "source") | {
        "size_B2": np.array(pasted.size, np.int32),
        "source_image": pasted.source.image_HWC,
        "source_mask": pasted.mask_hw,
      }
    elif data.copy_paste:
      example |= _window(loaded.crop, "source") | {
        "source_image": np.zeros((1, 1, 3), np.uint8),
        "source_mask": np.zeros((1, 1), bool),
      }
    return example

  def finish(example: dict[str, tf.Tensor], bucket: tf.Tensor) -> dict[str, tf.Tensor]:
    canvas = tf.gather(tf.constant(canvases_K2, tf.int32), bucket)
    given = {name: example.pop(name) for name in extra}

    def colored(image_HWC: tf.Tensor) -> tf.Tensor:
      return transforms.jitter_colors(image_HWC, given["colors"], ranges) if ranges else image_HWC

    def cut(image_HWC: tf.Tensor, name: str) -> tf.Tensor:
      window = (given[f"{name}_resized"], given[f"{name}_offset"], canvas)
      return transforms.converted(crops.cut_image(colored(image_HWC), *window), dtype)

    if data.crop:
      image_HWC = cut(example["image_BHWC"], "own")
    else:
      size = given["own_valid"] if data.copy_paste else example["size_B2"]
      image_HWC = colored(example["image_BHWC"])
      image_HWC = transforms.resize_and_pad(image_HWC, size, canvas, data.resize, dtype)
    if data.copy_paste:
      mask_hw = given["source_mask"]
      mask_HW = tf.pad(mask_hw, [[0, n] for n in tf.unstack(canvas - tf.shape(mask_hw))])
      image_HWC = tf.cond(
        tf.reduce_any(mask_hw),
        lambda: copy_paste.compose(
          image_HWC,
          given["own_valid"],
          cut(given["source_image"], "source"),
          mask_HW,
          example["size_B2"],
        ),
        lambda: image_HWC,
      )
    return example | {"image_BHWC": image_HWC}

  return assemble(data, reader, plan, fields_of(data, bitmaps=True) | extra, load, finish)


def _assign_training(
  data: ml_collections.ConfigDict, reader: Reader
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the canvases of training images as `_assign`, of `at_largest_train_size`; -1: in no batch."""
  if data.crop:
    bucket_N, canvases_K2 = np.zeros(len(reader), int), np.array([data.crop])
  else:
    bucket_N, canvases_K2 = _assign(data, reader)
  if not data.filter_empty:
    return bucket_N, canvases_K2
  logging.info("data.filter_empty: looking for objects in %d records", len(reader))
  is_empty_N = np.array([not len(trainable(read(reader, i))) for i in range(len(reader))])
  logging.info("%d images without an object are left out", np.count_nonzero(is_empty_N))
  if is_empty_N.all():
    raise UserError(
      f"data.filter_empty: no image of data.train_split={data.train_split!r} has an object to train on"
    )
  return np.where(is_empty_N, -1, bucket_N), canvases_K2


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
    Batches like those of `train_batches`, with images in float32 and without flips and gt_masks_BGmm. Where
    an image only fills up the last batch of a canvas, valid_B is False and image_id_B is -1. image_BHWC,
    size_B2 and gt_boxes_BG4 are those at the first of the shorter edges; `other_views` is a tuple with a
    dict of image_BHWC and size_B2 for each of the others.

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

  fields = fields_of(data, bitmaps=False)
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


def _assign(data: ml_collections.ConfigDict, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
  """Returns the index of each image's canvas, int [N], and the canvases, int [K, 2]."""
  sizes_N2 = np.array([canvases.resized_size(data, *size) for size in reader.sizes_N2])
  canvases_K2 = canvases.canvases(data, sizes_N2)
  return order.assign_buckets(sizes_N2, canvases_K2), canvases_K2
