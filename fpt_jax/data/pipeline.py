"""From prepared records to the batches of detection, and to COCO's ground truth.

B images of this host, G = `max_instances` ground truths, m pixels along the side of a bitmap.
"""

import atexit
import contextlib
import dataclasses
import io
import os
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import ml_collections
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from fpt_jax.data import order, records, transforms
from fpt_jax.data.coco import CocoInstances
from fpt_jax.data.context_shapes import ContextShapes
from fpt_jax.errors import UserError

_BUILDERS = {"coco": CocoInstances, "context_shapes": ContextShapes}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What a prepared data set holds.

  Attributes:
    category_names: name of label 1, 2, ...
    category_ids: the data set's own id of label 1, 2, ...
    num_images: images of each split.
  """

  category_names: tuple[str, ...]
  category_ids: tuple[int, ...]
  num_images: dict[str, int]


def prepare(data: ml_collections.ConfigDict) -> None:
  """Writes the records of a data set, once: what is there already is left alone.

  Args:
    data: the config's `data`.

  Raises:
    UserError: the source lacks or spoils something; nothing is left behind then.
  """
  builder = _builder(data)
  if builder.is_prepared():
    _check_source(data, builder)
    logging.info("already prepared: %s; delete the folder to prepare it anew", builder.data_dir)
    return
  if os.path.exists(builder.data_dir):
    raise UserError(f"data.data_dir: {builder.data_dir} is incomplete; delete it and prepare again")
  tfds.disable_progress_bar()
  logging.info("preparing %s in %s", data.name, builder.data_dir)
  with contextlib.redirect_stdout(io.StringIO()):  # our log tells it better
    builder.download_and_prepare()
  for split in builder.info.splits.values():
    logging.info("prepared %s: %d images", split.name, split.num_examples)


def is_prepared(data: ml_collections.ConfigDict) -> bool:
  """Returns whether the records of a data set are complete and can be read."""
  return _builder(data).is_prepared()


def info(data: ml_collections.ConfigDict) -> DatasetInfo:
  """Describes a prepared data set.

  Raises:
    UserError: it is not prepared.
  """
  builder = _prepared_builder(data)
  return DatasetInfo(
    category_names=tuple(builder.info.metadata["category_names"]),
    category_ids=tuple(builder.info.metadata["category_ids"]),
    num_images={name: split.num_examples for name, split in builder.info.splits.items()},
  )


class Batches:
  """An iterator over batches; close it, or use it as a context, to end its threads."""

  _open: ClassVar[weakref.WeakSet] = weakref.WeakSet()

  def __init__(self, dataset: tf.data.Dataset, reader: "_Reader", failures: list[Exception]):
    """Args: dicts of batched tensors, where the records come from, and why an image failed."""
    self._iterator = dataset.as_numpy_iterator()
    self._reader, self._failures = reader, failures
    Batches._open.add(self)

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      raise ValueError("these batches are closed")
    try:
      return next(self._iterator)
    except StopIteration:
      self.close()
      self._iterator = iter(())
      raise
    except tf.errors.OpError:
      self.close()
      if not self._failures:
        raise
    raise self._failures[0]

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the threads that read ahead; idempotent."""
    self._iterator = None
    self._reader.close()
    Batches._open.discard(self)


