"""Objects are on disk as soon as they are written, and an incomplete line is not read."""

import json

import pytest

from fpt_jax.errors import UserError
from fpt_jax.run.folder import run_folder
from fpt_jax.run.json_lines import JsonLines, lines_of


def test_objects_are_on_disk_as_they_come(tmp_path):
  path = tmp_path / "new" / "x.jsonl"
  with JsonLines(run_folder(str(path))) as lines:
    assert not path.exists()
    for i in range(3):
      lines.write([{"i": i}, {"text": "a\u2028\n\udcff"}])
      assert len(path.read_text().splitlines()) == 2 * (i + 1)
    lines.write([])
  assert [json.loads(line) for line in lines_of(lines.path)][2:4] == [
    {"i": 1},
    {"text": "a\u2028\n\udcff"},
  ]
  path.write_text('{"a": 1}\n{"b')
  assert lines_of(lines.path) == ['{"a": 1}']


def test_an_earlier_file_is_kept_until_there_is_a_result(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("old\n")
  with JsonLines(run_folder(str(path))):
    pass
  assert path.read_text() == "old\n"
  with JsonLines(run_folder(str(path))) as lines:
    lines.write([])
  assert path.read_text() == ""


def test_lines_in_a_bucket(bucket):
  with JsonLines(run_folder("gs://b/run/x.jsonl")) as lines:
    lines.write([{"i": 1}])
    lines.write([{"i": 2}])
  assert (bucket / "b/run/x.jsonl").read_text() == '{"i": 1}\n{"i": 2}\n'
  assert lines_of(lines.path) == ['{"i": 1}', '{"i": 2}']


def test_a_full_disk_keeps_the_lines_before(tmp_path, full_disk):
  path = tmp_path / "x.jsonl"
  lines = JsonLines(run_folder(str(path)))
  with full_disk(100), pytest.raises(UserError, match=r"x\.jsonl cannot be written"), lines:
    for _ in range(20):
      lines.write([{"number": 1}])
  assert lines_of(lines.path) == ['{"number": 1}'] * 7
