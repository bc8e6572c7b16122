"""How the data sets of label maps lie on disk: their files, classes and colours."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from fpt_jax.data.records.images import list_images
from fpt_jax.errors import UserError

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


def pair_folders(images: pathlib.Path, labels: pathlib.Path) -> Pairs:
  """Pairs each image in one folder with the PNG of the same name in another, sorted by name.

  The log counts the files that are passed over, see `list_images`, and the PNGs without an image.

  Raises:
    UserError: a folder is missing.
  """
  _check_folder(images)
  _check_folder(labels)
  pairs = [(file, labels / f"{file.stem}.png") for file in list_images(images)]
  pngs = {file for file in list_folder(labels) if file.suffix == ".png"}
  alone = sorted(pngs - {label for _, label in pairs})
  if alone:
    logging.warning("%s: %d label files have no image, such as %s", labels, len(alone), alone[0])
  return pairs


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the contents of a folder, sorted by name, without hidden files.

  Raises:
    UserError: the folder does not exist.
  """
  _check_folder(folder)
  return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _check_folder(folder: pathlib.Path) -> None:
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; see data.source, data.builder.splits")


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
