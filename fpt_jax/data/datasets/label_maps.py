"""What the data sets of images and label maps share: finding, checking and writing them."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError
from fpt_jax.run.progress import Progress

Color = tuple[int, int, int]
Pairs = list[tuple[pathlib.Path, pathlib.Path]]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")  # in any case; other files in a folder are passed over
_NAMED = 10  # skipped images of a kind that the log names


@dataclasses.dataclass(frozen=True)
class Layout:
  """A data set on disk.

  Attributes:
    name: as in `data.name`.
    class_names: name of class 0, 1, ...
    palette: RGB of class 0, 1, ...
    class_of_id: the class, or `VOID`, of each number that a label file may hold.
    splits: what is prepared unless the config says otherwise.
    pairs: of the source folder and a split, image and label files in order; a UserError where
      folders or lists are missing.
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
  """Turns images and label files into records, checking each."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    layout: Layout,
    *,
    data_dir: str,
    source: str = "",
    splits: Sequence[str] = (),
    skip_bad: bool = False,
  ):
    """Args:
    layout: of the source.
    data_dir: folder of prepared data; each data set has one of its own in it.
    source: folder of the official layout; needed to prepare only.
    splits: which to prepare; none: those of the layout.
    skip_bad: leave bad images and label maps out, naming them in the log.
    """
    self._layout = layout
    self._source = os.path.abspath(os.path.expanduser(source)) if source else ""
    self._splits = tuple(splits) or layout.splits
    self._skip_bad = skip_bad
    self._images = 0
    super().__init__(data_dir=os.path.join(data_dir, layout.name), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {
      "source": self._source,
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
    if not self._source:
      raise UserError("data.source is empty; set it to the folder that holds the data set")
    root = pathlib.Path(self._source)
    if not root.is_dir():
      raise UserError(f"data.source={root}: no such folder; download the data set there")
    pairs = {}
    for split in self._splits:
      if not split.isidentifier() or split == "all":
        raise UserError(f"data.builder.splits: {split!r} cannot name a split; use letters, not all")
      pairs[split] = self._layout.pairs(root, split)
      if not pairs[split]:
        raise UserError(f"{root}: split {split} has no image; add some, or see data.builder.splits")
    return {split: self._generate_examples(split, pairs[split]) for split in pairs}

  def _generate_examples(self, split: str, pairs: Pairs) -> Iterator[tuple[int, dict]]:
    sizes = self.info.metadata["sizes"][split] = []
    skipped = collections.Counter()
    progress = Progress(split, len(pairs))
    for image_file, label_file in pairs:
      self._images += 1
      try:
        example = _encode(image_file, label_file, self._images, self._layout.class_of_id)
      except _BadFileError as bad:
        if not self._skip_bad:
          raise UserError(f"{bad}; mend it, or leave such out with data.skip_bad=True") from bad
        skipped[bad.kind] += 1
        if skipped[bad.kind] <= _NAMED:
          logging.warning("skipped: %s", bad)
      else:
        yield instances.ordered_key(len(sizes), len(pairs)), example
        sizes.append([example["height"], example["width"]])
      progress.step()
    for kind, count in sorted(skipped.items()):
      logging.warning("prepare %s: %d skipped: %s", split, count, kind)
    if not sizes:
      raise UserError(f"{self._source}: split {split} has no good image; add some")


class _BadFileError(Exception):
  """Something wrong with an image or its labels; `kind` is what the log counts."""

  def __init__(self, file: pathlib.Path, kind: str, detail: str):
    super().__init__(f"{file}: {kind}: {detail}")
    self.kind = kind


def _encode(
  image_file: pathlib.Path,
  label_file: pathlib.Path,
  image_id: int,
  class_of_id: Mapping[int, int],
) -> dict:
  """Returns an image and its label map in the form of `label_map.features()`."""
  image = _read(image_file, "image cannot be read")
  try:
    size = instances.decode_image(image).shape[:2]
  except ValueError as error:
    raise _BadFileError(image_file, "image is broken", str(error)) from error
  png = _read(label_file, "labels cannot be read")
  try:
    ids_HW = label_map.decode_ids(png)
  except ValueError as error:
    raise _BadFileError(label_file, "labels are unusable", str(error)) from error
  if ids_HW.shape != size:
    raise _BadFileError(
      label_file,
      "labels are of another size than their image",
      "{}x{} (height x width), the image {}x{}".format(*ids_HW.shape, *size),
    )
  strange = sorted(set(np.unique(ids_HW).tolist()) - set(class_of_id))
  if strange:
    raise _BadFileError(label_file, "labels are out of range", f"{strange[:8]} are of no class")
  table = np.full(256, VOID, np.uint8)
  table[list(class_of_id)] = list(class_of_id.values())
  return {
    "image": image,
    "image_id": image_id,
    "file_name": image_file.name,
    "height": size[0],
    "width": size[1],
    "label": label_map.encode_label(table[ids_HW]),
  }


def _read(file: pathlib.Path, kind: str) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise _BadFileError(file, kind, error.strerror) from error


def pair_folders(images: pathlib.Path, labels: pathlib.Path) -> Pairs:
  """Pairs each image of a folder with the PNG of the same name in another, sorted by name.

  Raises:
    UserError: a folder is missing.
  """
  files = [file for file in list_folder(images) if file.suffix.lower() in IMAGE_ENDINGS]
  list_folder(labels)
  return [(file, labels / f"{file.stem}.png") for file in files]


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns what a folder holds, sorted by name, without hidden files.

  Raises:
    UserError: there is no such folder.
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; see data.source, data.builder.splits")
  return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def names(text: str) -> tuple[str, ...]:
  """Returns names written as "wall, pool table, ..."."""
  return tuple(text.split(", "))


def colors(hexadecimal: str) -> tuple[Color, ...]:
  """Returns RGB triples written as "ff8000 00ff00 ..."."""
  return tuple(tuple(bytes.fromhex(color)) for color in hexadecimal.split())


def numbered_colors(count: int) -> tuple[Color, ...]:
  """Returns the PASCAL VOC colours of the numbers 0..count-1, black first.

  Three bits of the number at a time go, lowest first, to the highest bits of red, green and blue.
  """
  palette = np.zeros((count, 3), int)
  for bit in range(8):
    for channel in range(3):
      palette[:, channel] |= (np.arange(count) >> (3 * bit + channel) & 1) << (7 - bit)
  return tuple(tuple(color) for color in palette.tolist())
