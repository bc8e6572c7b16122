#!/usr/bin/env python3
"""Trains the rows of a table with several seeds and the same budget, and makes a table, curves and bars.

    python scripts/ablation.py table1 --runs=/runs/ablation --seeds=0,1,2
    python scripts/ablation.py table1 --only=BFP,BFP+GT      # some of its rows
    python scripts/ablation.py table1 --report               # the table of the runs that are recorded
    python scripts/ablation.py table1 -- --config.steps=900  # flags of fpt_jax.main for all rows

The tables are in fpt_jax/configs/ablations.py. On a CPU, each run has one core for itself, of those that the
script may use (`taskset -c 1 python scripts/ablation.py ...`). On a GPU, `--processes=8` trains eight runs at
a time, with XLA's deterministic operations. A finished run is one line of docs/results/TABLE.jsonl, and is
not run again; a row that another table has with the same flags is copied from there. The same command
continues what was interrupted. The table becomes a section of docs/results.md.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # as fpt_jax.main

import argparse
import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import queue
import re
import signal
import subprocess
import time

from absl import logging
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fpt_jax.configs.ablations import ABLATIONS, Row, Table
from fpt_jax.run.command_line import load_config
from fpt_jax.run.metrics import losses_and_evaluations
from fpt_jax.run.progress import Progress
from scripts.ablation_page import draw, markdown
from scripts.machine import Machine, allowed_cores, this_machine
from scripts.markdown import with_section

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAIN = (sys.executable, "-m", "fpt_jax.main")
LOCAL = {  # options that name folders of one machine, and the flags of fpt_jax.main that they become
  "data_dir": "config.data.data_dir",
  "source": "config.data.source",
  "init_from": "config.init_from",
}


def main() -> None:
  logging.set_verbosity(logging.INFO)
  options = parsed_arguments()
  table, out = ABLATIONS[options.table], pathlib.Path(options.out).expanduser()
  records = out / f"{options.table}.jsonl"
  failed = [] if options.report else train(table, records, options)
  shared = " ".join(options.flags)
  recorded = read(records)
  rows = {row: runs_of(row, table, recorded, options) for row in table.rows}
  rows = {row: runs for row, runs in rows.items() if runs}
  if not rows and not failed:
    flags = f"with the flags {shared!r}" if shared else "without further flags"
    failed = [f"{records} has no run {flags}; train one, without --report"]
  if rows:
    page, picture = out.with_suffix(".md"), out / f"{options.table}.png"
    section = markdown(options.table, table, rows, shared, picture=f"{out.name}/{picture.name}")
    old = page.read_text() if page.exists() else ""
    page.write_text(with_section(old, options.table, section, writer="scripts/ablation.py"))
    FigureCanvasAgg(draw(table, rows)).print_png(picture)
    print(page, picture, sep="\n")
  if failed:
    raise SystemExit("\n".join(f"error: {message}" for message in failed))


def parsed_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("table", choices=ABLATIONS)
  parser.add_argument("--runs", default="workdirs/ablation", help="folder of the runs")
  parser.add_argument("--seeds", default="0", help="numbers, separated by commas")
  parser.add_argument("--only", default="", help="names of rows, separated by commas; default: all")
  parser.add_argument(
    "--processes", type=int, help="runs at a time; default: the cores on a CPU, otherwise 1"
  )
  for option, flag in LOCAL.items():
    parser.add_argument(f"--{option}", default="", help=f"as --{flag}; the path is not recorded")
  parser.add_argument("--out", default=str(ROOT / "docs" / "results"), help="folder of the results")
  parser.add_argument("--report", action="store_true", help="train nothing")
  arguments = sys.argv[1:]
  end = arguments.index("--") if "--" in arguments else len(arguments)
  options = parser.parse_args(arguments[:end])
  options.flags = tuple(arguments[end + 1 :])  # those of fpt_jax.main
  try:
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
  except ValueError:
    parser.error(f"--seeds={options.seeds} must be numbers, separated by commas")
  if not options.report:
    check_for_training(parser, options)
  names = [row.name for row in ABLATIONS[options.table].rows]
  options.only = [name.strip() for name in options.only.split(",") if name.strip()] or names
  for name in options.only:
    if name not in names:
      parser.error(f"{options.table} has no row {name!r}; choose from {', '.join(names)}")
  return options


def check_for_training(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
  """Ends with a message if the options or the machine do not allow the training; sets `options.machine`."""
  table = ABLATIONS[options.table]
  for option, example in table.needs.items():
    if not getattr(options, option):
      parser.error(f"{options.table} needs --{option}, such as --{option}={example}")
  options.machine = machine = this_machine()
  cores = len(allowed_cores())
  if options.processes is None:
    options.processes = cores if machine.platform == "cpu" else 1
  most = 1 if machine.platform == "tpu" else cores
  if not 1 <= options.processes <= most:
    limit = "a TPU belongs to one process" if most == 1 < cores else "the number of cores"
    parser.error(f"--processes={options.processes} must be 1 to {most}: {limit}")
  if table.devices > 1 and machine.platform != "cpu":
    parser.error(
      f"{options.table} has {table.devices} devices, which a CPU can appear as: set JAX_PLATFORMS=cpu"
    )


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run of a row.

  Attributes:
    row: the row.
    seed: value of --config.seed.
    shared: flags that all rows have.
    initialised: whether it starts from the weights of another run.
    devices: number of devices that its core appears as.
  """

  row: Row
  seed: int
  shared: tuple[str, ...]
  initialised: bool = False
  devices: int = 1

  @property
  def flags(self) -> list[str]:
    seed = f"--config.seed={self.seed}"
    return [f"--config={self.row.config}", seed, *self.row.flags, *self.shared]

  @property
  def environment(self) -> dict[str, str]:
    """XLA flags with which the CPU appears as several devices, in an order that cannot deadlock."""
    if self.devices == 1:
      return {}
    count = f"--xla_force_host_platform_device_count={self.devices}"
    return {"XLA_FLAGS": f"{count} --xla_cpu_enable_concurrency_optimized_scheduler=false"}

  @property
  def recorded(self) -> dict:
    """What identifies the run in the records; folders are those of one machine."""
    weights = ["--config.init_from=..."] if self.initialised else []
    words = ["python -m fpt_jax.main", *self.flags, *weights, "--workdir=..."]
    command = " ".join([*(f"{k}='{v}'" for k, v in self.environment.items()), *words])
    shared = " ".join(self.shared)
    return {"row": self.row.name, "seed": self.seed, "command": command, "shared": shared}

  def is_recorded_in(self, line: dict) -> bool:
    return self.recorded.items() <= line.items()

  @property
  def folder(self) -> str:
    """Name of the run's folder. Other flags have another one: they must not continue its checkpoints."""
    name = re.sub(r"[^a-z0-9.]+", "_", self.row.name.lower())
    return f"{name}_{hashlib.sha256(self.recorded['command'].encode()).hexdigest()[:8]}"


