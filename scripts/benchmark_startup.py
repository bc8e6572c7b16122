#!/usr/bin/env python3
"""Times the start of the program: `fpt_jax.main --help` beside the imports of JAX and Flax alone.

    python scripts/benchmark_startup.py

Each run is a process of its own; medians of interleaved repetitions.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import argparse
import functools
import subprocess

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
  options = parser.parse_args()
  runs = {name: functools.partial(run, *program) for name, program in PROGRAMS.items()}
  seconds = medians(turns(runs, options.repetitions))
  print(f"On {device()}:\n")
  print(markdown.table(["", "time"], [[f"`{name}`", f"{s:.2f} s"] for name, s in seconds.items()]))


def run(*program: str) -> None:
  done = subprocess.run(
    [sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  if "Traceback" in done.stderr or not (done.stdout or program[0] == "-c"):
    sys.exit(f"error: {' '.join(program)} failed: {done.stderr.splitlines()[-1:]}")


if __name__ == "__main__":
  main()
