"""What the data sets of images and label maps share: finding, checking and writing them."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fpt_jax.data.datasets import inputs
from fpt_jax.data.datasets.checks import (
  BadRecordError,
  BadRecords,
  absolute,
  check_split_name,
  source_folder,
)
from fpt_jax.data.records import label_map
from fpt_jax.data.records.examples import ordered_key
from fpt_jax.data.records.images import DATASET_ENDINGS, decode_image, encode_png
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError
from fpt_jax.run.progress import Progress

Color = tuple[int, int, int]
Pairs = list[tuple[pathlib.Path, pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The files and classes of a data set.

  Attributes:
    name: value of `data.name`.
    class_names: names of the classes 0, 1, ...
    palette: RGB colours of the classes 0, 1, ...
    class_of_id: the class, or `VOID`, of each number that a label file may hold.
    splits: splits that are prepared unless the config names others.
    pairs: function from the source folder and a split to the image and label files, in order. It
      raises UserError if folders or lists are missing.
    swaps: pairs of classes that a mirrored image exchanges, such as the left and the right arm.
  """

  name: str
  class_names: tuple[str, ...]
  palette: tuple[Color, ...]
  class_of_id: Mapping[int, int]
  splits: tuple[str, ...]
  pairs: Callable[[pathlib.Path, str], Pairs]
  swaps: tuple[tuple[int, int], ...] = ()