def run_of(row: Row, table: Table, seed: int, options: argparse.Namespace) -> Run:
  initialised = bool(options.init_from) or "init_from" in table.needs
  return Run(row, seed, options.flags, initialised, table.devices)


def runs_of(row: Row, table: Table, lines: list[dict], options: argparse.Namespace) -> list[dict]:
  """The recorded runs of a row, of the command that it has now."""
  return [
    line
    for line in lines
    if "seed" in line and run_of(row, table, line["seed"], options).is_recorded_in(line)
  ]


def read(records: pathlib.Path) -> list[dict]:
  """The recorded runs."""
  lines = records.read_text().splitlines() if records.exists() else []
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise SystemExit(
      f"error: {records}: a line is not JSON; correct or delete it ({error})"
    ) from None


def append(records: pathlib.Path, line: dict) -> None:
  with records.open("a") as file:
    file.write(json.dumps(line) + "\n")


def train(table: Table, records: pathlib.Path, options: argparse.Namespace) -> list[str]:
  """Trains the runs that are not recorded, records them, and returns a message for each that failed."""
  folder = pathlib.Path(options.runs).expanduser().resolve() / options.table
  rows = [row for row in table.rows if row.name in options.only]
  runs = [run_of(row, table, seed, options) for seed in options.seeds for row in rows]
  done = read(records)
  runs = [run for run in runs if not any(run.is_recorded_in(line) for line in done)]
  records.parent.mkdir(parents=True, exist_ok=True)
  tables = sorted(records.parent.glob("*.jsonl"))
  lines = {line.get("command"): line for path in tables for line in read(path)}
  for run in runs:
    if line := lines.get(run.recorded["command"]):
      append(records, line | run.recorded)
  runs = [run for run in runs if run.recorded["command"] not in lines]
  local = [f"--{flag}={value}" for key, flag in LOCAL.items() if (value := getattr(options, key))]
  configs = {run.row.config: load_config(str(ROOT / run.row.config)) for run in runs}
  for config in {str(fields.data): config for config, fields in configs.items()}.values():
    # here, because several runs at a time must not prepare the same data
    prepare = ["--mode=prepare", f"--config={config}", *options.flags, *local]
    if subprocess.run([*MAIN, *prepare], check=False, cwd=ROOT).returncode:
      return [f"{config}: the data cannot be prepared, see above"]
  cores: queue.SimpleQueue[int] = queue.SimpleQueue()
  for core in allowed_cores()[: options.processes]:
    cores.put(core)
  processes: list[subprocess.Popen] = []
  failed: list[str] = []
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
  with (
    concurrent.futures.ThreadPoolExecutor(options.processes) as pool,
    Progress(options.table, len(runs), "runs") as progress,
  ):
    share = options.machine.share_of(options.processes)
    futures = [
      pool.submit(run_once, run, options.machine, share, folder, local, cores, processes)
      for run in runs
    ]
    try:
      for future in concurrent.futures.as_completed(futures):
        result = future.result()
        if isinstance(result, str):
          failed.append(result)
        else:
          append(records, result)
        progress.advance()
    except KeyboardInterrupt:
      pool.shutdown(wait=False, cancel_futures=True)
      for process in processes:
        process.terminate()  # it saves a checkpoint and stops
      raise SystemExit("stopped; the same command goes on from here") from None
  return failed


