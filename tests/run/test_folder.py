"""Paths of runs, and files that are written completely or not at all."""

import concurrent.futures
import os
import pathlib

import pytest
from etils import epath

from fpt_jax.errors import UserError
from fpt_jax.run.folder import (
  check_writable,
  make_folder,
  parse_json,
  read_json,
  run_folder,
  write_whole,
)


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert str(run_folder("~/runs/a")) == f"{tmp_path}/runs/a"
  assert str(run_folder("~")) == str(tmp_path)
  assert str(run_folder("runs/~/a")) == f"{tmp_path}/runs/~/a"
  assert str(run_folder("./~")) == f"{tmp_path}/~"
  with pytest.raises(UserError, match=r"--workdir=~nobody-here/x: there is no such user"):
    run_folder("~nobody-here/x")
  with pytest.raises(UserError, match="--workdir is missing"):
    run_folder("")


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "s3://bucket/run"])
def test_buckets_keep_their_url(workdir):
  assert str(run_folder(workdir) / "config.json") == f"{workdir}/config.json"


@pytest.mark.parametrize(
  "workdir",
  [
    "gs:/bucket/run",
    "gs:bucket/run",
    "gs://",
    "gs:///run",
    "https://x.org/run",
    "file:///tmp/run",
    "GS://bucket/run",
  ],
)
def test_other_urls_are_refused_and_make_no_local_folder(workdir, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"must be a local path or begin with one of gs://, "):
    run_folder(workdir)
  assert not os.listdir(tmp_path)


def test_local_names_with_a_colon_are_paths(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert str(run_folder("12:30/run")) == f"{tmp_path}/12:30/run"
  assert str(run_folder("run:2")) == f"{tmp_path}/run:2"


def test_two_writers_of_a_file_do_not_mix(tmp_path):
  path = epath.Path(tmp_path / "x.json")
  contents = [letter * 100_000 for letter in "ab"]

  def write(content):
    for _ in range(50):
      write_whole(path, content)
      assert path.read_text() in contents

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(write, contents)) == [None, None]
  assert os.listdir(tmp_path) == ["x.json"]


def test_a_check_leaves_nothing_behind(tmp_path, bucket):
  check_writable(run_folder(str(tmp_path / "a" / "b")))
  assert not os.listdir(tmp_path)
  check_writable(run_folder("gs://bucket/run"))
  assert [p for p in bucket.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("use", [check_writable, make_folder, lambda f: write_whole(f / "x", "")])
def test_a_file_in_the_place_of_a_folder_is_named(use, tmp_path):
  (tmp_path / "file").write_text("kept")
  for folder in ("file", "file/run"):
    with pytest.raises(UserError, match=rf"{folder}(/x)? cannot be written \(.*\); a file is in"):
      use(run_folder(str(tmp_path / folder)))
  assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_nothing_can_be_written_to(tmp_path):
  # also for root, whom permissions do not stop
  for folder in ("/proc/run", "/proc"):
    with pytest.raises(UserError, match=rf"^{folder} cannot be written \("):
      check_writable(run_folder(folder))


def test_a_full_disk_is_noticed_and_keeps_what_was_there(tmp_path, full_disk):
  folder = run_folder(str(tmp_path))
  write_whole(folder / "a.json", "old")
  with full_disk(1000):
    with pytest.raises(UserError, match=r"cannot be written \(File too large\); free some space"):
      check_writable(folder)
    with pytest.raises(UserError, match=r"a\.json cannot be written .*; free some space") as error:
      write_whole(folder / "a.json", "x" * 5000)
  assert "\n" not in str(error.value)
  assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_long_names_and_bytes_are_written(tmp_path):
  for name in ("a" * 251 + ".png", "é" * 125 + ".png"):
    write_whole(run_folder(str(tmp_path)) / name, b"\xff\n")
    assert (tmp_path / name).read_bytes() == b"\xff\n"
  assert len(os.listdir(tmp_path)) == 2


def test_errors_of_buckets_are_one_line(monkeypatch, bucket):
  folder = run_folder("gs://bucket/run")

  def denied(*_):
    raise RuntimeError("403\ndenied")

  monkeypatch.setattr(type(folder), "write_bytes", denied)
  with pytest.raises(UserError, match=r"gs://bucket/run/a cannot be written \(RuntimeError: 403 d"):
    write_whole(folder / "a", "x")


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "line 1, column 1: not valid JSON"),
    (b'{"a": 1,\n}', "line 2, column 1: not valid JSON"),
    (b"\xff\xfe", "byte 0 is not text in UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b"9" * 4400, "digits"),
  ],
)
def test_bad_json_is_reported_in_one_line(data, message, tmp_path):
  path = pathlib.Path(tmp_path / "x.json")
  path.write_bytes(data)
  for read in (lambda: read_json(run_folder(str(path))), lambda: parse_json(data, str(path))):
    with pytest.raises(UserError, match=rf"x\.json.*{message}.*; restore the file") as error:
      read()
    assert "\n" not in str(error.value)
