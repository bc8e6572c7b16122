"""The preflight passes on the CPU, in one process and in two, and what it compares can differ."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from scripts import preflight_checks
from scripts.preflight_report import Check, DifferenceError, check_same_bits, largest_difference
from scripts.preflight_report import run_checks as run
from tests.runs import QUICK, ROOT, free_port, shared_data_dir

LINE = re.compile(r"(\S.*?) +(ok|FAILED) +[\d.]+ s  \S.*")


def start(*arguments: str) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable,
      ROOT / "scripts" / "tpu_preflight.py",
      f"--data_dir={shared_data_dir()}",
      *arguments,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | QUICK | {"JAX_PLATFORMS": "cpu"},
  )


def results(out: str) -> dict[str, str]:
  """Returns the name of each check, and "ok" or "FAILED"."""
  lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
  return dict(LINE.fullmatch(line).groups() for line in lines)


def test_a_difference_is_relative_to_the_largest_value():
  want = {"x": np.array([[0.0, -2.0], [1.0, 0.5]], np.float32)}
  got = {"x": want["x"] + np.array([[0, 0], [0, 1e-3]], np.float32)}
  assert largest_difference(got, want, 6e-4) == pytest.approx(5e-4, rel=1e-3)
  with pytest.raises(
    DifferenceError, match=r"x\[1, 1\] is 0\.501 instead of 0\.5: .* 5\.0e-04 .* 4\.0e-04"
  ):
    largest_difference(got, want, 4e-4)
  assert largest_difference(want, want, 0.0) == 0.0
  assert largest_difference({"x": 1e-9}, {"x": 0.0}, 1e-6) == 1e-9


@pytest.mark.parametrize(
  ("got", "message"),
  [
    ({"y": np.zeros(2)}, "got ['y'] instead of ['x']"),
    ({"x": np.zeros(3)}, "x has shape (3,) instead of (2,)"),
    ({"x": np.array([0, np.nan])}, "x: 1 of 2 values are not finite"),
  ],
)
def test_what_cannot_be_compared_is_a_difference(got, message):
  with pytest.raises(DifferenceError, match=re.escape(message)):
    largest_difference(got, {"x": np.zeros(2)}, 1.0)


def test_bits():
  want = {"x": np.array([np.nan, -0.0, 1.0], np.float32)}
  check_same_bits({"x": want["x"].copy()}, want)
  with pytest.raises(DifferenceError, match="x: 1 of 12 bytes differ"):
    check_same_bits({"x": np.array([np.nan, 0.0, 1.0], np.float32)}, want)
  with pytest.raises(DifferenceError, match="float64"):
    check_same_bits({"x": want["x"].astype(np.float64)}, want)


def test_a_failure_does_not_stop_the_other_checks(capsys):
  def fails():
    raise ValueError("two\nlines")

  checks = [Check("first", fails), Check("second", lambda: "a figure")]
  assert not run(checks, limit=60)
  first, second = capsys.readouterr().out.splitlines()
  assert LINE.fullmatch(first).groups() == ("first", "FAILED") and "ValueError: two lines" in first
  assert LINE.fullmatch(second).groups() == ("second", "ok") and second.endswith("a figure")
  assert run(checks[1:], limit=60)


def test_a_check_without_end_ends_the_process():
  program = (
    "import time; from scripts.preflight_report import Check, run_checks; "
    "run_checks([Check('waits', lambda: time.sleep(300))], limit=0.5)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert LINE.fullmatch(done.stdout.strip()).groups() == ("waits", "FAILED")


def test_a_wrong_operation_is_noticed(monkeypatch):
  preflight_checks.check_depthwise()
  right = preflight_checks.depthwise
  monkeypatch.setattr(
    preflight_checks, "depthwise", lambda *a, **options: 1.001 * right(*a, **options)
  )
  with pytest.raises(
    DifferenceError, match=r"instead of .* of the largest value, more than 1.0e-04"
  ):
    preflight_checks.check_depthwise()


@pytest.mark.slow
def test_the_checks_pass_on_the_cpu(tmp_path):
  """All but the step of detection, which takes a minute to compile."""
  checks = "devices,collectives,attention,roi,nms,depthwise,step of cityscapes,input,checkpoint"
  process = start(f"--workdir={tmp_path}", "--words=head=fcn", f"--only={checks}")
  out, errors = process.communicate()
  assert process.returncode == 0, out + errors[-3000:]
  found = results(out)
  assert len(found) == 10 and list(found)[:2] == ["devices", "collectives"]
  assert {"step of cityscapes", "checkpoint"} <= set(found)
  assert set(found.values()) == {"ok"}
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes(tmp_path):
  flags = (
    f"--workdir={tmp_path}",
    "--only=devices,collectives,nms,input,checkpoint",
    f"--coordinator=localhost:{free_port()}",
    "--num_processes=2",
  )
  processes = [start(*flags, f"--process_id={i}") for i in range(2)]
  (out, errors), (other, _) = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0], out + errors[-3000:]
  assert list(results(out).values()) == ["ok"] * 5
  assert "2 host(s) of 1" in out and "GB/s per device" in out
  assert not results(other)


def test_a_wrong_flag_is_reported(tmp_path):
  process = start(f"--workdir={tmp_path}", "--only=nothing")
  _, errors = process.communicate()
  assert process.returncode == 2
  assert errors.splitlines()[-1].startswith(
    "error: --only=nothing: choose from devices, collectives, "
  )
