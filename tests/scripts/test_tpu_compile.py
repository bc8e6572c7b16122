"""The search for the largest batch, and real compilations of a small training step for the chips of a TPU."""

import re
import subprocess
import sys

import pytest

from fpt_jax import models, optim
from fpt_jax.run.command_line import load_config
from scripts.tpu_chips import GIB
from scripts.tpu_measure import largest, needed
from tests.runs import ROOT

SMALL = ("--config=configs/cityscapes.py:demo,head=fcn", "--config.model.dtype=bfloat16")


def tpu_compile(*arguments):
  return subprocess.run(
    [sys.executable, ROOT / "scripts" / "tpu_compile.py", *arguments],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize(
  ("fixed", "each", "most"), [(100, 100, 8), (0, 150, 6), (900, 99, 0), (0, 9, 110)]
)
def test_the_largest_batch_takes_few_compilations(fixed, each, most, start):
  """1000 bytes; memory grows linearly, apart from a byte that an extrapolation does not know."""
  asked = []

  def peak(images):
    asked.append(images)
    size = fixed + each * images + 2 * (images % 2)
    return size if size <= 1200 else None  # what is much too large does not compile

  assert largest(peak, 1000, start) == most
  assert len(asked) == len(set(asked)) <= 9


def test_sizes_in_the_messages_of_the_compiler():
  long = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
  )
  assert needed(f"{long}Used 17.25G of 15.75G hbm.") == "it needs 17.25GiB of 15.75GiB"
  short = "the total memory required for HLO temporaries (2.00T) exceeds available HBM (15.75G)."
  assert needed(short) == "it needs 2.00TiB of 15.75GiB"
  assert needed("another reason") == "another reason"


@pytest.mark.slow
def test_a_training_step_compiles_for_a_tpu():
  pytest.importorskip("libtpu")
  done = tpu_compile("--quick", "--topology=v5e:2x2", *SMALL)
  assert done.returncode == 0, done.stderr[-4000:]
  assert done.stdout.startswith("v5e:2x2, 4 chips, 48 channels, bfloat16\n")
  assert "train: 1 image(s) of 128 x 128 per chip" in done.stdout
  number = r"([\d.]+)"
  ((peak, memory),) = re.findall(rf"memory +{number} GiB of {number} GiB", done.stdout)
  assert 0 < float(peak) < 1 and float(memory) * GIB == 15.75 * GIB
  # every gradient is summed over the chips once, almost all of them in bfloat16
  ((megabytes, dtype),) = re.findall(
    rf"all-reduce +\d+ times, {number} MB, the largest .* of (\w+):", done.stdout
  )
  config = load_config(SMALL[0].partition("=")[2])
  structure = models.structure_of(config)
  trained = optim.trainable(config, structure.parameters())
  gradients = sum(structure.shapes[name].size for name in trained) * 2
  assert dtype == "bf16" and gradients / 1e6 < float(megabytes) < 1.1 * gradients / 1e6
  assert re.search(r"least time +[\d.]+ ms, bound by (compute|memory|network)", done.stdout)
  assert re.search(r"at most +\d+ images/s on 4 chips, \d+% of the peak", done.stdout)


@pytest.mark.slow
def test_what_does_not_fit_or_compile_is_reported_in_one_line():
  pytest.importorskip("libtpu")
  done = tpu_compile("--quick", "--topology=v5e:2x2", "--images_per_chip=20000", *SMALL)
  assert done.returncode == 1, done.stderr[-4000:]
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert re.search(
    r"20000 image\(s\) per chip does not fit: it needs [\d.]+[GT]iB of 15.75GiB", line
  )
  done = tpu_compile("--topology=v5e:3x3", *SMALL)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "--topology=v5e:3x3" in done.stderr.splitlines()[-1]
