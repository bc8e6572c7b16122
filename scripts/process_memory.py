"""Peak memory of a piece of work, for the benchmarks."""

import pathlib
import sys
from collections.abc import Callable

import jax


def peak_growth(work: Callable[[], object]) -> float:
  """MB by which the peak while `work` runs exceeds the memory before: of a GPU, or of the process on Linux.

  On a GPU it counts what JAX and PyTorch allocate; call it in a process that has done nothing else, because
  JAX's peak cannot be reset.
  """
  if jax.default_backend() == "gpu":
    return _growth_on_gpu(work)
  # writing 5 resets the peak to the resident memory, that of inputs and code
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _status("VmRSS")
  work()
  return (_status("VmHWM") - before) / 1e3


def _growth_on_gpu(work: Callable[[], object]) -> float:
  device = jax.local_devices()[0]
  torch = sys.modules.get("torch")
  before = device.memory_stats()["bytes_in_use"]
  if torch:
    torch.cuda.reset_peak_memory_stats()
    before += torch.cuda.memory_allocated()
  work()
  peak = device.memory_stats()["peak_bytes_in_use"]
  if torch:
    peak += torch.cuda.max_memory_allocated()
  return (peak - before) / 1e6


def _status(field: str) -> int:
  """A field of this process's status in kilobytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1])
  raise ValueError(f"/proc/self/status has no {field}")
