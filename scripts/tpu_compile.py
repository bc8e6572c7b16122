#!/usr/bin/env python3
"""Compiles a config for a TPU topology, on any machine: what fits into a chip, and how fast it can be.

    python scripts/tpu_compile.py --config=configs/coco_mask.py --config.model.dtype=bfloat16
    python scripts/tpu_compile.py --config=configs/cityscapes.py --config.model.dtype=bfloat16 \\
        --topology=v5p:2x2x2 --images_per_chip=4
    python scripts/tpu_compile.py --config=configs/coco_mask.py --config.model.dtype=bfloat16 --part=eval
    python scripts/tpu_compile.py --quick --config=configs/coco_mask.py --config.model.dtype=bfloat16 --search

The parts are a training step with its optimizer, the program of an evaluation, and FPT alone, forward and
with its gradient. Printed are the memory that each chip needs, the communication between the chips, the
arithmetic, and the least time that these allow, see docs/tpu.md. A program that does not fit gives status 1.

It needs libtpu (requirements-test.txt), but no TPU. By default there is one image per chip.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import NoReturn

import jax
from absl import flags
from ml_collections import config_flags

from fpt_jax import configs
from fpt_jax.errors import UserError
from fpt_jax.run import command_line
from fpt_jax.tasks.task import check_config
from scripts import tpu_chips, tpu_programs
from scripts.tpu_chips import GIB, Chip
from scripts.tpu_measure import Measured, TooLargeError, compiled, largest, report

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config to compile.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x4", "TPU and its chips: v5e:2x4, v5e:16x16, v5p:2x2x2, v6e:2x4, v4:2x2x2, ..."
)
_PART = flags.DEFINE_enum(
  "part", "train", tpu_programs.PARTS, "A training step, an evaluation, or FPT alone."
)
_IMAGES = flags.DEFINE_integer(
  "images_per_chip",
  1,
  "Images on each chip, or on the chips that share an image by config.mesh.shape.",
  lower_bound=1,
)
_QUICK = flags.DEFINE_bool(
  "quick",
  False,
  "Compile with less effort: a fraction of the time, and a program that needs more memory.",
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Find the largest number of images per chip that fits, from images_per_chip on."
)


def main() -> None:
  config = _CONFIG.value
  if config is None:
    raise UserError("--config=FILE is missing, such as configs/coco_mask.py")
  check_config(config)
  if _SEARCH.value and _PART.value == "fpt":
    raise UserError("--search needs --part=train or --part=eval, which are one program")
  chip, devices = tpu_chips.chip_of(_TOPOLOGY.value), tpu_chips.devices_of(_TOPOLOGY.value)
  if _QUICK.value:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)

  print(
    f"{_TOPOLOGY.value}, {len(devices)} chips, {config.model.pyramid.channels} channels, "
    f"{config.model.dtype}",
    flush=True,
  )

  def works(images: int) -> list[tpu_programs.Work]:
    return tpu_programs.works(_PART.value, config, devices, images)

  if _SEARCH.value:
    search(works, chip, len(devices))
    return
  for work in works(_IMAGES.value):
    try:
      measured = compiled(work)
    except TooLargeError as error:
      stop(f"{work.name} with {_IMAGES.value} image(s) per chip does not fit: {error}")
    groups = len(devices) // work.shares
    print(report(work, measured, chip, _IMAGES.value, groups), flush=True)
    if measured.peak > chip.memory:
      stop(f"{work.name} with {_IMAGES.value} image(s) per chip does not fit")


def search(works: Callable[[int], list[tpu_programs.Work]], chip: Chip, chips: int) -> None:
  """Compiles a part with several numbers of images per chip and reports the largest that fits."""
  fitting: dict[int, Measured] = {}

  def peak(images: int) -> int | None:
    (work,) = works(images)
    try:
      measured = compiled(work)
    except TooLargeError as error:
      print(f"{images} image(s) per chip: {error}", flush=True)
      return None
    print(
      f"{images} image(s) per chip: {measured.peak / GIB:.2f} GiB, {measured.seconds:.0f} s",
      flush=True,
    )
    fitting[images] = measured
    return measured.peak

  most = largest(peak, chip.memory, _IMAGES.value)
  if not most:
    stop(f"{_IMAGES.value} image(s) per chip do not fit")
  (work,) = works(most)
  print(f"the most that fits:\n{report(work, fitting[most], chip, most, chips // work.shares)}")


def stop(reason: str) -> NoReturn:
  """Prints why the program does not fit and exits with status 1."""
  print(f"error: {reason}", file=sys.stderr)
  sys.exit(1)


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
