"""The images that predictions and explanations are made for, and the names of their pictures."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.data.records.images import FORMATS, list_images, read_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.task import task_of


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


def subjects_of_files(files: list[pathlib.Path], *, exif: str, skip_bad: bool) -> Iterator[Subject]:
  """Yields the images in files.

  Args:
    files: image files.
    exif: `config.data.exif`.
    skip_bad: whether to log and skip files that cannot be read.

  Raises:
    UserError: a file cannot be read, and `skip_bad` is False.
  """
  bad = 0
  for file in files:
    try:
      image = read_image(file, exif=exif)
    except UserError as error:
      if not skip_bad:
        raise
      bad += 1
      logging.warning("skipped: %s", error)
      continue
    yield Subject(str(file), image, None)
  if bad:
    logging.warning("%d of %d files skipped", bad, len(files))


def subjects_of_split(config: ConfigDict) -> Iterator[Subject]:
  """Yields the images of `config.data.eval_split` with their ground truth."""
  yield from map(Subject._make, task_of(config).eval_images(config))


def image_files(paths: list[str]) -> list[pathlib.Path]:
  """Returns the files among `paths`, and the images in the folders among them, see `list_images`.

  Raises:
    UserError: a path does not exist, or a folder has no images.
  """
  files = []
  for path in map(pathlib.Path, paths):
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


def unused_path(folder: pathlib.Path, stem: str, taken: set[str]) -> pathlib.Path:
  """Returns folder/stem.png, or stem_2, stem_3, ... if images of several folders share a name.

  Args:
    folder: folder of the pictures.
    stem: name of the image file without its ending.
    taken: names that are in use. The chosen name is added, together with that of its label map;
      `contact_sheet` is never chosen.
  """
  candidate, number = stem, 1
  while not taken.isdisjoint((candidate, f"{candidate}_labels")) or candidate == "contact_sheet":
    number += 1
    candidate = f"{stem}_{number}"
  taken.update((candidate, f"{candidate}_labels"))
  return folder / f"{candidate}.png"
