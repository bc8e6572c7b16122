"""Files with one JSON object per line, which are complete up to the last object whenever the work ends."""

import contextlib
import json
import time
from collections.abc import Iterable
from typing import IO, Any

from etils import epath

from fpt_jax.run.folder import is_remote, make_folder, writing

# a file in a bucket is uploaded as a whole each time
REMOTE_FLUSH_SECONDS = 60.0


class JsonLines:
  """Writes objects to a file as they come.

  The first object creates the file, or replaces the one of an earlier command. Use it as a context.

  Args:
    path: the file; its folder is created if it does not exist.
  """

  def __init__(self, path: epath.Path):
    self.path = path
    self._open = contextlib.ExitStack()
    self._file: IO | None = None
    self._flushed = time.monotonic()

  def __enter__(self) -> "JsonLines":
    return self

  def __exit__(self, *_: object) -> None:
    with writing(self.path):
      self._open.close()

  def write(self, objects: Iterable[dict[str, Any]]) -> None:
    """Appends objects; on a disk they are there when the call returns.

    Raises:
      UserError: the file cannot be written.
    """
    text = "".join(json.dumps(entry) + "\n" for entry in objects)
    if self._file is None:
      make_folder(self.path.parent)
    with writing(self.path):
      if self._file is None:
        self._file = self._open.enter_context(self.path.open("w"))
      self._file.write(text)
      if not is_remote(self.path) or time.monotonic() - self._flushed >= REMOTE_FLUSH_SECONDS:
        self._file.flush()
        self._flushed = time.monotonic()


def lines_of(path: epath.Path) -> list[str]:
  """Returns the complete lines of such a file as they are, without the line breaks."""
  return path.read_text().split("\n")[:-1]
