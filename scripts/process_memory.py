"""How much memory a piece of work takes, for the benchmarks."""

import pathlib
from collections.abc import Callable


def peak_growth(work: Callable[[], object]) -> float:
  """MB by which this process's peak rises while `work` runs over what it holds before; Linux only."""
  # 5 resets the peak to what is resident now: inputs and code
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _status("VmRSS")
  work()
  return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
  """Kilobytes of a field of this process's status."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1])
  raise ValueError(f"/proc/self/status has no {field}")
