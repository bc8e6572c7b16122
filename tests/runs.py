"""A tiny run for tests: the demo's config, as small as possible while it still uses every part."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.configs import cityscapes, coco_mask

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = {
  "data.short_edge": 64,
  "data.long_edge": 64,
  "data.buckets": ((64, 64),),
  "data.builder": {"train_size": 24, "val_size": 4, "image_size": 64},
  "model.backbone.width": 4,
  "model.pyramid.channels": 8,
  "model.fpt.scope": "adjacent",
  "model.fpt.drop_block_schedule": "constant",
  "model.box_head.hidden": 16,
  "model.mask_head.hidden": 8,
  "model.mask_head.layers": 1,
  "model.rpn.train.pre_nms": 40,
  "model.rpn.train.post_nms": 20,
  "model.rpn.test.pre_nms": 40,
  "model.rpn.test.post_nms": 20,
  "model.box_head.samples": 8,
  "model.test.detections_per_image": 5,
  "model.test.max_candidates": 20,
  "batch_size": 4,
  "optim.base_batch_size": 4,
  # a constant rate: runs of any length share one compiled step
  "optim.warmup_steps": 0,
  "optim.schedule": "step",
  "optim.decay_at": (),
  "steps": 8,
  "log_every": 1,
  "checkpoint.every_steps": 2,
  "eval.every_steps": 100,
  "eval.batch_size": 4,
}


SEGMENTATION_FIELDS = {
  "data.crop": (64, 64),
  "data.builder": {"train_size": 24, "val_size": 4, "image_size": 64},
  "model.backbone.width": 4,
  "model.pyramid.channels": 8,
  "model.pyramid.kernels": (1, 3, 5, 7),
  "model.fpt.scope": "adjacent",
  "model.fpt.drop_block_schedule": "constant",
  "model.head.hidden": 8,
  "model.auxiliary.hidden": 8,
  "batch_size": 4,
  "optim.base_batch_size": 4,
  "optim.warmup_steps": 0,
  "steps": 8,
  "log_every": 1,
  "checkpoint.every_steps": 2,
  "eval.every_steps": 100,
  "eval.batch_size": 4,
}


def tiny_config(arg: str = "", **fields) -> ConfigDict:
  """Returns the config of `coco_mask.py:demo,{arg}`, with `fields` set; their names have "__" for dots."""
  return _tiny(coco_mask.get_config(f"demo,{arg}"), FIELDS, fields)


def tiny_segmentation_config(arg: str = "", **fields) -> ConfigDict:
  """Like `tiny_config`, for `cityscapes.py:demo,{arg}`."""
  return _tiny(cityscapes.get_config(f"demo,{arg}"), SEGMENTATION_FIELDS, fields)


def free_port() -> int:
  """Returns a port of localhost that no process listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def shared_data_dir() -> str:
  """Returns the folder of generated records that all tests share."""
  return os.path.join(tempfile.gettempdir(), "fpt_jax_test_data")


def _tiny(config: ConfigDict, tiny: dict, fields: dict) -> ConfigDict:
  config.data.builder = ConfigDict()
  config.data.data_dir = shared_data_dir()
  for name, value in (tiny | {k.replace("__", "."): v for k, v in fields.items()}).items():
    *path, last = name.split(".")
    part = config
    for key in path:
      part = part[key]
    part[last] = ConfigDict(value) if isinstance(value, dict) else value
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  return config


def config_file(folder: pathlib.Path, **fields) -> pathlib.Path:
  """Writes a config file that returns `tiny_config(**fields)`, for the command line; returns its path."""
  file = folder / "tiny_config.py"
  file.write_text(
    f"from tests.runs import tiny_config\n\n\ndef get_config():\n  return tiny_config(**{fields!r})\n"
  )
  return file


# environment of processes that compile: a shared cache, and compilation like in `quick_compilation`
QUICK = {
  "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "fpt_jax_test_cache"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def command(*flags: str, **environment: str) -> subprocess.Popen:
  """Starts `python -m fpt_jax.main` with these flags; its standard error is a pipe of text."""
  return subprocess.Popen(
    [sys.executable, "-m", "fpt_jax.main", *flags],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | QUICK | environment,
  )


def importer(*flags: str) -> subprocess.CompletedProcess:
  """Runs `python scripts/import_torchvision.py` with these flags; captures its output as text."""
  command = [sys.executable, ROOT / "scripts" / "import_torchvision.py", *flags]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def host_devices(count: int) -> dict[str, str]:
  """Returns the environment of a process in which the CPU appears as `count` devices.

  XLA's concurrent schedule lets two devices start different collectives, each of which then waits for
  the other device: on few cores, such a process soon deadlocks. In the sequential schedule all devices
  reach the collectives in the same order.
  """
  flags = {
    "xla_force_host_platform_device_count": count,
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
    "xla_cpu_collective_call_terminate_timeout_seconds": 240,  # a busy machine is slow, not stuck
  }
  return {
    "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
    "JAX_PLATFORMS": "cpu",
  }


def succeed(process: subprocess.Popen, timeout: float = 400) -> str:
  """Waits for a process and checks that it succeeds: exit code 0, no signal and no stack trace.

  Returns:
    Its standard error.
  """
  _, text = process.communicate(timeout=timeout)
  assert process.returncode == 0, f"exit code {process.returncode}: {text[-3000:]}"
  assert "Traceback" not in text, text[-3000:]
  return text


def error_lines(process: subprocess.Popen, timeout: float = 400) -> list[str]:
  """Waits for a process; returns the lines of its standard error that report errors."""
  _, text = process.communicate(timeout=timeout)
  return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


def entries_of(workdir):
  """Returns what training wrote into metrics.jsonl, by step."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {entry["step"]: entry for entry in lines if "total_loss" in entry}


def norm_of(arrays, names):
  return np.sqrt(sum(np.sum(np.square(np.float64(arrays[name]))) for name in names))


def losses_by_step(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """Returns the losses in metrics.jsonl by step; fails if a step is written twice."""
  losses = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    entry = json.loads(line)
    if "total_loss" in entry:
      assert entry["step"] not in losses
      losses[entry["step"]] = {k: v for k, v in entry.items() if "loss" in k}
  return losses


def wait_for_step(workdir, step, process, seconds=900):
  """Waits until metrics.jsonl has reached a step."""
  file, end = workdir / "metrics.jsonl", time.monotonic() + seconds
  while time.monotonic() < end and process.poll() is None:
    if file.exists() and any(f'"step": {n},' in file.read_text() for n in range(step, step + 20)):
      return
    time.sleep(0.05)
  raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-2000:]}")
