#!/usr/bin/env python3
"""Kills short runs at random moments, resumes them, and compares the end with a run that was never stopped.

    python scripts/fault_test.py --kills=30                 # one process
    python scripts/fault_test.py --kills=10 --processes=2   # two processes that train together

Each kill hits a run anywhere between its start and its end: while it prepares data, compiles, trains, saves
or evaluates. Two of three kills are SIGKILL, the others SIGTERM; of several processes, SIGTERM goes to one
and SIGKILL to all. The same command resumes the run. A run that reaches its end must have the same metrics
and the same arrays, bit for bit, as the run that was never stopped; then another run begins. The exit status
is 1 if one differs.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # as fpt_jax.main

import argparse
import collections
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import numpy as np
import rich.table

import fpt_jax
from fpt_jax.run.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
# a run of every part of the demo, as small as possible
FLAGS = (
  "--config=configs/coco_mask.py:demo,scope=adjacent",
  "--config.data.builder.train_size=32",
  "--config.data.builder.val_size=8",
  "--config.data.builder.image_size=64",
  "--config.data.short_edge=64",
  "--config.data.long_edge=64",
  "--config.data.buckets=((64,64),)",
  "--config.model.backbone.width=4",
  "--config.model.pyramid.channels=8",
  "--config.model.box_head.hidden=16",
  "--config.model.mask_head.hidden=8",
  "--config.batch_size=4",
  "--config.eval.batch_size=4",
  "--config.steps=60",
  "--config.log_every=1",
  "--config.checkpoint.every_steps=5",
  "--config.eval.every_steps=20",
)
SPEEDS = (
  "images_per_second",
  "data_wait",
  "eta_seconds",
)  # beginnings of metrics that are measured times
# the phase that a line of the log begins; the last one decides
PHASES = {
  "preparing": "preparation",
  "prepared": "start and compilation",
  "first step": "steps and saves",
  " step ": "steps and saves",
  "evaluate": "evaluation",
  "resuming": "start and compilation",
}


class Run:
  """A run in a folder of its own, with its own data.

  Args:
    folder: the folder.
    processes: number of processes.
  """

  def __init__(self, folder: pathlib.Path, processes: int):
    self.folder, self.processes = folder, processes
    self.workdir, self.log = folder / "run", folder / "log.txt"
    folder.mkdir()

  def start(self) -> list[subprocess.Popen]:
    """Starts or resumes the run."""
    flags = (*FLAGS, f"--workdir={self.workdir}", f"--config.data.data_dir={self.folder}/data")
    common = {"JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled")}
    if self.processes > 1:
      with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
      common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes)}
    with self.log.open("a") as log:
      return [
        subprocess.Popen(
          [sys.executable, "-m", "fpt_jax.main", *flags],
          stdout=log,
          stderr=log,
          cwd=ROOT,
          env=os.environ | common | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(self.processes)
      ]

  def phase(self, since: int) -> str:
    """The phase of the run, by the lines of its log after the first `since` bytes."""
    found = "start and compilation"
    for line in self.log.read_text()[since:].splitlines():
      for words, phase in PHASES.items():
        if words in line:
          found = phase
    return found

  def difference(self, other: "Run") -> str:
    """What differs from another run that has reached its end; "" if nothing does."""
    mine, theirs = (untimed(run.workdir) for run in (self, other))
    if mine != theirs:
      return "the metrics differ"
    ours, reference = (fpt_jax.restore(str(run.workdir)).arrays for run in (self, other))
    for name, array in reference.items():
      if not np.array_equal(np.asarray(ours[name]), np.asarray(array)):
        return f"{name} differs"
    return ""


def untimed(workdir: pathlib.Path) -> list[dict[str, float]]:
  """The lines of metrics.jsonl without measured times."""
  return [
    {k: v for k, v in line.items() if not k.startswith(SPEEDS)}
    for line in read_metrics(str(workdir))
  ]


def wait(processes: list[subprocess.Popen], seconds: float) -> bool:
  """Waits until all processes have ended, or some seconds have passed; returns whether they have ended."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if all(p.poll() is not None for p in processes):
      return True
    time.sleep(0.02)
  return False


def kill(processes: list[subprocess.Popen], number: signal.Signals) -> None:
  """Sends SIGTERM to one process and waits until all have saved, or kills all of them."""
  chosen = processes if number == signal.SIGKILL else [random.choice(processes)]
  for process in chosen:
    process.send_signal(number)
  if not wait(processes, 300):
    raise SystemExit("error: the processes have not ended 300 s after a signal")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  random.seed(options.seed)
  with tempfile.TemporaryDirectory() as temporary:
    raise SystemExit(test(pathlib.Path(temporary), options.kills, options.processes))


def test(folder: pathlib.Path, kills: int, processes: int) -> int:
  """Runs the test, prints a table, and returns the exit status."""
  whole = Run(folder / "whole", processes)
  for again in (
    False,
    True,
  ):  # the second one has its compiled programs on disk, as those that are killed
    shutil.rmtree(whole.folder)
    whole.folder.mkdir()
    begun = time.monotonic()
    started = whole.start()
    if not wait(started, 3600) or any(p.returncode for p in started):
      raise SystemExit(f"error: the run fails without a kill: {whole.log.read_text()[-2000:]}")
    print(f"never stopped, {'from' if again else 'without'} compiled programs on disk: ", end="")
    print(f"{time.monotonic() - begun:.0f} s")
  seconds = time.monotonic() - begun
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  run, ended, different = Run(folder / "run0", processes), 0, []
  remaining = kills
  while remaining or run.log.exists():
    since = run.log.stat().st_size if run.log.exists() else 0
    started = run.start()
    delay = random.uniform(0, seconds) if remaining else 3600
    if wait(started, delay):
      if any(p.returncode for p in started):
        raise SystemExit(f"error: the run fails after a kill: {run.log.read_text()[-2000:]}")
      difference = run.difference(whole)
      ended += 1
      if difference:
        different.append(difference)
      print(f"run {ended} has ended: {difference or 'equal'}")
      shutil.rmtree(run.folder)
      run = Run(folder / f"run{ended}", processes)
      continue
    number = random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    phase = run.phase(since)
    kill(started, number)
    counts[phase, number.name] += 1
    remaining -= 1
    print(f"{number.name} after {delay:.1f} s, during {phase}")
  table = rich.table.Table("killed during", "SIGKILL", "SIGTERM")
  for phase in dict.fromkeys(PHASES.values()):
    table.add_row(phase, *(str(counts[phase, n]) for n in ("SIGKILL", "SIGTERM")))
  rich.print(table)
  print(
    f"{kills} kills, {ended} runs to their end: {ended - len(different)} equal, {len(different)} not"
  )
  return 1 if different else 0


if __name__ == "__main__":
  main()
