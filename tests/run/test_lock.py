"""Locks: held, refused, left behind, taken over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from fpt_jax.errors import UserError
from fpt_jax.run import lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "EXPIRES", 0.6)


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path / "run")


def test_a_lock_is_held_and_removed(folder):
  with lock.locked(folder) as check:
    first = json.loads((folder / lock.LOCK_FILE).read_text())
    assert first["pid"] == os.getpid()
    time.sleep(0.3)
    assert json.loads((folder / lock.LOCK_FILE).read_text())["beat"] > first["beat"]
    check()
  assert not (folder / lock.LOCK_FILE).exists()
  with lock.locked(folder):
    pass


def test_a_second_process_is_refused_and_changes_nothing(folder, monkeypatch):
  monkeypatch.setattr(lock, "EXPIRES", 60.0)
  with lock.locked(folder) as check:
    second = lock.locked(folder)
    with (
      pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*--take_over"),
      second,
    ):
      pass
    time.sleep(0.2)
    check()
  assert not (folder / lock.LOCK_FILE).exists()


def test_a_lock_that_does_not_change_is_replaced(folder):
  folder.mkdir()
  (folder / lock.LOCK_FILE).write_text(
    json.dumps({"id": "x", "beat": 3, "host": "pod-7", "pid": 1})
  )
  begun = time.monotonic()
  with lock.locked(folder) as check:
    assert time.monotonic() - begun >= 0.5
    check()


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, '{"pid": "x"}'], ids=range(5))
def test_a_damaged_lock_is_replaced(content, folder):
  folder.mkdir()
  (folder / lock.LOCK_FILE).write_text(content)
  with lock.locked(folder) as check:
    check()


@pytest.mark.skipif(not lock.boot(), reason="needs /proc")
def test_the_lock_of_a_killed_process_is_replaced_at_once(folder, monkeypatch):
  program = (
    "import sys, time; from etils import epath; from fpt_jax.run import lock\n"
    "with lock.locked(epath.Path(sys.argv[1])):\n  print('held', flush=True); time.sleep(60)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  process.kill()
  process.communicate()
  monkeypatch.setattr(lock, "EXPIRES", 60.0)
  begun = time.monotonic()
  with lock.locked(folder):
    assert time.monotonic() - begun < 30


def test_a_lock_is_taken_over_and_the_owner_notices(folder):
  with lock.locked(folder) as check, lock.locked(folder, take_over=True) as other:
    for _ in range(100):
      time.sleep(0.05)
      try:
        check()
      except UserError as error:
        assert "was taken over by process" in str(error)
        break
    else:
      raise AssertionError("the owner did not notice")
    other()
  assert not (folder / lock.LOCK_FILE).exists()


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match="cannot be written"),
    lock.locked(epath.Path(tmp_path / "file")),
  ):
    pass


def test_waiting_for_a_process_that_gives_the_lock_back(folder, monkeypatch):
  monkeypatch.setattr(lock, "EXPIRES", 60.0)
  order = []

  def hold(name, seconds):
    with lock.locked(folder, wait=True):
      order.append(f"{name} begins")
      time.sleep(seconds)
      order.append(f"{name} ends")

  threads = [threading.Thread(target=hold, args=(n, 0.3)) for n in ("a", "b", "c")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(order) == 6
  for begin, end in zip(order[::2], order[1::2], strict=True):
    assert begin.split()[0] == end.split()[0]  # never two at a time