@atexit.register
def _close_all() -> None:
  # an iterator that outlives the interpreter's shutdown hangs it
  for batches in list(Batches._open):
    batches.close()


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
    seed: of the order of images and their augmentation.
    start_step: the first batch is that of this step.
    process_index: which host this is.
    process_count: of how many.

  Returns:
    batches of
      image_BHWC: float32 RGB 0..255, zero beyond the image's bottom and right edges.
      size_B2, original_size_B2: int32 (height, width), on the canvas and of the file.
      image_id_B: int64.
      valid_B: bool, all True.
      gt_boxes_BG4: float32 (x0, y0, x1, y1) in pixels of the canvas.
      gt_labels_BG: int32 in 1..num_classes, 0 where padded.
      gt_masks_BGmm: uint8 0/1 relative to the boxes.
      gt_valid_BG: bool; crowds are left out.

  Raises:
    UserError: the data are not prepared or do not fit the config; while iterating, a record or
      its image cannot be read.
  """
  reader = _Reader(data, data.train_split)
  low, high = _short_edges(data)
  bucket_N = _buckets(data, reader, high)
  stream = order.TrainOrder(bucket_N, seed=seed, batch_size=batch_size)
  share = order.host_share(batch_size, process_index, process_count)

  def plan(step: np.int64) -> tuple[np.ndarray, ...]:
    indices_B, bucket = stream.batch(int(step))
    positions_B = int(step) * batch_size + np.arange(batch_size)
    columns = (positions_B, indices_B, np.ones(batch_size, bool), np.full(batch_size, bucket))
    return tuple(column[share] for column in columns)

  def augment(position: int) -> tuple[int, bool]:
    short, mirrored = transforms.draw_augmentation(seed, position, (low, high))
    return short, mirrored and data.flip

  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  return _batches(data, reader, steps, plan, augment, share.stop - share.start, bitmaps=True)


def eval_batches(
  data: ml_collections.ConfigDict,
  split: str,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Reads this host's share of one pass over a split, every image once.

  Args:
    data: the config's `data`.
    split: in TFDS syntax, such as "val" or "train[:8]".
    batch_size: images of a global batch.
    process_index: which host this is.
    process_count: of how many; all get the same number of batches.

  Returns:
    batches as of `train_batches`, neither flipped nor with gt_masks_BGmm; valid_B is False, and
    image_id_B -1, where an image only fills up a bucket's last batch.

  Raises:
    UserError: as `train_batches`.
  """
  reader = _Reader(data, split)
  _, short = _short_edges(data)  # evaluation has one scale
  batches = order.eval_order(_buckets(data, reader, short), batch_size=batch_size)
  share = order.host_share(batch_size, process_index, process_count)

  def plan(step: np.int64) -> tuple[np.ndarray, ...]:
    indices_B, valid_B, bucket = batches[step]
    columns = (np.zeros(batch_size, int), indices_B, valid_B, np.full(batch_size, bucket))
    return tuple(column[share] for column in columns)

  def augment(_: int) -> tuple[int, bool]:
    return short, False

  steps = tf.data.Dataset.range(len(batches))
  return _batches(data, reader, steps, plan, augment, share.stop - share.start, bitmaps=False)


def coco_ground_truth(data: ml_collections.ConfigDict, split: str) -> dict:
  """Rebuilds the annotation file of a split from its records, without decoding an image.

  Args:
    data: the config's `data`.
    split: in TFDS syntax.

  Returns:
    COCO's `images`, `annotations` (segmentation, area, iscrowd, bbox as x, y, w, h, category_id as
    in the data set's own file) and `categories`.

  Raises:
    UserError: the data are not prepared, or a record cannot be read.
  """
  dataset = info(data)
  truth = {"images": [], "annotations": [], "categories": []}
  for category_id, name in zip(dataset.category_ids, dataset.category_names, strict=True):
    truth["categories"].append({"id": category_id, "name": name})
  reader = _Reader(data, split)
  for index in range(len(reader)):
    record = reader.read(index)
    height, width = record.size
    truth["images"].append(
      {"id": record.image_id, "file_name": record.file_name, "height": height, "width": width}
    )
    truth["annotations"] += _annotations(record, dataset.category_ids)
  reader.close()
  return truth


def images(
  data: ml_collections.ConfigDict, split: str
) -> Iterator[tuple[str, np.ndarray, list[dict]]]:
  """Reads the images of a split as they are in their files, to look at.

  Args:
    data: the config's `data`.
    split: in TFDS syntax.

  Yields:
    file name, uint8 RGB [H, W, 3], and the image's annotations as in `coco_ground_truth`.

  Raises:
    UserError: the data are not prepared, or a record or its image cannot be read.
  """
  category_ids = info(data).category_ids
  reader = _Reader(data, split)
  try:
    for index in range(len(reader)):
      record = reader.read(index)
      image_HWC = _decode(reader, index, record)
      yield record.file_name, image_HWC, _annotations(record, category_ids)
  finally:
    reader.close()


def _annotations(record: records.Record, category_ids: tuple[int, ...]) -> list[dict]:
  """The record's objects as COCO's annotation file has them."""
  return [
    records.decode_annotation(annotation)
    | {
      "id": int(record.annotation_ids[i]),
      "image_id": record.image_id,
      "category_id": category_ids[record.labels[i] - 1],
      "iscrowd": int(record.crowd[i]),
    }
    for i, annotation in enumerate(record.annotations)
  ]


def _decode(reader: "_Reader", index: int, record: records.Record) -> np.ndarray:
  """The record's image, uint8 RGB."""
  try:
    return records.decode_image(record.image)
  except ValueError as error:
    raise UserError(
      f"{reader.name(index)}, image id {record.image_id}: {error}; delete the folder and run "
      "--mode=prepare"
    ) from error