def run_once(
  run: Run,
  machine: Machine,
  share: str,
  folder: pathlib.Path,
  local: list[str],
  cores: queue.SimpleQueue,
  processes: list[subprocess.Popen],
) -> dict | str:
  """Trains a run, or the rest of it; returns its record, or a message if it failed.

  Args:
    run: the run.
    machine: what it is trained on; a CPU gives it one core.
    share: what it has of the machine, for its record.
    folder: folder of the table's runs.
    local: flags that are not recorded.
    cores: numbers of the cores that are free.
    processes: list that the process is added to.
  """
  workdir = folder / run.folder
  resumed = workdir.exists()
  workdir.mkdir(parents=True, exist_ok=True)
  core, begun = cores.get(), time.monotonic()
  with (workdir / "log.txt").open("a") as log:
    process = subprocess.Popen(
      [*MAIN, *run.flags, f"--workdir={workdir}", *local],
      stdout=log,
      stderr=log,
      cwd=ROOT,
      env=os.environ | machine.environment | run.environment,
    )
    processes.append(process)
    if machine.platform == "cpu" and hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(process.pid, {core})
    code = process.wait()
  cores.put(core)
  if code:
    return f"{run.row.name}, seed {run.seed}: exit code {code}, see {log.name}"
  training, evaluations = losses_and_evaluations(str(workdir))
  return run.recorded | {
    "figures": evaluations[-1],
    "losses": [[entry["step"], entry["total_loss"]] for entry in training],
    "minutes": None if resumed else round((time.monotonic() - begun) / 60, 1),
    "machine": share,
    "date": datetime.date.today().isoformat(),
  }


if __name__ == "__main__":
  main()
