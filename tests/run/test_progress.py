"""Progress is a bar on a terminal and lines in the log elsewhere."""

import io
import re
import sys

import pytest
from absl import logging

from fpt_jax.run import progress
from fpt_jax.run.progress import Progress, duration


def test_lines_in_a_log(caplog, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  with caplog.at_level("INFO"), Progress("evaluate val", 40) as work:
    for _ in range(40):
      now[0] += 1.0
      work.advance()
  lines = [record.getMessage() for record in caplog.records]
  assert lines == [
    "evaluate val: 15 of 40 images, 1 per second, 0:00:25 left",
    "evaluate val: 30 of 40 images, 1 per second, 0:00:10 left",
    "evaluate val: 40 of 40 images, 1 per second, 0:00:00 left",
  ]


def test_a_bar_on_a_terminal(monkeypatch, caplog):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  before = logging.get_absl_handler().python_handler.stream
  monkeypatch.setattr(sys, "stderr", terminal)
  with caplog.at_level("INFO"), Progress("predict", 3) as work:
    work.advance(2)
    logging.get_absl_handler().python_handler.stream.write("a line of the log\n")
    work.advance()
  assert "predict" in terminal.getvalue() and "3/3" in terminal.getvalue()
  assert not caplog.records
  # the line has the terminal's line to itself
  (line,) = [part for part in re.split(r"[\r\n]", terminal.getvalue()) if "of the log" in part]
  assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() == "a line of the log"
  assert logging.get_absl_handler().python_handler.stream is before


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:00:05"), (3723, "1:02:03")])
def test_durations(seconds, text):
  assert duration(seconds) == text
