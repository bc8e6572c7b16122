"""Metrics on disk survive a crash; measured speeds include training only."""

import io
import json
import time

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from PIL import Image

from fpt_jax.errors import UserError
from fpt_jax.run.metrics import MetricsWriter, read_metrics
from fpt_jax.run.progress import Clock


def test_pictures_of_a_folder_are_added_to_the_events(tmp_path, rng):
  picture_HWC = rng.integers(0, 255, (4, 6, 3), np.uint8)
  (tmp_path / "eval").mkdir()
  Image.fromarray(picture_HWC).save(tmp_path / "eval" / "errors.png")
  (tmp_path / "eval" / "results.json").write_text("[]")
  writer = MetricsWriter(str(tmp_path), 0)
  writer.write_pictures(7, epath.Path(tmp_path / "eval"))
  writer.close()
  (file,) = tmp_path.glob("events*")
  events = [
    event for event in tf.compat.v1.train.summary_iterator(str(file)) if event.summary.value
  ]
  assert [event.step for event in events] == [7]
  (value,) = events[0].summary.value
  written = tf.make_ndarray(value.tensor)
  assert value.tag == "eval/errors" and [int(n) for n in written[:2]] == [6, 4]
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(written[2]))), picture_HWC)
  (tmp_path / "eval" / "errors.png").write_bytes(b"cut")
  with pytest.raises(UserError, match="step 8 cannot be written"):
    MetricsWriter(str(tmp_path), 0).write_pictures(8, epath.Path(tmp_path / "eval"))


def test_lines_after_the_resumed_step_are_removed(tmp_path):
  first = MetricsWriter(str(tmp_path), 0)
  for step in (1, 2, 3):
    first.write(step, {"total_loss": 1.0 / step, "nan": float("nan")})
  first.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "total_lo')  # a crash in the middle of a line
  assert [entry["step"] for entry in read_metrics(str(tmp_path))] == [1, 2, 3]
  second = MetricsWriter(str(tmp_path), 2)
  second.write(3, {"total_loss": 7})
  second.close()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines == [
    {"step": 1, "total_loss": 1.0},
    {"step": 2, "total_loss": 0.5},
    {"step": 3, "total_loss": 7.0},
  ]
  assert read_metrics(str(tmp_path / "none")) == []


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{", "not valid JSON; delete the line"),
    (b"\xff", "not valid JSON; delete the line"),
    (b"[" * 100_000, "not valid JSON; delete the line"),
    (b'{"step": 2, "a": ' + b"9" * 4400 + b"}", "not valid JSON; delete the line"),
    (b"3", "not a JSON object"),
    (b'{"total_loss": 1}', "'step' is not an integer"),
    (b'{"step": 1.5}', "'step' is not an integer"),
    (b'{"step": true}', "'step' is not a finite number"),
    (b'{"step": 2, "a": "1"}', "'a' is not a finite number"),
    (b'{"step": 2, "a": NaN}', "'a' is not a finite number"),
    (b'{"step": 2, "a": 1e999}', "'a' is not a finite number"),
    (b'{"step": 2, "a": 1' + b"0" * 400 + b"}", "'a' is not a finite number"),
  ],
)
def test_damaged_lines_are_named(line, message, tmp_path):
  good = b'{"step": 1}\n'
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(good + line + b"\n" + good)
  with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: {message}") as error:
    read_metrics(str(tmp_path))
  assert "\n" not in str(error.value)
  path.write_bytes(good + line)  # a crash in the middle of the line
  assert read_metrics(str(tmp_path)) == [{"step": 1}]


def test_clock_counts_training_only():
  clock = Clock(0, 100, 8)
  time.sleep(0.05)
  assert clock.restart(1) >= 0.05
  assert clock.speeds(1) == {}
  with clock.paused():
    time.sleep(0.3)
  with clock.waiting():
    time.sleep(0.1)
  speeds = clock.speeds(3)
  seconds = 2 * 8 / speeds["images_per_second"]
  assert 0.1 <= seconds < 0.3  # without the pause
  assert speeds["eta_seconds"] == pytest.approx(seconds / 2 * 97)
  assert 0.3 < speeds["data_wait"] <= 1.0
  line = clock.line(3, {"loss_cls": 0.5}, speeds)
  assert line.startswith("step 3/100 | cls 0.500 | ") and "images/s" in line


def test_a_full_disk_is_reported(tmp_path, full_disk):
  writer = MetricsWriter(str(tmp_path), 0)
  writer.write(1, {"total_loss": 1.0})
  size = (tmp_path / "metrics.jsonl").stat().st_size
  with (
    full_disk(size + 10),
    pytest.raises(UserError, match=r"metrics\.jsonl: step 2 cannot be written"),
  ):
    writer.write(2, {f"loss_{i}": 0.5 for i in range(1000)})
  entries = read_metrics(str(tmp_path))
  assert [entry["step"] for entry in entries] == [1]
