"""Programs that run in turns, or in processes of their own, for the benchmarks."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from scripts.machine import allowed_cores, cpu

Name = TypeVar("Name", bound=Hashable)


def turns(
  runs: Mapping[Name, Callable[[], object]],
  repetitions: int,
  *,
  warm_ups: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
  """Runs programs in turns, so that other work on the machine slows all of them alike.

  Args:
    runs: the programs, each of which returns when its result is ready.
    repetitions: timed runs of each.
    warm_ups: runs of each before the first one that is timed.
    clock: returns seconds.

  Returns:
    The seconds of each program, one number per repetition.
  """
  for _ in range(warm_ups):
    for run in runs.values():
      run()
  seconds: dict[Name, list[float]] = {name: [] for name in runs}
  for _ in range(repetitions):
    for name, run in runs.items():
      begun = clock()
      run()
      seconds[name].append(clock() - begun)
  return seconds


def medians(seconds: Mapping[Name, list[float]]) -> dict[Name, float]:
  """Returns the median of each program's seconds."""
  return {name: statistics.median(values) for name, values in seconds.items()}


def device() -> str:
  """Returns what JAX runs on: the accelerator, or the cores that the process may use."""
  if jax.default_backend() == "cpu":
    return f"{len(allowed_cores())} core(s) of {cpu()}"
  return jax.devices()[0].device_kind


def run_of(program: Callable, *arguments) -> Callable[[], Any]:
  """Returns a function without arguments that runs a program of JAX and waits for its result."""
  return lambda: jax.block_until_ready(program(*arguments))


def matrix_product(dtype: str) -> tuple[Callable[[], Any], float]:
  """Returns a run of a large matrix product, and its number of floating-point operations."""
  side = 4096
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  return run_of(jax.jit(jnp.matmul).lower(a, a).compile(), a, a), 2.0 * side**3


def number_printed_by(script: str, *arguments: str, **environment: str) -> float:
  """Runs a Python script in a process of its own, with these variables; returns the last number it prints.

  Returns NaN, with a line that says why, if the script fails.
  """
  command = [sys.executable, script, *arguments]
  variables = os.environ | environment
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
  if done.returncode:
    reason = done.stderr.splitlines()[-1:] or [f"status {done.returncode}"]
    print(f"{' '.join(arguments)} failed: {reason[0]}", flush=True)
    return float("nan")
  return float(done.stdout.split()[-1])
