#!/usr/bin/env python3
"""Times the start: `fpt_jax.main --help` beside the imports of JAX and Flax alone, and a training.

    python scripts/benchmark_startup.py

Each run is a process of its own; medians of interleaved repetitions. The training is that of the demo, up to
its first step, once with an empty compilation cache and once more with what the first run has compiled.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import argparse
import functools
import os
import re
import subprocess
import tempfile
import time

from scripts import markdown
from scripts.timing import device, medians, turns

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {
  'python -c "import jax, flax.nnx"': ("-c", "import jax, flax.nnx"),
  "python -m fpt_jax.main --help": ("-m", "fpt_jax.main", "--help"),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument(
    "--no_training", action="store_true", help="without the first step of the demo"
  )
  options = parser.parse_args()
  runs = {name: functools.partial(run, *program) for name, program in PROGRAMS.items()}
  seconds = medians(turns(runs, options.repetitions))
  print(f"On {device()}:\n")
  print(markdown.table(["", "time"], [[f"`{name}`", f"{s:.2f} s"] for name, s in seconds.items()]))
  if options.no_training:
    return
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(demo("prepare", folder), cwd=ROOT, check=True, capture_output=True)
    for name in ("nothing compiled before", "compiled before"):
      start, step = first_step(folder)
      rows.append([name, f"{start:.0f} s", f"{step} s"])
  header = ["training of the demo", "from the start to its first step", "its first step alone"]
  print(f"\n{markdown.table(header, rows)}")


def run(*program: str) -> None:
  done = subprocess.run(
    [sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if "Traceback" in done.stderr or not (done.stdout or program[0] == "-c"):
    sys.exit(f"error: {' '.join(program)} failed: {done.stderr.splitlines()[-1:]}")


def demo(mode: str, folder: str) -> list[str]:
  """Returns a command of the demo, with its data in `folder`."""
  return [
    *(sys.executable, "-m", "fpt_jax.main", f"--mode={mode}", "--config=configs/coco_mask.py:demo"),
    f"--config.data.data_dir={folder}/data",
  ]


def first_step(folder: str) -> tuple[float, str]:
  """Trains the demo up to its first step; returns the seconds since the start, and those of the step.

  Data and compiled programs are in `folder`.
  """
  command = [*demo("train", folder), f"--workdir={tempfile.mkdtemp(dir=folder)}"]
  variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
  begun = time.perf_counter()
  with subprocess.Popen(
    command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  ) as process:
    line = ""
    for line in process.stdout or ():
      if found := re.search(r"first step, compilation included: (\d+) s", line):
        process.kill()
        return time.perf_counter() - begun, found[1]
  sys.exit(f"error: the training of the demo failed: {line.strip()}")


if __name__ == "__main__":
  main()
