"""Data sets on disk: prepared once as records, then read at random."""

import contextlib
import dataclasses
import functools
import io
import os

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from fpt_jax.data.datasets import ade20k, camvid, cityscapes, image_folder, lip, voc2012
from fpt_jax.data.datasets.coco import CocoInstances
from fpt_jax.data.datasets.context_shapes import ContextShapes
from fpt_jax.data.datasets.label_maps import LabelMaps
from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.label_map import LabelRecord
from fpt_jax.errors import UserError

_LABEL_MAPS = {
  layout.name: functools.partial(LabelMaps, layout)
  for layout in (ade20k.LAYOUT, camvid.LAYOUT, cityscapes.LAYOUT, lip.LAYOUT, voc2012.LAYOUT)
} | {"image_folder": image_folder.builder}
_INSTANCES = {"coco": CocoInstances, "context_shapes": ContextShapes}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What a prepared data set holds.

  Attributes:
    category_names: name of an instance's label 1, 2, ...; empty where there are no instances.
    category_ids: the data set's own id of label 1, 2, ...
    num_images: images of each split.
    class_names: name of a label map's class 0, 1, ...; empty where there are no label maps.
    palette: RGB of class 0, 1, ...
    swaps: pairs of classes that a mirrored image exchanges, such as the left and the right arm.
    has_masks: whether instances have masks; without, those of the records are the whole boxes.
  """

  category_names: tuple[str, ...]
  category_ids: tuple[int, ...]
  num_images: dict[str, int]
  class_names: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()
  swaps: tuple[tuple[int, int], ...] = ()
  has_masks: bool = True

  @property
  def num_classes(self) -> int:
    """Classes of a label map; `label_map.VOID` is none of them."""
    return len(self.class_names)


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
  metadata = builder.info.metadata
  return DatasetInfo(
    category_names=tuple(metadata.get("category_names", ())),
    category_ids=tuple(metadata.get("category_ids", ())),
    num_images={name: split.num_examples for name, split in builder.info.splits.items()},
    has_masks=metadata.get("has_masks", True),
    class_names=tuple(metadata.get("class_names", ())),
    palette=tuple(map(tuple, metadata.get("palette", ()))),
    swaps=tuple(map(tuple, metadata.get("swaps", ()))),
  )


def num_images(data: ml_collections.ConfigDict, split: str) -> int:
  """Counts the images of a split in TFDS syntax.

  Raises:
    UserError: the data are not prepared, or have no such split.
  """
  reader = Reader(data, split)
  reader.close()
  return len(reader)


class Reader:
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
    self._parse = label_map.parse if data.name in _LABEL_MAPS else instances.parse
    self._folder = builder.data_dir
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

  def read(self, index: int) -> instances.Record | LabelRecord:
    """Reads and parses one record, which is a `LabelRecord` where the data set has no instances."""
    try:
      return self._parse(self._records[index])
    except (ValueError, RuntimeError, IndexError, OSError) as error:
      reason = str(error).replace("\n", " ")
      raise UserError(
        f"{self.name(index)} cannot be read ({reason}); delete the folder and run --mode=prepare"
      ) from error

  def decode(self, index: int, record: instances.Record | LabelRecord) -> np.ndarray:
    """Returns the record's image, uint8 RGB."""
    try:
      return instances.decode_image(record.image)
    except ValueError as error:
      raise UserError(
        f"{self.name(index)}, image id {record.image_id}: {error}; delete the folder and run "
        "--mode=prepare"
      ) from error

  def close(self) -> None:
    """Closes the files."""
    self._records.__exit__(None, None, None)


def _builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  builders = _INSTANCES | _LABEL_MAPS
  if data.name not in builders:
    raise UserError(f"data.name={data.name!r} is no data set; known are {sorted(builders)}")
  directory = os.path.expanduser(data.data_dir)
  if "://" in directory:
    raise UserError(
      f"data.data_dir={data.data_dir}: records are read from a file system; mount the bucket, or "
      "prepare on the local disk"
    )
  arguments = {name: v for name, v in data.get("builder", {}).items() if v is not None}
  if data.name != "context_shapes":  # it is drawn, not read
    arguments |= {"source": data.source, "skip_bad": data.get("skip_bad", False)}
  own = {field: data[field] for field in ("annotations", "images") if data.get(field, "")}
  if own and data.name != "coco":
    raise UserError(f"data.{next(iter(own))} is of data.name='coco', not of {data.name!r}")
  arguments |= own
  try:
    return builders[data.name](data_dir=directory, **arguments)
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
