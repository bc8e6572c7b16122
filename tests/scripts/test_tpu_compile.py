"""A whole training step compiles for the chips of a TPU, and its memory is reported."""

import re
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_a_training_step_compiles_for_a_tpu():
  command = [sys.executable, ROOT / "scripts" / "tpu_compile.py", "--quick", "--part=step"]
  config = "--config=configs/cityscapes.py:demo,head=fcn"
  done = subprocess.run(
    [*command, config, "--config.model.dtype=bfloat16"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  assert "4 chips, 1 image(s) of 128 x 128 each, 48 channels, bfloat16" in done.stdout
  (sizes,) = re.findall(r"^step +(\d+) +(\d+) +(\d+)", done.stdout, re.MULTILINE)
  arguments, temporaries, peak = map(int, sizes)
  assert 0 < arguments < peak <= arguments + temporaries + 1 < 1000
