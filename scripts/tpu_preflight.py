#!/usr/bin/env python3
"""Checks the devices of this machine, or of a pod, before a long training: two minutes that may save a day.

    python scripts/tpu_preflight.py --workdir=gs://bucket/run     # on every host, as `fpt_jax.main`
    JAX_PLATFORMS=cpu python scripts/tpu_preflight.py --workdir=/tmp/run

One line per check: its name, ok or FAILED, seconds (with compilation), and its figure or what differs:

    devices                 kind, number and memory
    collectives             sums over all devices and hosts have the known results; bandwidth
    attention NAME DTYPE    the Pallas kernels and their gradients equal the naive formula
    roi_align, nms, depthwise    the forms for TPUs equal those for CPUs
    step of NAME            a training step of a small demo has the losses and gradient of one on the CPU
    input                   images per second of the loader, small generated images
    checkpoint              what is saved in --workdir is restored bit for bit

The exit status is 1 if a check has failed. What is compared is computed on each host's own CPU. Without an
accelerator, the attention kernels run in interpret mode.
"""

import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
if "cpu" not in (platforms := os.environ.get("JAX_PLATFORMS", "cpu")).split(","):
  os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # to compare with

from absl import flags, logging

from fpt_jax import configs
from fpt_jax.errors import UserError
from fpt_jax.run import cluster, command_line
from fpt_jax.run.folder import run_folder
from scripts import preflight_checks as checks
from scripts.preflight_report import Check, run_checks

_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder for a checkpoint, which is removed again: a local path or gs://bucket/run."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "~/fpt_jax_data", "Folder of the generated images, on a local disk of each host."
)
_ONLY = flags.DEFINE_list(
  "only", [], "Beginnings of the names of the checks to run; all by default."
)
_WORDS = flags.DEFINE_string(
  "words", "", "More words after the colon of the demos' configs, such as backbone=resnet50_gc."
)
_LIMIT = flags.DEFINE_float("limit", 600, "Seconds after which a check counts as failed.")
_TRACE = flags.DEFINE_bool("trace", False, "Print the stack trace of each failure.")
_find_cluster = cluster.define_flags()
flags.adopt_module_key_flags(cluster)  # --help lists them


def all_checks(workdir: str, words: str, data_dir: str) -> list[Check]:
  """Returns the checks in the order in which they run."""
  of = functools.partial
  steps = [
    Check(f"step of {name}", of(checks.check_step, name, words, data_dir))
    for name in checks.BENCHMARKS
  ]
  return [
    Check("devices", checks.check_devices),
    Check("collectives", checks.check_collectives),
    Check("attention dot bfloat16", of(checks.check_attention, "dot", "bfloat16")),
    Check("attention dist float32", of(checks.check_attention, "euclidean", "float32")),
    Check("roi_align", checks.check_roi_align),
    Check("nms", checks.check_nms),
    Check("depthwise", checks.check_depthwise),
    *steps,
    Check("input", of(checks.check_input, data_dir)),
    Check("checkpoint", of(checks.check_checkpoint, workdir)),
  ]


def main() -> None:
  logging.set_verbosity(logging.WARNING)
  run_folder(_WORKDIR.value)
  found = all_checks(_WORKDIR.value, _WORDS.value, _DATA_DIR.value)
  chosen = [c for c in found if not _ONLY.value or c.name.startswith(tuple(_ONLY.value))]
  if not chosen:
    raise UserError(
      f"--only={','.join(_ONLY.value)}: choose from {', '.join(c.name for c in found)}"
    )
  cluster.join(_find_cluster())
  if not run_checks(chosen, limit=_LIMIT.value, trace=_TRACE.value):
    sys.exit(1)


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
