"""What records were prepared from: noted in their metadata, and compared whenever they are used.

`metadata["inputs"]` has the options of the builder, and a note of each file that was read: its bytes, the
time of its last change in ns, and a digest of its content. A file of another size has changed. If only the
time differs, as in a copy, the digest decides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging
from etils import epy

with epy.lazy_imports():
  import tensorflow_datasets as tfds

Note = Sequence[Any] | None  # bytes, time and digest of a file; None if it could not be read
_SAMPLE = 1000  # images whose content is compared if the times of more have changed
_SHOWN = 60  # characters of a value in a message


class Builder(Protocol):
  """What a builder says about its inputs.

  Attributes:
    info: TFDS's description; its metadata has "source" and, from `start`, "inputs".
    source: the source as metadata name it; "" if the config does not have one.
    root: folder that the paths of the inputs are relative to; None without a source.
    options: values of the config that decide what is in the records, by field.
    paths: paths that the config names inside the source, by field. They are compared only if the source
      cannot be read.
  """

  info: tfds.core.DatasetInfo
  source: str
  root: pathlib.Path | None
  options: Mapping[str, object]
  paths: Mapping[str, object]

  def changed_files(self, notes: Mapping[str, Any], *, moved: bool) -> list[str]:
    """Returns what differs between the files and their notes of each split.

    Args:
      notes: `metadata["inputs"]["files"]`.
      moved: whether the source is another folder than the one that was prepared.
    """


def start(builder: Builder) -> dict[str, Any]:
  """Returns the value of `metadata["inputs"]` before any file is read."""
  return {"options": _plain(builder.options), "paths": _plain(builder.paths), "files": {}}


def note(path: str | pathlib.Path) -> Note:
  """Returns the note of a file; None unless it is a regular file that can be read."""
  status = _status(path)
  try:
    return status and [*status, _digest(str(path), *status)]
  except OSError:
    return None


def changes(builder: Builder) -> list[str]:
  """Compares prepared records with what a config would prepare.

  Files are compared only if the source exists. Records that an earlier version prepared have no notes: the
  source's path, the splits and the names of the classes are compared, and the log warns once.

  Returns:
    What differs, in words; [] if nothing does.
  """
  metadata = builder.info.metadata
  made_from, noted = metadata["source"], metadata.get("inputs")
  moved = bool(builder.source) and builder.source != made_from
  if noted is None:
    warn_once(
      f"{builder.info.data_dir} was prepared by an earlier version, which did not note its input files; "
      "changes of them are not noticed until the folder is deleted and prepared again"
    )
    found = _changed_values(_options_of_earlier_versions(builder), builder.options)
    return [*found, "its files cannot be compared"] if moved else found
  found = _changed_values(noted["options"], builder.options)
  if found:
    return found
  if builder.root is None or not builder.root.is_dir():
    if moved:
      return [f"{builder.source} does not exist"]
    return _changed_values(noted["paths"], builder.paths)
  return list(dict.fromkeys(builder.changed_files(noted["files"], moved=moved)))


def digest(noted: Mapping[str, Any], splits: Iterable[str]) -> str:
  """Returns a digest of the files of splits and of the options that change their records.

  It does not depend on where the files are, on `data.skip_bad`, or on the names of other splits.

  Args:
    noted: `metadata["inputs"]`.
    splits: names of the splits.
  """
  other = ("data.builder.splits", "data.skip_bad")
  options = {k: v for k, v in noted["options"].items() if k not in other}
  files = {split: _content(noted["files"][split]) for split in sorted(splits)}
  text = json.dumps({"options": options, "files": files}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(notes: Any) -> Any:
  """Returns notes without the times and the paths."""
  if isinstance(notes, Mapping):
    return {name: _content(value) for name, value in notes.items() if name != "paths"}
  return None if notes is None else [notes[0], notes[2]]


def changed_files(
  notes: Mapping[str, Note], paths: Mapping[str, str | pathlib.Path], *, sample: bool = False
) -> list[str]:
  """Compares files with their notes.

  Args:
    notes: the notes by name of the file.
    paths: where the files are now, by the same names.
    sample: whether of many files whose time has changed, the content of only `_SAMPLE` is compared.

  Returns:
    What differs, in words.
  """
  new = [path for name, path in paths.items() if name not in notes]
  missing, changed, touched = [], [], []
  for name, before in notes.items():
    path = paths.get(name)
    now = _status(path) if path else None
    if path is None or now is None:
      missing += [path or name] if before else []
    elif before is None:
      new.append(path)
    elif now[0] != before[0]:
      changed.append(path)
    elif now[1] != before[1]:
      touched.append((path, before))
  step = max(1, -(-len(touched) // _SAMPLE)) if sample else 1
  for path, before in touched[::step]:
    current = note(path)
    if current is None or current[2] != before[2]:
      changed.append(path)
  return [
    *_sentence(changed, "has changed", "have changed"),
    *_sentence(new, "is new", "are new"),
    *_sentence(missing, "is missing", "are missing"),
  ]


@functools.cache
def warn_once(message: str) -> None:
  """Logs a warning, the first time only."""
  logging.warning("%s", message)


def _status(path: str | pathlib.Path) -> tuple[int, int] | None:
  """Returns bytes and time of a regular file.

  The time is st_ctime: unlike st_mtime, nothing sets it back, such as the dates in an archive.
  """
  try:
    status = os.stat(path)
  except (OSError, ValueError):  # a name with a NUL is a ValueError
    return None
  return (status.st_size, status.st_ctime_ns) if stat.S_ISREG(status.st_mode) else None


@functools.cache
def _digest(path: str, size: int, time: int) -> str:
  """Returns the digest of a file's content; read again only if its size or time has changed."""
  del size, time
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _changed_values(before: Mapping[str, Any], now: Mapping[str, object]) -> list[str]:
  plain = _plain(now)
  return [
    f"{field} was {_shown(before.get(field))}, now {_shown(plain.get(field))}"
    for field in dict.fromkeys((*before, *plain))
    if before.get(field) != plain.get(field)
  ]


def _options_of_earlier_versions(builder: Builder) -> dict[str, Any]:
  """Returns the options that records without notes tell, and the current value of the others."""
  known: dict[str, Callable[[], Any]] = {
    "data.builder.splits": lambda: _like(builder.info.splits, builder.options),
    "data.builder.class_names": lambda: builder.info.metadata["class_names"],
  }
  return {
    field: known[field]() if field in known else value
    for field, value in _plain(builder.options).items()
  }


def _like(splits: Iterable[str], options: Mapping[str, object]) -> list[str]:
  """Returns the names of splits, in the order of the options if they are the same."""
  names, wanted = sorted(splits), _plain(options)["data.builder.splits"]
  return wanted if names == sorted(wanted) else names


def _plain(values: Mapping[str, object]) -> dict[str, Any]:
  """Returns values as JSON gives them back."""
  return json.loads(json.dumps(values))


def _shown(value: object) -> str:
  text = "unset" if value is None else repr(value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _sentence(paths: Sequence[str | pathlib.Path], one: str, many: str) -> list[str]:
  if len(paths) < 2:
    return [f"{path} {one}" for path in paths]
  return [f"{paths[0]} and {len(paths) - 1} more files {many}"]
