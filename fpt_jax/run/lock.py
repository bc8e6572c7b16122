"""A lock on a folder, on a disk or in a bucket, so that two processes do not write into it at a time.

The lock is a file that its owner rewrites every few seconds. A lock that has not changed for a while belongs
to a process that is gone: clocks are not compared, and buckets need no locks of their own. In a bucket, of
two processes that start at the same moment, one notices within seconds that the lock is not its own.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath

from fpt_jax.errors import UserError
from fpt_jax.run import hosts
from fpt_jax.run.folder import (
  is_remote,
  make_folder,
  parse_json,
  run_folder,
  write_whole,
  writing,
)

LOCK_FILE = "running.lock"
BEAT = 5.0  # seconds between two changes of a lock
EXPIRES = 20.0  # seconds without a change after which the owner is gone


class TakenOverError(UserError):
  """Another process has taken a folder over: nothing more may be written to it."""


@contextlib.contextmanager
def locked_by_first_host(workdir: str, *, take_over: bool = False) -> Iterator[Callable[[], None]]:
  """Holds the lock of a run's folder for all hosts; see `locked`.

  Yields:
    A function that raises TakenOverError on every host if another process has taken the lock over.

  Raises:
    UserError: as `locked`, on every host.
  """
  with contextlib.ExitStack() as stack:
    check = hosts.on_first_host(
      lambda: stack.enter_context(locked(run_folder(workdir), take_over=take_over))
    )
    yield lambda: hosts.on_first_host(check or (lambda: None), TakenOverError)


@contextlib.contextmanager
def locked(
  folder: epath.Path, *, take_over: bool = False, wait: bool = False
) -> Iterator[Callable[[], None]]:
  """Holds the lock of a folder; waits for a lock that may have been left behind.

  Args:
    folder: the folder; it is made if it does not exist.
    take_over: whether to take the lock from a process that is running.
    wait: whether to wait until a process that is running has given the lock back.

  Yields:
    A function that raises TakenOverError if another process has taken the lock over.

  Raises:
    UserError: another process holds the lock, or the folder cannot be written to.
  """
  make_folder(folder)
  path = folder / LOCK_FILE
  with writing(path):
    beats = Heartbeat(path)
    while not beats.begin(replace=take_over):
      wait_until_free(path, wait=wait)
  try:
    yield beats.check
  finally:
    beats.stop()


def wait_until_free(path: epath.Path, *, wait: bool) -> None:
  """Waits until the folder is not locked. Removes a lock that has not changed for `EXPIRES` seconds.

  Args:
    path: file of the lock.
    wait: whether to wait for an owner that is running.

  Raises:
    UserError: the lock changes: its owner is running, and `wait` is False.
  """
  content, seen = read(path), time.monotonic()
  if content is not None and not owner_is_gone(content):
    logging.info("%s is held by %s; waiting for it", path.parent, name(content))
  while content is not None:
    if owner_is_gone(content) or time.monotonic() - seen > EXPIRES:
      if read(path) == content:  # another process may have replaced it
        with contextlib.suppress(FileNotFoundError):
          path.unlink()
      return
    time.sleep(min(0.2, BEAT))
    now = read(path)
    if now == content:
      continue
    if now is not None and not wait:
      raise UserError(
        f"{path.parent} is in use by {name(now)}; choose another --workdir, stop that process, or take "
        "the folder over with --take_over"
      )
    content, seen = now, time.monotonic()


def read(path: epath.Path) -> dict | None:
  """Returns the content of a lock; None if there is none, {} if it cannot be read."""
  try:
    content = parse_json(path.read_bytes(), str(path))
  except FileNotFoundError:
    return None
  except (OSError, UserError):
    return {} if path.exists() else None
  return content if isinstance(content, dict) else {}


def name(content: dict) -> str:
  return f"process {content.get('pid', '?')} on {content.get('host', 'an unknown host')}"


def owner_is_gone(content: dict) -> bool:
  """Returns whether the owner ran on this host and does not exist any more."""
  if content.get("boot") != boot() or not isinstance(content.get("pid"), int):
    return False
  return started(content["pid"]) != content.get("started")


def boot() -> str:
  """Returns an identifier of this boot of this machine, "" if there is none."""
  with contextlib.suppress(OSError):
    return epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
      "/proc/self/ns/pid"
    )
  return ""


def started(pid: int) -> str | None:
  """Returns when a process of this machine was started, in ticks since the boot; None if there is none."""
  with contextlib.suppress(OSError, IndexError):
    fields = epath.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
  return None


class Heartbeat:
  """A lock that is written, and rewritten until it is stopped.

  Args:
    path: file of the lock.
  """

  def __init__(self, path: epath.Path):
    self._path, self._id, self._count = path, uuid.uuid4().hex, 0
    self._lost = threading.Event()
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True, name="lock")

  def begin(self, *, replace: bool) -> bool:
    """Writes the lock and starts to rewrite it; returns False if there is one that must not be replaced."""
    if not replace and self._path.exists():
      return False
    if replace or is_remote(self._path):
      write_whole(self._path, self._content())
    else:
      try:
        with open(self._path, "x") as file:  # of two processes, one succeeds
          file.write(self._content())
      except FileExistsError:
        return False
    self._thread.start()
    return True

  def check(self) -> None:
    """Raises TakenOverError if another process has taken the lock over."""
    if self._lost.is_set():
      raise TakenOverError(
        f"{self._path.parent} was taken over by {name(read(self._path) or {})}; this process stops "
        "without writing to it again"
      )

  def stop(self) -> None:
    """Removes the lock, unless another process has taken it over."""
    self._stopped.set()
    self._thread.join()
    if not self._lost.is_set():
      with contextlib.suppress(OSError):
        if (read(self._path) or {}).get("id") == self._id:
          self._path.unlink()

  def _content(self) -> str:
    self._count += 1
    pid = os.getpid()
    content = {"id": self._id, "beat": self._count, "host": platform.node(), "pid": pid}
    return json.dumps(content | {"boot": boot(), "started": started(pid)})

  def _run(self) -> None:
    while not self._stopped.wait(BEAT):
      found = read(self._path)
      if found and found.get("id") != self._id:
        self._lost.set()
        return
      with contextlib.suppress(Exception):  # a full disk or a lost connection must not end the run
        write_whole(self._path, self._content())