class LabelMaps(tfds.core.GeneratorBasedBuilder):
  """Turns images and label files into records, checking each.

  Args:
    layout: layout of the source.
    data_dir: folder of prepared data; each data set has a folder inside it.
    source: folder of the official layout; only preparing needs it.
    splits: splits to prepare; () for those of the layout.
    skip_bad: whether to leave out bad images and label maps, and to name them in the log.
    options: values of the config that the layout was made from, by field; None for a fixed layout.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    layout: Layout,
    *,
    data_dir: str,
    source: str = "",
    splits: Sequence[str] = (),
    skip_bad: bool = False,
    options: Mapping[str, object] | None = None,
  ):
    self._layout = layout
    self.source = absolute(source)
    self.root = pathlib.Path(self.source) if source else None
    if isinstance(splits, str) or not all(isinstance(split, str) for split in splits):
      raise UserError(f"data.builder.splits={splits!r} must be names, such as ('train', 'val')")
    self._splits = tuple(splits) or layout.splits
    self._skip_bad = skip_bad
    self._images = 0
    if options is None:  # JSON has no integers as keys
      classes = sorted(layout.class_of_id.items())
      options = {
        "the layout's class_names": layout.class_names,
        "the layout's class_of_id": classes,
      }
    self.options: dict[str, object] = {
      "data.builder.splits": self._splits,
      "data.skip_bad": skip_bad,
      **options,
    }
    self.paths: dict[str, object] = {}
    super().__init__(data_dir=os.path.join(data_dir, layout.name), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {
      "source": self.source,
      "inputs": inputs.start(self),
      "class_names": self._layout.class_names,
      "palette": self._layout.palette,
      "swaps": self._layout.swaps,
      "sizes": {},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with label maps.",
      features=label_map.features(),
      metadata=tfds.core.MetadataDict(metadata),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    root = source_folder(self.source)
    pairs = {}
    for split in self._splits:
      check_split_name(split)
      pairs[split] = self._layout.pairs(root, split)
      if not pairs[split]:
        raise UserError(f"{root}: split {split} has no image; add some, or see data.builder.splits")
    return {split: self._generate_examples(split, pairs[split]) for split in pairs}

  def _generate_examples(self, split: str, pairs: Pairs) -> Iterator[tuple[int, dict]]:
    sizes: list[list[int]] = []
    notes: dict[str, dict[str, inputs.Note]] = {"images": {}, "labels": {}}
    self.info.metadata["sizes"][split] = sizes
    self.info.metadata["inputs"]["files"][split] = notes
    bad = BadRecords(skip=self._skip_bad)
    with Progress(f"prepare {split}", len(pairs)) as progress:
      for image_file, label_file in pairs:
        self._images += 1
        with bad.record():
          example = _encode(image_file, label_file, self._images, self._layout.class_of_id)
          yield ordered_key(len(sizes), len(pairs)), example
          sizes.append([example["height"], example["width"]])
        for kind, file in (("images", image_file), ("labels", label_file)):
          notes[kind][self._name(file)] = inputs.note(file)
        progress.advance()
    bad.report(split)
    if not sizes:
      raise UserError(f"{self.source}: split {split} has no good image; add some")

  def changed_files(self, notes: Mapping[str, Any], *, moved: bool) -> list[str]:
    """See `inputs.Builder.changed_files`.

    Raises:
      UserError: a folder or list is missing in another source than the one that was prepared.
    """
    found: list[str] = []
    for split in self._splits:
      try:
        pairs = self._layout.pairs(pathlib.Path(self.source), split)
      except UserError as error:
        if moved:
          raise
        inputs.warn_once(f"{error}; the records of split {split} are used nevertheless")
        continue
      for kind, files in zip(("images", "labels"), zip(*pairs, strict=True), strict=False):
        paths = {self._name(file): file for file in files}
        found += inputs.changed_files(notes[split][kind], paths, sample=kind == "images")
      if not pairs:
        found.append(f"split {split} has no image any more")
    return found

  def _name(self, file: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(file, self.source)).as_posix()


def _encode(
  image_file: pathlib.Path,
  label_file: pathlib.Path,
  image_id: int,
  class_of_id: Mapping[int, int],
) -> dict:
  """Returns an image and its label map in the form of `label_map.features()`."""
  image = _read(image_file, "image cannot be read")
  try:
    size = decode_image(image).shape[:2]
  except ValueError as error:
    raise BadRecordError("image is broken", str(error), image_file) from error
  return {
    "image": image,
    "image_id": image_id,
    "file_name": image_file.name,
    "height": size[0],
    "width": size[1],
    "label": encode_png(_read_classes(label_file, size, class_of_id)),
  }


def _read_classes(
  file: pathlib.Path, size: tuple[int, ...], class_of_id: Mapping[int, int]
) -> np.ndarray:
  """Returns the label map of an image of `size` in classes and `VOID`, uint8."""
  png = _read(file, "labels cannot be read")
  try:
    ids_HW = label_map.decode_ids(png)
  except ValueError as error:
    raise BadRecordError("labels are unusable", str(error), file) from error
  if ids_HW.shape != size:
    raise BadRecordError(
      "labels are not of the size of their image",
      "{}x{} (height x width), but the image is {}x{}".format(*ids_HW.shape, *size),
      file,
    )
  unknown = sorted(set(np.unique(ids_HW).tolist()) - set(class_of_id))
  if unknown:
    raise BadRecordError("labels are out of range", f"{unknown[:8]} belong to no class", file)
  table = np.full(256, VOID, np.uint8)
  table[list(class_of_id)] = list(class_of_id.values())
  return table[ids_HW]


def _read(file: pathlib.Path, kind: str) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise BadRecordError(kind, error.strerror or str(error), file) from error


def pair_folders(images: pathlib.Path, labels: pathlib.Path) -> Pairs:
  """Pairs each image in one folder with the PNG of the same name in another, sorted by name.

  Files without one of `DATASET_ENDINGS` are ignored.

  Raises:
    UserError: a folder is missing.
  """
  files = [file for file in list_folder(images) if file.suffix.lower() in DATASET_ENDINGS]
  list_folder(labels)
  return [(file, labels / f"{file.stem}.png") for file in files]


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the contents of a folder, sorted by name, without hidden files.

  Raises:
    UserError: the folder does not exist.
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; see data.source, data.builder.splits")
  return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def names(text: str) -> tuple[str, ...]:
  """Returns names written as "wall, pool table, ..."."""
  return tuple(text.split(", "))


def colors(hexadecimal: str) -> tuple[Color, ...]:
  """Returns RGB triples written as "ff8000 00ff00 ..."."""
  values = (bytes.fromhex(color) for color in hexadecimal.split())
  return tuple((red, green, blue) for red, green, blue in values)


def numbered_colors(count: int) -> tuple[Color, ...]:
  """Returns the PASCAL VOC colours of the numbers 0..count-1, black first.

  Three bits of the number at a time, lowest first, become the highest bits of red, green and blue.
  """
  palette = np.zeros((count, 3), int)
  for bit in range(8):
    for channel in range(3):
      palette[:, channel] |= (np.arange(count) >> (3 * bit + channel) & 1) << (7 - bit)
  return tuple(tuple(color) for color in palette.tolist())
