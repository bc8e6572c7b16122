"""The images that predictions and explanations are made for, and the names of their pictures."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from fpt_jax.data.records.images import FORMATS, list_images, read_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.task import task_of

MAX_STEM_BYTES = 220  # of at most 255 of a file's name


class Subject(NamedTuple):
  """An image to make a prediction for.

  Attributes:
    name: name of its file.
    image_HWC: uint8 RGB.
    truth: its ground truth as `Task.eval_images` yields it, or None.
  """

  name: str
  image_HWC: np.ndarray
  truth: Any


def subjects_of_files(
  files: list[pathlib.Path], *, exif: str, skip_bad: bool
) -> Iterator[Subject | UserError]:
  """Yields the images in files; in the place of a file that cannot be read, the error.

  Args:
    files: image files.
    exif: `config.data.exif`.
    skip_bad: whether to log and skip files that cannot be read instead.

  Raises:
    UserError: all files were skipped.
  """
  bad = 0
  for file in files:
    try:
      image = read_image(file, exif=exif)
    except UserError as error:
      if not skip_bad:
        yield error
        continue
      bad += 1
      logging.warning("skipped: %s", error)
      continue
    yield Subject(str(file), image, None)
  if bad:
    logging.warning("%d of %d files skipped", bad, len(files))
    if bad == len(files):
      raise UserError(f"--images: none of the {bad} files is a readable image")


class LeftOut:
  """The images that could not be used, while work goes on with the others."""

  def __init__(self) -> None:
    self._errors: list[UserError] = []

  def add(self, error: UserError) -> None:
    """Logs what is wrong with an image."""
    logging.error("%s", error)
    self._errors.append(error)

  def check(self, done: int, out: object) -> None:
    """Checks, at the end of the work, that no image was left out.

    Args:
      done: number of images that were not left out.
      out: where their results are.

    Raises:
      UserError: images were left out; the message has their number and what is wrong with the first.
    """
    if self._errors:
      bad = len(self._errors)
      rest = f"the results of the others are in {out}" if done else "nothing was written"
      first = f"the first is: {self._errors[0]}"
      raise UserError(f"bad images: {bad} of {bad + done}; {rest}; {first}")


def subjects_of_split(config: ConfigDict) -> Iterator[Subject]:
  """Yields the images of `config.data.eval_split` with their ground truth."""
  yield from map(Subject._make, task_of(config).eval_images(config))


def image_files(paths: list[str]) -> list[pathlib.Path]:
  """Returns the files among `paths`, and the images in the folders among them, see `list_images`.

  Raises:
    UserError: a path does not exist, or a folder has no images.
  """
  files = []
  for given in paths:
    if "://" in given:
      raise UserError(f"--images: {given} is not in a file system; copy the images to a disk")
    path = pathlib.Path(os.path.expanduser(given))
    if path.is_dir():
      inside = list_images(path)
      if not inside:
        raise UserError(f"--images: {path} has no images ({', '.join(FORMATS)})")
      files += inside
    elif path.exists():
      files.append(path)
    else:
      raise UserError(f"--images: {path} does not exist")
  return files


def unused_path(folder: epath.Path, stem: str, taken: set[str]) -> epath.Path:
  """Returns folder/stem.png, or stem_2, stem_3, ... if images of several folders share a name.

  Args:
    folder: folder of the pictures.
    stem: name of the image file without its ending. It is shortened to leave room for other endings.
    taken: names that are in use. The chosen name is added, together with that of its label map;
      `contact_sheet` is never chosen.
  """
  # file systems limit a name in bytes: the cut may leave a part of a character. Bytes of a name that are not
  # UTF-8 are surrogates in `stem`, which few file systems take.
  stem = stem.encode(errors="ignore")[:MAX_STEM_BYTES].decode(errors="ignore") or "image"
  candidate, number = stem, 1
  while not taken.isdisjoint((candidate, f"{candidate}_labels")) or candidate == "contact_sheet":
    number += 1
    candidate = f"{stem}_{number}"
  taken.update((candidate, f"{candidate}_labels"))
  return folder / f"{candidate}.png"
