"""Data sets on disk: prepared once as records, then read with random access."""

import contextlib
import dataclasses
import io
import os

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from fpt_jax.data.datasets import BUILDERS, LABEL_MAPS
from fpt_jax.data.datasets.checks import absolute, listed
from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.images import decode_image
from fpt_jax.data.records.label_map import LabelRecord
from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import check_writable, is_full_disk


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Description of a prepared data set.

  Attributes:
    category_names: names of the instances' labels 1, 2, ...; () if there are no instances.
    category_ids: ids of the labels 1, 2, ... in the data set.
    num_images: number of images of each split.
    class_names: names of the label maps' classes 0, 1, ...; () if there are no label maps.
    palette: RGB colours of the classes 0, 1, ...
    swaps: pairs of classes that a mirrored image exchanges, such as the left and the right arm.
    has_masks: whether instances have masks; if not, the masks in the records are the whole boxes.
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
    """Number of classes of a label map, without `VOID`."""
    return len(self.class_names)


def prepare(data: ml_collections.ConfigDict) -> None:
  """Writes the records of a data set, unless they exist already.

  Args:
    data: the config's `data`.

  Raises:
    UserError: something in the source is missing or bad, or the records cannot be written; no files are left
      behind.
  """
  builder = _builder(data)
  if builder.is_prepared():
    _check_source(data, builder)
    logging.info("already prepared: %s; delete the folder to prepare it again", builder.data_dir)
    return
  if os.path.exists(builder.data_dir):
    raise UserError(f"data.data_dir: {builder.data_dir} is incomplete; delete it and prepare again")
  check_writable(epath.Path(builder.data_dir))
  tfds.disable_progress_bar()
  logging.info("preparing %s in %s", data.name, builder.data_dir)
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # the log says the same
      builder.download_and_prepare()
  except (OSError, RuntimeError) as error:
    if not is_full_disk(error):
      raise
    raise UserError(
      f"data.data_dir: {builder.data_dir} cannot be written (the disk is full); free some space, or choose "
      "another data.data_dir"
    ) from error
  for split in builder.info.splits.values():
    logging.info("prepared %s: %d images", split.name, split.num_examples)


def is_prepared(data: ml_collections.ConfigDict) -> bool:
  """Returns whether the records of a data set are complete and can be read."""
  return _builder(data).is_prepared()


def info(data: ml_collections.ConfigDict) -> DatasetInfo:
  """Describes a prepared data set.

  Raises:
    UserError: the data set is not prepared.
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


def check_trainable(data: ml_collections.ConfigDict) -> None:
  """Checks that there is something to train on in `data.train_split`.

  Args:
    data: the config's `data`.

  Raises:
    UserError: the data set is not prepared; its splits have no object that can be trained on; fewer
      than two classes have pixels; or a class of the user's image folders is in no label file.
  """
  builder = _prepared_builder(data)
  metadata = builder.info.metadata
  with contextlib.closing(Reader(data, data.train_split)) as reader:
    splits = reader.splits
  where = f"data.train_split={data.train_split!r} of {builder.data_dir}"
  # absent for drawn data
  objects, pixels = metadata.get("objects", {}), metadata.get("class_pixels", {})
  if objects and not sum(objects[split] for split in splits):
    raise UserError(
      f"{where} has no object to train on, only crowds or images without annotations; add annotations "
      "and prepare again, in another data.data_dir"
    )
  if not pixels:
    return
  trained = np.sum([pixels[split][:-1] for split in splits], axis=0)
  if np.count_nonzero(trained) < 2:
    raise UserError(
      f"{where} has label maps with pixels of {np.count_nonzero(trained)} of {len(trained)} classes, "
      "and training needs two; correct the label files and prepare again, in another data.data_dir"
    )
  anywhere = np.sum([counts[:-1] for counts in pixels.values()], axis=0)
  # the benchmarks' lists of classes are fixed, and parts of them may lack a class
  if data.name == "image_folder" and not anywhere.all():
    absent = [metadata["class_names"][i] for i in np.flatnonzero(anywhere == 0)]
    raise UserError(
      f"{builder.data_dir}: no label file has a pixel of {len(absent)} of {len(anywhere)} classes: "
      f"{listed(absent)}; correct data.builder.num_classes, class_names or the label files, and prepare "
      "again, in another data.data_dir"
    )


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
    builder = _prepared_builder(data)
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
    try:
      image_HWC = decode_image(record.image, exif=self._exif)
      if image_HWC.shape[:2] != tuple(record.size):  # prepared by a version that ignored EXIF data
        raise ValueError(f"its size is {image_HWC.shape[:2]}, not {record.size} as in the record")
      return image_HWC
    except ValueError as error:
      raise UserError(
        f"{self.name(index)}, image id {record.image_id}: {error}; delete the folder and run "
        "--mode=prepare"
      ) from error

  def close(self) -> None:
    """Closes the files."""
    self._records.__exit__(None, None, None)


def _builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  if data.name not in BUILDERS:
    raise UserError(f"data.name={data.name!r} is not a data set; choose one of {sorted(BUILDERS)}")
  directory = os.path.expanduser(data.data_dir)
  if "://" in directory:
    raise UserError(
      f"data.data_dir={data.data_dir}: records are read from a file system; mount the bucket, or "
      "prepare on the local disk"
    )
  arguments = {name: value for name, value in data.builder.to_dict().items() if value is not None}
  if data.name != "context_shapes":  # it is drawn, not read
    arguments |= {"source": data.source, "skip_bad": data.skip_bad, "exif": data.exif}
  if "annotations" in data:
    paths = {field: data[field] for field in ("annotations", "images") if data[field]}
    if paths and data.name != "coco":
      field = next(iter(paths))
      raise UserError(
        f"data.{field} is for data.name='coco', not for {data.name!r}; leave it empty"
      )
    arguments |= paths
  try:
    return BUILDERS[data.name](data_dir=directory, **arguments)
  except TypeError as error:
    raise UserError(f"data.builder: {error}") from error


def _prepared_builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  builder = _builder(data)
  if not builder.is_prepared():
    raise UserError(f"data.data_dir: {builder.data_dir} is not prepared; run --mode=prepare")
  _check_source(data, builder)
  return builder


def _check_source(
  data: ml_collections.ConfigDict, builder: tfds.core.GeneratorBasedBuilder
) -> None:
  made_from = builder.info.metadata["source"]
  source = absolute(data.source)
  if source and source != made_from:
    raise UserError(
      f"data.data_dir: {builder.data_dir} was prepared from {made_from}, not from "
      f"data.source={source}; choose another data.data_dir"
    )
  exif = builder.info.metadata.get("exif", data.exif)
  if exif != data.exif:
    raise UserError(
      f"data.data_dir: {builder.data_dir} was prepared with data.exif={exif!r}, not "
      f"{data.exif!r}; choose another data.data_dir, or delete the folder to prepare it again"
    )
