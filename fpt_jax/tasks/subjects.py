"""The images that predictions and explanations are made for, and the names of their pictures."""

import concurrent.futures
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from fpt_jax.data.records import videos
from fpt_jax.data.records.images import FORMATS, list_images, read_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.task import task_of

MAX_STEM_BYTES = 220  # of at most 255 of a file's name
FRAME_BYTES = 200  # which leaves room for the number of a frame


class Subject(NamedTuple):
  """An image to make a prediction for.

  Attributes:
    name: name of its file.
    image_HWC: uint8 RGB.
    truth: its ground truth as `Task.eval_images` yields it, or None.
    frame: its number in the video `name`, from 0, or None for the image of a file.
    seconds: when the video shows it, after the first frame.
  """

  name: str
  image_HWC: np.ndarray
  truth: Any
  frame: int | None = None
  seconds: float | None = None

  @property
  def stem(self) -> str:
    """The name of its pictures without their ending, see `unused_path`."""
    stem = pathlib.Path(self.name).stem
    return stem if self.frame is None else f"{_shortened(stem, FRAME_BYTES)}_{self.frame:06d}"

  @property
  def place(self) -> dict[str, Any]:
    """What an entry in JSON has besides the file's name."""
    return {} if self.frame is None else {"frame": self.frame, "seconds": self.seconds}


def subjects_of_files(
  files: list[pathlib.Path], *, exif: str, skip_bad: bool
) -> Iterator[Subject | UserError]:
  """Yields the images and the frames of videos in files; where a file cannot be read, the error.

  Args:
    files: files of images and videos.
    exif: `config.data.exif`; it decides too whether frames are turned upright.
    skip_bad: whether to log and skip files that cannot be read instead.

  Raises:
    UserError: all files were skipped.
  """
  bad = good = 0
  for file in files:
    for subject in _subjects_of_file(file, exif):
      if skip_bad and isinstance(subject, UserError):
        bad += 1
        logging.warning("skipped: %s", subject)
      else:
        good += 1
        yield subject
  if bad:
    logging.warning("%d of %d files skipped", bad, len(files))
    if not good:
      raise UserError(f"none of the {bad} files is a readable image")


def _subjects_of_file(file: pathlib.Path, exif: str) -> Iterator[Subject | UserError]:
  try:
    if videos.is_video(file):
      for frame in videos.frames(file, upright=exif == "apply"):
        yield Subject(str(file), frame.pixels_HWC, None, frame.number, frame.seconds)
    else:
      yield Subject(str(file), read_image(file, exif=exif), None)
  except UserError as error:
    yield error


def num_subjects(files: list[pathlib.Path]) -> int:
  """Returns the number of images and frames in files; a video that cannot be read counts as one."""

  def count(file: pathlib.Path) -> int:
    try:
      return videos.num_frames(file) if videos.is_video(file) else 1
    except UserError:
      return 1

  return sum(map(count, files))


def read_ahead(subjects: Iterator[Subject | UserError]) -> Iterator[Subject | UserError]:
  """Yields the same while a thread reads the next one."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    following = pool.submit(next, subjects, None)
    while (subject := following.result()) is not None:
      following = pool.submit(next, subjects, None)
      yield subject


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
  yield from itertools.starmap(Subject, task_of(config).eval_images(config))


def image_files(
  paths: Sequence[str | os.PathLike[str]], argument: str = "--images"
) -> list[pathlib.Path]:
  """Returns the files among `paths`, and the images in the folders among them, see `list_images`.

  Args:
    paths: images, videos and folders of images.
    argument: what messages call the paths.

  Raises:
    UserError: a path does not exist, a folder has no images, or there is a video and PyAV is not installed.
  """
  files = []
  for given in [os.fspath(path) for path in paths]:
    if "://" in given:
      raise UserError(f"{argument}: {given} is not in a file system; copy the images to a disk")
    path = pathlib.Path(os.path.expanduser(given))
    if path.is_dir():
      inside = list_images(path)
      if not inside:
        raise UserError(f"{argument}: {path} has no images ({', '.join(FORMATS)})")
      files += inside
    elif path.exists():
      files.append(path)
    else:
      raise UserError(f"{argument}: {path} does not exist")
  if any(map(videos.is_video, files)):
    videos.pyav()
  return files


def unused_path(folder: epath.Path, stem: str, taken: set[str]) -> epath.Path:
  """Returns folder/stem.png, or stem_2, stem_3, ... if images of several folders share a name.

  Args:
    folder: folder of the pictures.
    stem: name of the image file without its ending. It is shortened to leave room for other endings.
    taken: names that are in use. The chosen name is added, together with that of its label map;
      `contact_sheet` is never chosen.
  """
  stem = _shortened(stem, MAX_STEM_BYTES) or "image"
  candidate, number = stem, 1
  while not taken.isdisjoint((candidate, f"{candidate}_labels")) or candidate == "contact_sheet":
    number += 1
    candidate = f"{stem}_{number}"
  taken.update((candidate, f"{candidate}_labels"))
  return folder / f"{candidate}.png"


def _shortened(stem: str, most: int) -> str:
  """Returns the beginning of a name, at most a number of bytes of UTF-8."""
  # file systems limit a name in bytes: the cut may leave a part of a character. Bytes of a name that are not
  # UTF-8 are surrogates in `stem`, which few file systems take.
  return stem.encode(errors="ignore")[:most].decode(errors="ignore")
