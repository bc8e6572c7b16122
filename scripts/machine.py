"""The machine that runs are trained on: its cores, its CPU or accelerators, and how runs share them."""

import dataclasses
import os
import pathlib
import platform
import re
import subprocess
import sys


@dataclasses.dataclass(frozen=True)
class Machine:
  """What the runs are trained on.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    name: name of the processor or of the accelerators.
  """

  platform: str
  name: str

  def share_of(self, runs: int) -> str:
    """What each of several runs at a time has of it, for the records."""
    if self.platform == "cpu":
      return f"one core of {self.name}"
    return self.name if runs == 1 else f"{self.name}, shared by up to {runs} runs"

  @property
  def environment(self) -> dict[str, str]:
    """Variables with which runs share a GPU and give the same figures again."""
    if self.platform != "gpu":
      return {}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags}


def this_machine() -> Machine:
  """Asks JAX in another process, because a process that has seen a TPU keeps it from the runs."""
  program = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep=',')"
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  asked = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
  )
  if asked.returncode:
    raise SystemExit(f"error: JAX finds no device: {asked.stderr.splitlines()[-1:]}")
  platform_name, count, kind = asked.stdout.splitlines()[-1].split(",", 2)
  if platform_name == "cpu":
    return Machine("cpu", cpu())
  return Machine(platform_name, kind if count == "1" else f"{count} x {kind}")


def allowed_cores() -> list[int]:
  """Numbers of the cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def cpu() -> str:
  """Name of the CPU."""
  info = pathlib.Path("/proc/cpuinfo")
  names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
  return names[0] if names else platform.processor() or platform.machine()
