"""Data sets on disk: prepared once as records, and what is known about them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import weakref
from collections.abc import Iterator

import ml_collections
from absl import logging
from etils import epath, epy

from fpt_jax.data import bucket, datasets
from fpt_jax.data.datasets import inputs
from fpt_jax.errors import UserError, first_of, one_line
from fpt_jax.run import hosts
from fpt_jax.run.folder import check_writable, folder_of, is_full_disk, is_remote
from fpt_jax.run.lock import locked

with epy.lazy_imports():
  import tensorflow_datasets as tfds

_SHOWN_CHANGES = 3
# Builders of open readers. What their records were prepared from is not checked again: whoever edits an
# annotation file during a long training does not stop it at the next evaluation.
in_use: weakref.WeakSet[tfds.core.GeneratorBasedBuilder] = weakref.WeakSet()


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

  Records in a bucket are written to `data.cache_dir` first.

  Args:
    data: the config's `data`.

  Raises:
    UserError: something in the source is missing or bad, or the records cannot be written; no files are left
      behind. Or the records exist, and what they were prepared from, or the options, are not those of the
      config.
  """
  if not is_remote(_folder(data)):
    _prepare_here(data)
    return
  local, remote = epath.Path(_builder(data).data_dir), _in_bucket(data)
  if not bucket.manifest(remote):
    check_writable(remote)
    # processes of this machine, which share its disk, come one after another
    with locked(_local_folder(data), wait=True), locked(remote.parent, wait=True) as check_lock:
      if not bucket.manifest(remote):
        if local.exists():  # a copy of records that the bucket does not have any more
          local.rmtree()
        _prepare_here(data)
        check_lock()  # of two machines that begin at the same moment, one ends here
        bucket.write(local, remote)
        return
  bucket.copy(remote, local)
  _is_prepared_as_wanted(_builder(data))


def prepare_for_all_hosts(data: ml_collections.ConfigDict) -> None:
  """Writes the records of a data set unless they exist; all hosts call it, and wait for each other.

  In a bucket, the first host writes them, and each host copies them. In a file system, each host writes
  them; of hosts that share it, one does, and the others wait.

  Raises:
    UserError: see `prepare`; on every host.
  """

  def prepare_once() -> None:
    if not is_prepared(data):
      prepare(data)

  if not is_remote(_folder(data)):
    hosts.on_every_host(prepare_once)
    return
  hosts.on_first_host(prepare_once)
  hosts.on_every_host(lambda: bucket.copy(_in_bucket(data), epath.Path(_builder(data).data_dir)))


def _folder(data: ml_collections.ConfigDict) -> epath.Path:
  """Returns the folder that `data.data_dir` names, on a disk or in a bucket."""
  return folder_of("data.data_dir", data.data_dir)


def _local_folder(data: ml_collections.ConfigDict) -> epath.Path:
  """Returns the folder of the data sets on this machine's disk."""
  folder = _folder(data)
  if not is_remote(folder):
    return folder
  cache = folder_of("data.cache_dir", data.cache_dir)
  if is_remote(cache):
    raise UserError(f"data.cache_dir={data.cache_dir} must be a folder on a local disk")
  return cache / str(folder).replace("://", "/")


def _in_bucket(data: ml_collections.ConfigDict) -> epath.Path:
  """Returns the folder of a data set in the bucket that `data.data_dir` names."""
  local = epath.Path(_builder(data).data_dir)
  return _folder(data) / local.relative_to(_local_folder(data))


def _prepare_here(data: ml_collections.ConfigDict) -> None:
  """Writes the records of a data set to a disk, see `prepare`."""
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
  with undamaged(builder.data_dir):
    _check_inputs(builder)
  logging.info("already prepared: %s; delete the folder to prepare it again", builder.origin)
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
  if is_remote(_folder(data)):
    return bucket.manifest(_in_bucket(data)) is not None
  return _builder(data).is_prepared()


def info(data: ml_collections.ConfigDict) -> DatasetInfo:
  """Describes a prepared data set.

  Raises:
    UserError: the data set is not prepared, or was prepared from other inputs or with other options.
  """
  builder = prepared_builder(data)
  with undamaged(builder.data_dir):
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


def _builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  """Returns the TFDS builder of a data set on this machine's disk.

  Its attribute `origin` is the folder to delete to prepare the data set again, for messages.
  """
  names = sorted((*datasets.INSTANCES, *datasets.LABEL_MAPS))
  if data.name not in names:
    raise UserError(f"data.name={data.name!r} is not a data set; choose one of {names}")
  directory = str(_local_folder(data))
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
  if data.name == "coco":
    arguments["format"] = data.get("format", "coco")
  elif data.get("format", "coco") != "coco":
    raise UserError(
      f"data.format={data.format!r} is for data.name='coco', not for {data.name!r}; leave it at 'coco'"
    )
  builder = datasets.builder_of(data.name)
  with undamaged(f"{directory} (data.name={data.name!r})"):
    try:
      made = builder(data_dir=directory, **arguments)
    except TypeError as error:
      raise UserError(f"data.builder: {error}") from error
  made.origin = str(made.data_dir).replace(directory, str(_folder(data)), 1)
  return made


@contextlib.contextmanager
def undamaged(folder: str) -> Iterator[None]:
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


def prepared_builder(data: ml_collections.ConfigDict) -> tfds.core.GeneratorBasedBuilder:
  """Returns the TFDS builder of a prepared data set.

  Raises:
    UserError: the data set is not prepared, is damaged, or was prepared from other inputs or with other
      options.
  """
  builder = _builder(data)
  if is_remote(_folder(data)) and not any(_have_same_inputs(builder, b) for b in list(in_use)):
    bucket.copy(_in_bucket(data), epath.Path(builder.data_dir))
    builder = _builder(data)  # which sees the copy
  if not builder.is_prepared():
    raise UserError(f"data.data_dir: {builder.origin} is not prepared; run --mode=prepare")
  with undamaged(builder.data_dir):
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
  if any(_have_same_inputs(builder, other) for other in list(in_use)):
    return
  found = inputs.changes(builder)
  if found:
    made_from = "other inputs"
    if builder.source and builder.source != builder.info.metadata["source"]:
      made_from = f"{builder.info.metadata['source']}, not from data.source={builder.source}"
    raise UserError(
      f"data.data_dir: {builder.origin} was prepared from {made_from}: "
      f"{first_of(found, _SHOWN_CHANGES, '; ')}; delete this folder to prepare it again, or choose "
      "another data.data_dir"
    )


def _have_same_inputs(
  a: tfds.core.GeneratorBasedBuilder, b: tfds.core.GeneratorBasedBuilder
) -> bool:
  """Returns whether two builders read the same records with the same source and options."""
  fields = ("data_dir", "source", "options", "paths")
  return all(getattr(a, field, None) == getattr(b, field, None) for field in fields)
