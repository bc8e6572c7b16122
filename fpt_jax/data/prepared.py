"""Data sets on disk: prepared once as records, then read with random access."""

import contextlib
import dataclasses
import io
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from fpt_jax.data.datasets import BUILDERS, LABEL_MAPS, inputs
from fpt_jax.data.datasets.checks import listed
from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.images import decode_image
from fpt_jax.data.records.label_map import LabelRecord
from fpt_jax.errors import UserError, first_of, one_line
from fpt_jax.ops import masks
from fpt_jax.run.folder import check_writable, is_full_disk
from fpt_jax.run.lock import locked

_SHOWN_CHANGES = 3


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
      behind. Or the records exist, and what they were prepared from, or the options, are not those of the
      config.
  """
  builder = _builder(data)
  if _is_prepared_as_wanted(builder):
    return
  folder = epath.Path(builder.data_dir)
  check_writable(folder)
  # other processes wait: those of one machine, and those of several machines that share a disk
  with locked(folder.parent, wait=True):
    builder = _builder(data)  # which sees what another process has written
    if not _is_prepared_as_wanted(builder):
      _prepare(builder, data.name)


def _is_prepared_as_wanted(builder: tfds.core.GeneratorBasedBuilder) -> bool:
  if not builder.is_prepared():
    return False
  with _undamaged(builder.data_dir):
    _check_inputs(builder)
  logging.info("already prepared: %s; delete the folder to prepare it again", builder.data_dir)
  return True


def _prepare(builder: tfds.core.GeneratorBasedBuilder, name: str) -> None:
  folder = epath.Path(builder.data_dir)
  if folder.exists():
    raise UserError(f"data.data_dir: {folder} is incomplete; delete it and prepare again")
  for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
    logging.info("removed %s, which a preparation that was killed has left", left)
    left.rmtree()
  tfds.disable_progress_bar()
  logging.info("preparing %s in %s", name, builder.data_dir)
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
  """Returns whether a data set has complete records; `info` checks what they were prepared from."""
  return _builder(data).is_prepared()


def info(data: ml_collections.ConfigDict) -> DatasetInfo:
  """Describes a prepared data set.

  Raises:
    UserError: the data set is not prepared, or was prepared from other inputs or with other options.
  """
  builder = _prepared_builder(data)
  with _undamaged(builder.data_dir):
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


def digest(data: ml_collections.ConfigDict) -> str:
  """Returns a digest of what the images and annotations of `data.train_split` were prepared from.

  It is "" for drawn images, and for records of an earlier version.

  Raises:
    UserError: the data set is not prepared, or does not have the split.
  """
  with contextlib.closing(Reader(data, data.train_split)) as reader:
    builder, splits = reader.builder, reader.splits
  with _undamaged(builder.data_dir):
    noted = builder.info.metadata.get("inputs")
    return inputs.digest(noted, splits) if noted else ""


def check_trainable(data: ml_collections.ConfigDict) -> None:
  """Checks that there is something to train on in `data.train_split`.

  Args:
    data: the config's `data`.

  Raises:
    UserError: the data set is not prepared; its splits have no object that can be trained on; fewer
      than two classes have pixels; or a class of the user's image folders is in no label file.
  """
  with contextlib.closing(Reader(data, data.train_split)) as reader:
    builder, splits = reader.builder, reader.splits
  with _undamaged(builder.data_dir):
    _check_objects_and_classes(data, builder, splits)


def _check_objects_and_classes(
  data: ml_collections.ConfigDict,
  builder: tfds.core.GeneratorBasedBuilder,
  splits: Sequence[str],
) -> None:
  metadata = builder.info.metadata
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


def _examples(reader: "Reader", category_ids: np.ndarray) -> Iterator[dict[str, Any]]:
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

  # what these were prepared from is not checked again while they are open: whoever edits an annotation
  # file during a long training does not stop it at the next evaluation
  _open: ClassVar[weakref.WeakSet["Reader"]] = weakref.WeakSet()

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
    self.builder = builder
    Reader._open.add(self)

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

  def has_inputs_of(self, builder: tfds.core.GeneratorBasedBuilder) -> bool:
    """Returns whether another builder reads the same records with the same source and options."""
    mine = self.builder
    return all(
      getattr(mine, name, None) == getattr(builder, name, None)
      for name in ("data_dir", "source", "options", "paths")
    )

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
    Reader._open.discard(self)
    with contextlib.suppress(RuntimeError):  # of damaged files, which `read` reports
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
  if data.name == "context_shapes":
    if data.source:
      raise UserError(
        f"data.source={data.source}: the images of data.name='context_shapes' are drawn, not read; leave it "
        "empty, or choose another data.name"
      )
  else:
    arguments |= {"source": data.source, "skip_bad": data.skip_bad, "exif": data.exif}
  if "annotations" in data:
    paths = {field: data[field] for field in ("annotations", "images") if data[field]}
    if paths and data.name != "coco":
      field = next(iter(paths))
      raise UserError(
        f"data.{field} is for data.name='coco', not for {data.name!r}; leave it empty"
      )
    arguments |= paths
  with _undamaged(f"{directory} (data.name={data.name!r})"):
    try:
      return BUILDERS[data.name](data_dir=directory, **arguments)
    except TypeError as error:
      raise UserError(f"data.builder: {error}") from error


@contextlib.contextmanager
def _undamaged(folder: str) -> Iterator[None]:
  """Context for reading what a preparation has written.

  Raises:
    UserError: something in `folder` cannot be read.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # whatever TFDS and ArrayRecord make of damaged files
    reason = one_line(error, 200) or type(error).__name__
    raise UserError(
      f"data.data_dir: the records in {folder} are damaged ({reason}); delete the folder and prepare again"
    ) from error


def _prepared_builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  builder = _builder(data)
  if not builder.is_prepared():
    raise UserError(f"data.data_dir: {builder.data_dir} is not prepared; run --mode=prepare")
  with _undamaged(builder.data_dir):
    sizes = builder.info.metadata["sizes"]
    for name, split in builder.info.splits.items():
      if len(sizes.get(name, ())) != split.num_examples:
        raise ValueError(f"metadata.json does not have the images of split {name}")
    _check_inputs(builder)
  return builder


def _check_inputs(builder: tfds.core.GeneratorBasedBuilder) -> None:
  """Raises UserError if records were prepared from other inputs, or with other options."""
  # a builder without them reads no files, and has a folder for each combination of its options
  if not hasattr(builder, "changed_files"):
    return
  if any(reader.has_inputs_of(builder) for reader in list(Reader._open)):
    return
  found = inputs.changes(builder)
  if found:
    made_from = "other inputs"
    if builder.source and builder.source != builder.info.metadata["source"]:
      made_from = f"{builder.info.metadata['source']}, not from data.source={builder.source}"
    raise UserError(
      f"data.data_dir: {builder.data_dir} was prepared from {made_from}: "
      f"{first_of(found, _SHOWN_CHANGES, '; ')}; delete this folder to prepare it again, or choose "
      "another data.data_dir"
    )
