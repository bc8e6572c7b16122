"""The files of a data set: its images, the label file of each, and how they are divided into splits."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from absl import logging

from fpt_jax.data.datasets import coco_json
from fpt_jax.data.datasets.formats.xml_tree import Element
from fpt_jax.data.records.images import ENDINGS
from fpt_jax.errors import UserError, one_line

# values of data.builder.splits: label folder or file, and image folder or list of images, of each split
Pairs = Mapping[str, tuple[str, str]]
# what folders and subsets of each split may be called
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation")}


@dataclasses.dataclass(frozen=True)
class Item:
  """An image and what has its objects.

  Attributes:
    image: the image file.
    label: its label file; None if it has none, and thus no object.
    element: the part of an XML file of all images that is about this one.
  """

  image: pathlib.Path
  label: pathlib.Path | None
  element: Element | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """The files of a split.

  Attributes:
    items: the images, sorted by path.
    alone: label files without an image.
    others: further files that were read, such as lists of classes.
  """

  items: list[Item]
  alone: list[pathlib.Path] = dataclasses.field(default_factory=list)
  others: list[pathlib.Path] = dataclasses.field(default_factory=list)

  def labels(self) -> list[pathlib.Path]:
    """Returns all files but the images, each once."""
    files = [item.label for item in self.items if item.label]
    return list(dict.fromkeys([*files, *self.alone, *self.others]))


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of all splits.

  Attributes:
    parts: the files of each split.
    names: names of the classes in order; None: those of the objects, sorted.
    names_file: the file that names them, for messages.
  """

  parts: dict[str, Part]
  names: list[str] | None
  names_file: pathlib.Path


def pair(
  images: Sequence[pathlib.Path], labels: pathlib.Path, root: pathlib.Path, ending: str
) -> Part:
  """Pairs images with the label files of the same name.

  Args:
    images: the image files.
    labels: folder of the label files, with the sub-folders that the images have inside `root`.
    root: folder of the images.
    ending: ending of a label file.

  Raises:
    UserError: two images have the same name but for the ending.
  """
  label_of = {_stem(file, labels): file for file in walk(labels, (ending,))}
  image_of: dict[str, pathlib.Path] = {}
  for image in images:
    other = image_of.setdefault(_stem(image, root), image)
    if other != image:
      raise UserError(
        f"{image} and {other.name} would have the same label file; rename one of them"
      )
  # beside images, the folders with images are those that have label files
  folders = {image.parent for image in images} if labels == root else None
  alone = [
    file
    for stem, file in label_of.items()
    if stem not in image_of and (folders is None or file.parent in folders)
  ]
  items = [Item(image, label_of.get(stem)) for stem, image in image_of.items()]
  return Part(sorted(items, key=lambda item: item.image), alone)


def _stem(file: pathlib.Path, folder: pathlib.Path) -> str:
  return os.path.splitext(os.path.relpath(file, folder))[0]


def images_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the images in a folder and its sub-folders, sorted by path.

  Raises:
    UserError: the folder does not exist or has none.
  """
  found = walk(folder, ENDINGS)
  if not found:
    raise UserError(f"{folder}: no image in it; see data.source, data.builder.splits")
  return found


def walk(folder: pathlib.Path, endings: Sequence[str]) -> list[pathlib.Path]:
  """Returns the files with certain endings in a folder and its sub-folders, sorted by path.

  Hidden files and folders are passed over.

  Raises:
    UserError: the folder does not exist.
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; see data.source, data.builder.splits")
  found = []
  for path, folders, names in os.walk(folder, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    found += [
      pathlib.Path(path, name)
      for name in names
      if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
    ]
  return sorted(found)


def first_folder(root: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
  """Returns the first folder with one of these names inside a folder, None if there is none."""
  return next((root / name for name in names if (root / name).is_dir()), None)


def split_folders(root: pathlib.Path) -> dict[str, pathlib.Path] | None:
  """Returns the folders `train` and `val` (or `valid`, `validation`) by split, None without `train`.

  Raises:
    UserError: there is `train`, but not the other.
  """
  train, val = (first_folder(root, names) for names in SPLIT_NAMES.values())
  if train is None:
    return None
  if val is None:
    raise UserError(
      f"{root}: folder train, but none of {', '.join(SPLIT_NAMES['val'])} beside it; add one, or set "
      "data.builder.splits"
    )
  return {"train": train, "val": val}


def divide(part: Part, where: object) -> dict[str, Part]:
  """Divides images into those to train on and those to evaluate: every tenth, sorted by path, is in "val".

  Label files without an image are in "train", where they are reported.

  Raises:
    UserError: there are fewer than two images.
  """
  if len(part.items) < 2:
    raise UserError(
      f"{where}: {len(part.items)} images cannot be divided into those to train on and those to "
      "evaluate; add some, or set data.builder.splits"
    )
  val = part.items[:: coco_json.EVERY]
  train = [item for i, item in enumerate(part.items) if i % coco_json.EVERY]
  logging.info("%s: %d of its %d images are for val", where, len(val), len(part.items))
  return {
    "train": Part(train, part.alone, part.others),
    "val": Part(val, [], part.others),
  }


def read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file without the space around them and without empty ones.

  Raises:
    UserError: it cannot be read, or is not text in UTF-8.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: not a readable text file ({one_line(error)}); replace it") from error
  return [line.strip() for line in text.splitlines() if line.strip()]


def class_list(root: pathlib.Path) -> tuple[list[str] | None, pathlib.Path]:
  """Returns the names in `labels.txt` of a folder, a class per line, and the file; None without the file.

  Raises:
    UserError: the file is empty or cannot be read.
  """
  file = root / "labels.txt"
  if not file.is_file():
    return None, root
  names = read_lines(file)
  if not names:
    raise UserError(f"{file}: is empty; write the name of a class on each line, or remove the file")
  return names, file


def common_folder(items: Sequence[Item]) -> pathlib.Path:
  """Returns the folder that holds all images, also in sub-folders."""
  return pathlib.Path(os.path.commonpath({item.image.parent for item in items}))
