#!/usr/bin/env python3
"""Kills short runs at random moments, resumes them, and compares the end with a run that was never stopped.

    python scripts/fault_test.py --kills=30                 # one process
    python scripts/fault_test.py --kills=10 --processes=2   # two processes that train together

Each kill hits a run anywhere between its start and its end: while it prepares data, compiles, trains, saves
or evaluates. Two of three kills are SIGKILL, the others SIGTERM. Of several processes, SIGTERM goes to one,
and SIGKILL to one or to all; the others must end by themselves, with a message and a status that says to run
the command again. The same command resumes the run. A run that reaches its end must have the same metrics
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
# seconds that a process may go on without another one: JAX waits 300 s for one that has not joined yet
LIMIT = 330
# statuses of processes that a signal or the loss of another process has ended, and words of their messages;
# JAX ends a process by SIGABRT if the first process, or the heartbeat of another one, is missing
STATUSES = {
  75: ("stopped by a signal", "another process has ended"),
  -signal.SIGABRT: ("JAX distributed service detected fatal errors",),
  2: ("cannot join the other processes",),
}
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


def kill(processes: list[subprocess.Popen], chosen: list[subprocess.Popen], number: int) -> float:
  """Sends a signal to the chosen processes and waits until all have ended; returns the seconds."""
  begun = time.monotonic()
  for process in chosen:
    process.send_signal(number)
  if not wait(processes, LIMIT):
    for process in processes:
      process.kill()
    raise SystemExit(f"error: the processes have not ended {LIMIT} s after a signal")
  return time.monotonic() - begun


def problem(processes: list[subprocess.Popen], number: int, log: str) -> str:
  """What is wrong with how processes have ended after a signal; "" if nothing is.

  Args:
    processes: the processes.
    number: the signal.
    log: what they have written.
  """
  for status in {process.returncode for process in processes} - {0, -number}:
    words = STATUSES.get(status)
    if words is None or not any(w in log for w in words):
      return f"a process has ended with status {status}"
  return "a process has a stack trace" if "Traceback" in log else ""


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
  ends: collections.Counter[tuple[str, int]] = collections.Counter()
  slowest = 0.0
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
    everyone = number == signal.SIGKILL and random.random() < 0.5
    chosen = started if everyone else [random.choice(started)]
    kind = f"{number.name} of {len(chosen)}" if processes > 1 else number.name
    phase = run.phase(since)
    waited = kill(started, chosen, number)
    slowest = max(slowest, waited)
    counts[phase, kind] += 1
    ends.update((kind, p.returncode) for p in started)
    remaining -= 1
    statuses = ", ".join(str(p.returncode) for p in started)
    print(f"{kind} after {delay:.1f} s, during {phase}: ended in {waited:.1f} s, status {statuses}")
    if found := problem(started, number, run.log.read_text()[since:]):
      raise SystemExit(f"error: {found}: {run.log.read_text()[since:][-4000:]}")
  kinds = sorted({kind for _, kind in counts})
  table = rich.table.Table("killed during", *kinds)
  for phase in dict.fromkeys(PHASES.values()):
    table.add_row(phase, *(str(counts[phase, kind]) for kind in kinds))
  rich.print(table)
  print("statuses:", ", ".join(f"{k}: {n} x {status}" for (k, status), n in sorted(ends.items())))
  print(f"the last process has ended at most {slowest:.0f} s after a signal")
  print(
    f"{kills} kills, {ended} runs to their end: {ended - len(different)} equal, {len(different)} not"
  )
  return 1 if different else 0


if __name__ == "__main__":
  main()
