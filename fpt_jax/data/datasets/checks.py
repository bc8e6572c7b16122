"""Checks that the builders share: the source folder, names of splits, and bad records."""

import collections
import contextlib
import os
import pathlib
import reprlib
from collections.abc import Iterator, Sequence

from absl import logging

from fpt_jax.errors import UserError, one_line

_PIXELS = {"apply": "upright", "ignore": "stored"}  # that annotations are of, by data.exif
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxlong = 3, 6, 60, 40
_NAMED = 10  # classes, or bad records of a kind, that the log names; all of them are counted


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


def check_names(where: str, names: Sequence[object]) -> None:
  """Checks the names of classes or categories.

  Args:
    where: file or config field of the list, for messages.
    names: the names in order.

  Raises:
    UserError: a name is not text, is empty, cannot be stored, or is given twice.
  """
  seen: set[str] = set()
  for i, name in enumerate(names):
    if not isinstance(name, str) or not name.strip():
      raise UserError(
        f"{where}[{i}]: {quoted(name)} must be a string that is not empty; name each class"
      )
    if not is_storable_text(name):
      raise UserError(
        f"{where}[{i}]: {quoted(name)} has a character that is not text; rename the class"
      )
    if name in seen:
      raise UserError(
        f"{where}[{i}]: {quoted(name)} is given twice; results are reported by name, so each class "
        "needs its own"
      )
    seen.add(name)


def is_storable_text(text: str) -> bool:
  """Returns whether a text can be stored as UTF-8 and be part of a file's name."""
  try:
    return b"\0" not in text.encode()
  except UnicodeEncodeError:  # half of a surrogate pair
    return False


def quoted(value: object) -> str:
  """Returns a value of a file for a message: one short line, whatever the value is."""
  return one_line(_SHORT.repr(value), 100)


def listed(names: Sequence[str]) -> str:
  """Returns the first names of a list, for messages."""
  return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


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
