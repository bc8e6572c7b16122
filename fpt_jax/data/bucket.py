"""Records in a bucket: written there once, and copied to the disk of each machine, where they are read.

A training reads single records in random order, which buckets are slow at. `manifest.json` has the size and
the SHA-256 of each file. It is written last, so a folder without it is not complete.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import make_folder, parse_json, write_whole, writing
from fpt_jax.run.lock import locked
from fpt_jax.run.progress import Progress

MANIFEST = "manifest.json"
_CHUNK = 8 << 20  # bytes that are read at a time
_AT_A_TIME = 8  # files


class File(NamedTuple):
  """What the manifest says about a file: its size and the SHA-256 of its content."""

  bytes: int
  sha256: str


def manifest(remote: epath.Path) -> dict[str, File] | None:
  """Reads the manifest of a folder in a bucket, by names of files; None if records are not complete there.

  Raises:
    UserError: it cannot be read.
  """
  path = remote / MANIFEST
  try:
    if not path.exists():
      return None
    text = path.read_bytes()
  except Exception as error:  # each kind of bucket has its own exceptions
    raise _unreadable(path, error) from error
  advice = f"delete {remote} and prepare again"
  content = parse_json(text, str(path), advice)
  try:
    return {name: File(int(f["bytes"]), str(f["sha256"])) for name, f in content.items()}
  except (AttributeError, TypeError, KeyError, ValueError) as error:
    raise UserError(f"{path} is not a list of files; {advice}") from error


def _write_manifest(folder: epath.Path, files: dict[str, File]) -> None:
  content = {name: file._asdict() for name, file in files.items()}
  write_whole(folder / MANIFEST, json.dumps(content, indent=1))


def write(local: epath.Path, remote: epath.Path) -> None:
  """Copies prepared records to a bucket.

  Args:
    local: folder of the records.
    remote: folder in the bucket; files in it are replaced.

  Raises:
    UserError: the bucket cannot be written to.
  """
  names = sorted(path.name for path in local.iterdir() if path.name != MANIFEST)
  sizes = {name: (local / name).stat().length for name in names}
  with writing(remote):
    make_folder(remote)
    sums = _copy_files(f"copy to {remote}", local, remote, sizes)
  files = {name: File(sizes[name], sums[name]) for name in names}
  _write_manifest(remote, files)
  _write_manifest(local, files)


def copy(remote: epath.Path, local: epath.Path) -> bool:
  """Makes a folder on a local disk a copy of one in a bucket, unless it is; other processes wait.

  Returns:
    False if the bucket does not have complete records.

  Raises:
    UserError: a file cannot be read, or has another content than its checksum says; or the disk is full.
  """
  wanted = manifest(remote)
  if wanted is None:
    return False
  if _is_copy(local, wanted):
    return True
  with locked(local.parent, wait=True):
    if not _is_copy(local, wanted):
      _copy_records(remote, local, wanted)
  return True


def _is_copy(local: epath.Path, wanted: dict[str, File]) -> bool:
  with contextlib.suppress(UserError):  # a folder with a damaged manifest is copied again
    return manifest(local) == wanted
  return False


def _copy_records(remote: epath.Path, local: epath.Path, wanted: dict[str, File]) -> None:
  for left in (*local.parent.glob(f"incomplete.*_{local.name}"), local):
    if left.exists():
      left.rmtree()
  size = sum(file.bytes for file in wanted.values())
  free = shutil.disk_usage(local.parent).free
  if free < size:
    raise UserError(
      f"data.cache_dir: the copy of {remote} needs {size / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free in "
      f"{local.parent}; free some space, or choose another data.cache_dir"
    )
  temporary = local.parent / f"incomplete.{uuid.uuid4().hex[:8]}_{local.name}"
  make_folder(temporary)
  try:
    with writing(temporary):
      sizes = {name: file.bytes for name, file in wanted.items()}
      found = _copy_files(f"copy {remote}", remote, temporary, sizes)
    changed = [name for name, file in wanted.items() if found[name] != file.sha256]
    if changed:
      raise UserError(
        f"{remote / changed[0]} has another content than {MANIFEST} says; delete {remote} and prepare again"
      )
    _write_manifest(temporary, wanted)
    with writing(local):
      temporary.rename(local)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _copy_files(
  title: str, source: epath.Path, target: epath.Path, sizes: dict[str, int]
) -> dict[str, str]:
  """Copies files, several at a time; returns the SHA-256 of each."""
  total = sum(sizes.values())
  with (
    Progress(title, total // 10**6, unit="MB") as progress,
    concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool,
  ):
    sums = {name: pool.submit(_copy_file, source / name, target / name) for name in sizes}
    try:
      done = 0
      for name, size in sizes.items():
        sums[name].result()
        progress.advance((done + size) // 10**6 - done // 10**6)
        done += size
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  return {name: future.result() for name, future in sums.items()}


def _copy_file(source: epath.Path, target: epath.Path) -> str:
  """Copies a file, and returns the SHA-256 of what was read."""
  digest = hashlib.sha256()
  with target.open("wb") as copied:
    for chunk in _chunks(source):
      digest.update(chunk)
      copied.write(chunk)
  return digest.hexdigest()


def _chunks(path: epath.Path) -> Iterator[bytes]:
  try:
    with path.open("rb") as file:
      while chunk := file.read(_CHUNK):
        yield chunk
  except Exception as error:  # each kind of bucket has its own exceptions
    raise _unreadable(path, error) from error


def _unreadable(path: epath.Path, error: Exception) -> UserError:
  return UserError(
    f"{path} cannot be read ({one_line(f'{type(error).__name__}: {error}', 200)}); check the bucket's name "
    "and your permissions, and run the same command again"
  )
