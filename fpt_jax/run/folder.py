"""The folder of a run, on a disk or in a bucket: its path, and writing and reading its files."""

import contextlib
import errno
import json
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from fpt_jax.errors import UserError, one_line

REMOTE_SCHEMES = ("gs", "s3", "az", "hf")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_folder(workdir: str) -> epath.Path:
  """Returns the folder that `--workdir` names; local paths become absolute, and `~` is the home folder.

  Raises:
    UserError: `workdir` is empty, or a URL of a kind that cannot be written to.
  """
  if not workdir:
    raise UserError("--workdir is missing; set it to the folder of the run")
  return folder_of("--workdir", workdir)


def folder_of(name: str, value: str) -> epath.Path:
  """Returns the folder that a flag or field names; local paths become absolute, and `~` is the home folder.

  Args:
    name: name of the flag or field, for messages.
    value: its value.

  Raises:
    UserError: the value is a URL of a kind that cannot be written to.
  """
  # a mistyped gs:/bucket or gs:bucket must not become a local folder
  url = re.match(rf"([A-Za-z][\w+.-]+(?=:/)|{'|'.join(REMOTE_SCHEMES)}):(//[^/])?", value)
  if url and (url[1] not in REMOTE_SCHEMES or not url[2]):
    known = ", ".join(f"{scheme}://" for scheme in REMOTE_SCHEMES)
    raise UserError(f"{name}={value} must be a local path or begin with one of {known}")
  if url:
    return epath.Path(value)
  local = os.path.expanduser(value)
  if local.startswith("~"):
    raise UserError(f"{name}={value}: there is no such user; write ./{value} for a folder")
  return epath.Path(os.path.abspath(local))


def is_remote(path: epath.Path) -> bool:
  """Whether a path is in a bucket and not in a file system."""
  return "://" in str(path)


def check_writable(folder: epath.Path) -> None:
  """Checks, before work begins, that files can be written to a folder; it need not exist.

  Nothing is created in a file system. In a bucket, a small file is written and removed.

  Raises:
    UserError: nothing can be written there, or the disk is full.
  """
  with writing(folder):
    if is_remote(folder):
      probe = folder / f".check.{uuid.uuid4().hex}"
      probe.write_bytes(b" ")
      probe.unlink()
      return
    existing = str(folder)
    while not os.path.lexists(existing):
      existing = os.path.dirname(existing)
    # a file without a name: nothing is left behind even if the process is killed
    with tempfile.TemporaryFile(dir=existing) as probe:
      probe.write(bytes(4096))
      probe.flush()


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
  """Context for writing to a path.

  Raises:
    UserError: the path could not be written.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    # each kind of bucket has its own exceptions
    if not isinstance(error, OSError) and not is_remote(path):
      raise
    raise UserError(_cannot_write(path, error)) from error


def _cannot_write(path: epath.Path, error: Exception) -> str:
  number = getattr(error, "errno", None)
  reason = one_line(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}", 200)
  if is_remote(path):
    advice = "check the bucket's name and your permissions, and run the same command again"
  elif number in _FULL:
    advice = "free some space and run the same command again"
  elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
    advice = "change its permissions, or choose another folder"
  elif number in (errno.ENOTDIR, errno.EEXIST):
    advice = "a file is in the place of a folder; move it, or choose another folder"
  else:
    advice = "check the path and its disk"
  return f"{path} cannot be written ({reason}); {advice}"


def is_full_disk(error: Exception) -> bool:
  """Whether an error, or the text that a library has made of it, says that a disk is full."""
  if isinstance(error, OSError) and error.errno in _FULL:
    return True
  return any(os.strerror(number) in str(error) for number in _FULL)


def make_folder(folder: epath.Path) -> None:
  """Creates a folder and those above it, unless they exist.

  Raises:
    UserError: the folder cannot be created.
  """
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: epath.Path, content: str | bytes) -> None:
  """Replaces a file atomically: an interruption or an error leaves either the old file or the new one.

  In a bucket, writing a file is atomic in itself.

  Args:
    path: the file; its folder is created if it does not exist.
    content: text, or bytes.

  Raises:
    UserError: the file cannot be written.
  """
  data = content if isinstance(content, bytes) else content.encode()
  make_folder(path.parent)
  with writing(path):
    if is_remote(path):
      path.write_bytes(data)
      return
    # another process may replace the same file at the same time; names are limited in bytes
    temporary = path.parent / f"{path.name[:60]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
      temporary.write_bytes(data)
      temporary.replace(path)
    except BaseException:
      with contextlib.suppress(Exception):  # report the error that prevented the write
        temporary.unlink(missing_ok=True)
      raise


def read_json(path: pathlib.Path | epath.Path, advice: str = "restore the file") -> Any:
  """Reads a JSON file.

  Args:
    path: the file.
    advice: what to do if it is not valid, for messages.

  Raises:
    UserError: the file cannot be read, or is not valid JSON.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({one_line(error.strerror or error, 200)})") from error
  return parse_json(data, str(path), advice)


def parse_json(data: bytes, where: str, advice: str = "restore the file") -> Any:
  """Parses JSON.

  Args:
    data: bytes of the text in UTF-8; a byte order mark, which some editors write, is skipped.
    where: where the text is, for messages.
    advice: what to do, for messages.

  Raises:
    UserError: the bytes are not valid JSON, are nested too deeply, or have a number with too many digits.
  """
  try:
    return json.loads(data.decode("utf-8-sig"))
  except json.JSONDecodeError as error:
    raise UserError(
      f"{where}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); {advice}"
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f"{where}: byte {error.start} is not text in UTF-8; {advice}") from error
  except RecursionError as error:
    raise UserError(f"{where}: the JSON is nested too deeply; {advice}") from error
  except ValueError as error:  # Python limits the digits of an integer
    raise UserError(f"{where}: a number has thousands of digits; {advice}") from error
