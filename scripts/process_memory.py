"""Peak memory of a piece of work, for the benchmarks."""

import pathlib
from collections.abc import Callable


def peak_growth(work: Callable[[], object]) -> float:
  """MB by which the peak of this process while `work` runs exceeds its memory before; Linux only."""
  # writing 5 resets the peak to the resident memory, that of inputs and code
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _status("VmRSS")
  work()
  return (_status("VmHWM") - before) / 1e3


def private(pid: int) -> float:
  """MB of a process that it shares with no other; Linux only."""
  lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
  return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def _status(field: str) -> int:
  """A field of this process's status in kilobytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1])
  raise ValueError(f"/proc/self/status has no {field}")