def _builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  if data.name not in _BUILDERS:
    raise UserError(f"data.name={data.name!r} is no data set; known are {sorted(_BUILDERS)}")
  directory = os.path.expanduser(data.data_dir)
  if "://" in directory:
    raise UserError(
      f"data.data_dir={data.data_dir}: records are read from a file system; mount the bucket, or "
      "prepare on the local disk"
    )
  arguments = dict(data.get("builder", {}))
  if data.name == "coco":
    arguments |= {"source": data.source, "skip_bad": data.get("skip_bad", False)}
  try:
    return _BUILDERS[data.name](data_dir=directory, **arguments)
  except TypeError as error:
    raise UserError(f"data.builder: {error}") from error


def _prepared_builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  builder = _builder(data)
  if not builder.is_prepared():
    raise UserError(f"data.data_dir: {builder.data_dir} is not prepared; run with --mode=prepare")
  _check_source(data, builder)
  return builder


def _check_source(
  data: ml_collections.ConfigDict, builder: tfds.core.GeneratorBasedBuilder
) -> None:
  made_from = builder.info.metadata["source"]
  asked = os.path.abspath(os.path.expanduser(data.source)) if data.source else ""
  if asked and asked != made_from:
    raise UserError(
      f"data.data_dir: {builder.data_dir} was prepared from {made_from}, not from "
      f"data.source={asked}; choose another data.data_dir"
    )


class _Reader:
  """Random access to the records of a split."""

  def __init__(self, data: ml_collections.ConfigDict, split: str):
    builder = _prepared_builder(data)
    metadata, splits = builder.info.metadata, builder.info.splits
    try:
      parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
      self._records = builder.as_data_source(split).data_source
    except (ValueError, KeyError, AssertionError) as error:
      raise UserError(
        f"split {split!r} cannot be read from {builder.data_dir}; it holds {sorted(splits)}, "
        'and parts of them such as "train[:8]"'
      ) from error
    self._split, self._folder = split, builder.data_dir
    # the split and place of each record, so that an error can name it
    self._places = [
      (part.splitname, i)
      for part in parts
      for i in range(splits[part.splitname].num_examples)[part.from_ : part.to]
    ]
    self.sizes_N2 = np.array([metadata["sizes"][name][i] for name, i in self._places])

  def __len__(self) -> int:
    return len(self._places)

  def name(self, index: int) -> str:
    """Returns what a record is called in messages."""
    split, place = self._places[index]
    return f"record {place} of split {split} in {self._folder}"

  def read(self, index: int) -> records.Record:
    """Reads and parses one record."""
    try:
      return records.parse(self._records[index])
    except (ValueError, RuntimeError, IndexError, OSError) as error:
      reason = str(error).replace("\n", " ")
      raise UserError(
        f"{self.name(index)} cannot be read ({reason}); delete the folder and run --mode=prepare"
      ) from error

  def close(self) -> None:
    """Closes the files."""
    self._records.__exit__(None, None, None)


