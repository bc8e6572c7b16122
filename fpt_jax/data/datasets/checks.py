"""Checks that the builders share: the source folder, names of splits, and bad records."""

import collections
import contextlib
import os
import pathlib
from collections.abc import Iterator

from absl import logging

from fpt_jax.errors import UserError

_PIXELS = {"apply": "upright", "ignore": "stored"}  # that annotations are of, by data.exif
_NAMED = 10  # bad records of a kind that the log names; all of them are counted


def absolute(path: str) -> str:
  """Returns a path without "~" and independent of the current folder; "" stays ""."""
  return os.path.abspath(os.path.expanduser(path)) if path else ""


def source_folder(source: str) -> pathlib.Path:
  """Returns the folder that a data set is prepared from.

  Raises:
    UserError: it is not given, or does not exist.
  """
  if not source:
    raise UserError("data.source is empty; set it to the folder that holds the data set")
  folder = pathlib.Path(source)
  if not folder.is_dir():
    raise UserError(f"data.source={folder}: no such folder; download the data set there")
  return folder


def check_split_name(split: str) -> None:
  """Raises UserError unless TFDS accepts the name for a split."""
  if not split.isidentifier() or split == "all":
    raise UserError(
      f"data.builder.splits: {split!r} cannot name a split; use letters, digits and _, and not "
      "'all'"
    )


class ExifChoice:
  """What `data.exif` does to a data set whose images have EXIF orientations.

  Args:
    exif: "apply" or "ignore".

  Attributes:
    exif: the same.
    pixels: the pixels that annotations are of with this value, "upright" or "stored".
    other: the other value.

  Raises:
    UserError: `exif` is something else.
  """

  def __init__(self, exif: str):
    if exif not in _PIXELS:
      raise UserError(f"data.exif={exif!r} must be one of {', '.join(_PIXELS)}")
    self.exif = exif
    self.pixels = _PIXELS[exif]
    self.other = "ignore" if exif == "apply" else "apply"
    self._logged = False

  def hint(self, orientation: int, file: pathlib.Path) -> str:
    """Returns what to do if annotations fit an image with the other value only.

    Args:
      orientation: the EXIF orientation that the two values treat differently.
      file: the file that has it.
    """
    return (
      f"{file} has EXIF orientation {orientation}; if all annotations are of the "
      f"{_PIXELS[self.other]} pixels, set data.exif={self.other!r}"
    )

  def log_assumption(self, orientation: int, file: pathlib.Path) -> None:
    """Logs once that annotations that fit an image with either value are read with this one."""
    if not self._logged:
      self._logged = True
      logging.warning(
        "%s has EXIF orientation %d, and the sizes do not show whether its annotations are of the "
        "upright or of the stored pixels; the %s pixels are assumed for all such images "
        "(data.exif=%r; else set data.exif=%r)",
        file,
        orientation,
        self.pixels,
        self.exif,
        self.other,
      )


class BadRecordError(Exception):
  """An image or an annotation that cannot be used.

  Args:
    kind: the problem, in words that do not depend on the record; the log counts records by it.
    detail: the values that are wrong in this record.
    where: the file at fault; "" for the place that the context of `BadRecords` names.
  """

  def __init__(self, kind: str, detail: str, where: object = ""):
    super().__init__(kind, detail, where)
    self.kind, self.detail, self.where = kind, detail, where


class BadRecords:
  """Stops at the first bad record, or skips bad records, logs and counts them.

  Args:
    skip: whether to skip bad records.
  """

  def __init__(self, *, skip: bool):
    self._skip = skip
    self._counts: collections.Counter[str] = collections.Counter()

  @contextlib.contextmanager
  def record(self, where: str = "", group: str = "") -> Iterator[None]:
    """Context in which a `BadRecordError` leaves a record out.

    Args:
      where: file and id of the record, for messages.
      group: what the record is, such as "image", if several sorts are counted.

    Raises:
      UserError: the record is bad, and bad records are not skipped.
    """
    try:
      yield
    except BadRecordError as bad:
      message = f"{bad.where or where}: {bad.kind}: {bad.detail}"
      if not self._skip:
        raise UserError(
          f"{message}; fix it, or leave such records out with data.skip_bad=True"
        ) from bad
      counted = f"{group}: {bad.kind}" if group else bad.kind
      self._counts[counted] += 1
      if self._counts[counted] <= _NAMED:
        logging.warning("skipped: %s", message)

  def report(self, split: str) -> None:
    """Logs how many records of each kind were skipped."""
    for kind, count in sorted(self._counts.items()):
      logging.warning("prepare %s: %d skipped: %s", split, count, kind)