def _short_edges(data: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns the smallest and largest shorter edge to train at."""
  low, high = data.get("short_edge_min", 0) or data.short_edge, data.short_edge
  if not 0 < low <= high <= data.long_edge:
    raise UserError(
      f"data.short_edge={high} must be positive, at least data.short_edge_min={low} and at most "
      f"data.long_edge={data.long_edge}"
    )
  return low, high


def _buckets(data: ml_collections.ConfigDict, reader: _Reader, short: int) -> np.ndarray:
  """Returns each image's bucket at its largest; a smaller one of multi-scale training fits too."""
  sizes_N2 = [transforms.resized_size(h, w, short, data.long_edge) for h, w in reader.sizes_N2]
  return order.assign_buckets(np.array(sizes_N2), data.buckets)


def _batches(
  data: ml_collections.ConfigDict,
  reader: _Reader,
  steps: tf.data.Dataset,
  plan: Callable[[np.int64], tuple[np.ndarray, ...]],
  augment: Callable[[int], tuple[int, bool]],
  share: int,
  *,
  bitmaps: bool,
) -> Batches:
  """Turns steps into this host's batches: plan, then read, decode and resize image by image."""
  failures = []
  overfull = set()
  fields = {
    "image_BHWC": tf.uint8,
    "size_B2": tf.int32,
    "original_size_B2": tf.int32,
    "image_id_B": tf.int64,
    "valid_B": tf.bool,
    "gt_boxes_BG4": tf.float32,
    "gt_labels_BG": tf.int32,
    "gt_valid_BG": tf.bool,
  }
  shapes = [(None, None, 3), (2,), (2,), (), (), (data.max_instances, 4)]
  shapes += [(data.max_instances,)] * 2
  if bitmaps:
    fields["gt_masks_BGmm"] = tf.uint8
    shapes.append((data.max_instances, records.BITMAP, records.BITMAP))

  def load(position: int, index: int, valid: bool) -> list[np.ndarray]:
    try:
      short, mirrored = augment(int(position))
      example = _load(data, reader, int(index), short, mirrored, bitmaps, overfull)
    except Exception as error:  # carried around TensorFlow, which would keep its text alone
      failures.append(error)
      raise
    example["valid_B"] = np.bool_(valid)
    if not valid:
      example["image_id_B"] = np.int64(-1)
    return [example[name] for name in fields]

  def element(
    position: tf.Tensor, index: tf.Tensor, valid: tf.Tensor, bucket: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    values = tf.numpy_function(load, [position, index, valid], list(fields.values()))
    example = {
      name: tf.ensure_shape(value, shape)
      for name, value, shape in zip(fields, values, shapes, strict=True)
    }
    canvas = tf.gather(tf.constant(data.buckets, tf.int32), bucket)
    example["image_BHWC"] = transforms.resize_and_pad(
      example["image_BHWC"], example["size_B2"], canvas
    )
    return example

  dtypes = [tf.int64, tf.int64, tf.bool, tf.int64]
  workers = data.get("num_workers", 0) or os.cpu_count()
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = workers
  dataset = (
    steps.map(
      lambda step: tuple(
        tf.ensure_shape(column, (share,)) for column in tf.numpy_function(plan, [step], dtypes)
      )
    )
    .unbatch()
    .map(element, num_parallel_calls=workers, deterministic=True)
    .batch(share, drop_remainder=True)
    .prefetch(data.get("prefetch", 2))
    .with_options(options)
  )
  return Batches(dataset, reader, failures)


def _load(
  data: ml_collections.ConfigDict,
  reader: _Reader,
  index: int,
  short: int,
  mirrored: bool,
  with_bitmaps: bool,
  overfull: set[int],
) -> dict[str, np.ndarray]:
  """Reads one image and its padded ground truth; the image itself is not resized yet."""
  record = reader.read(index)
  image_HWC = _decode(reader, index, record)
  size = transforms.resized_size(*record.size, short, data.long_edge)

  x0_G, y0_G, x1_G, y1_G = record.boxes.T
  areas_G = (x1_G - x0_G) * (y1_G - y0_G)
  kept = np.flatnonzero(~record.crowd & (areas_G > 0))
  if len(kept) > data.max_instances:
    if record.image_id not in overfull:
      overfull.add(record.image_id)
      logging.warning(
        "image id %d (%s) has %d instances, the largest %d are kept (data.max_instances); "
        "%d such images so far",
        record.image_id,
        record.file_name,
        len(kept),
        data.max_instances,
        len(overfull),
      )
    largest = np.argsort(-areas_G[kept], kind="stable")[: data.max_instances]
    kept = kept[np.sort(largest)]
  bitmaps_Gmm = records.unpack_bitmaps([record.bitmaps[i] for i in kept if with_bitmaps])
  boxes_G4 = record.boxes[kept]
  if mirrored:
    image_HWC, boxes_G4, bitmaps_Gmm = transforms.flip(image_HWC, boxes_G4, bitmaps_Gmm)
  return {
    "image_BHWC": np.ascontiguousarray(image_HWC),
    "size_B2": np.array(size, np.int32),
    "original_size_B2": np.array(record.size, np.int32),
    "image_id_B": np.int64(record.image_id),
    "gt_boxes_BG4": _pad(transforms.scale_boxes(boxes_G4, record.size, size), data.max_instances),
    "gt_labels_BG": _pad(record.labels[kept], data.max_instances),
    "gt_valid_BG": np.arange(data.max_instances) < len(kept),
    "gt_masks_BGmm": _pad(bitmaps_Gmm, data.max_instances),
  }


def _pad(values_G: np.ndarray, count: int) -> np.ndarray:
  """Returns the values followed by zeros, `count` in all."""
  padded_G = np.zeros((count, *values_G.shape[1:]), values_G.dtype)
  padded_G[: len(values_G)] = values_G
  return padded_G
