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

import dataclasses
import re
import time
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import config_flags

from fpt_jax import configs
from fpt_jax.errors import UserError
from fpt_jax.run import command_line
from fpt_jax.tasks.task import check_config
from scripts import hlo_text, tpu_chips, tpu_programs
from scripts.tpu_chips import GIB, Chip

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config to compile.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x4", "TPU and its chips: v5e:2x4, v5e:16x16, v5p:2x2x2, v6e:2x4, v4:2x2x2, ..."
)
_PART = flags.DEFINE_enum(
  "part", "train", tpu_programs.PARTS, "A training step, an evaluation, or FPT alone."
)
_IMAGES = flags.DEFINE_integer("images_per_chip", 1, "Images on each chip.", lower_bound=1)
_QUICK = flags.DEFINE_bool(
  "quick",
  False,
  "Compile with less effort: a fraction of the time, and a program that needs more memory.",
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Find the largest number of images per chip that fits, from images_per_chip on."
)


@dataclasses.dataclass(frozen=True)
class Measured:
  """What the compiler reports about a program.

  Attributes:
    arguments, temporaries, peak: bytes on a chip.
    text: the compiled program as HLO text.
    seconds: duration of the compilation.
  """

  arguments: int
  temporaries: int
  peak: int
  text: str
  seconds: float


class TooLargeError(Exception):
  """A program needs more memory than a chip has; the message has the compiler's reason."""


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

  def programs(images: int) -> list[tpu_programs.Work]:
    return tpu_programs.works(_PART.value, config, devices, images)

  print(
    f"{_TOPOLOGY.value}, {len(devices)} chips, {config.model.pyramid.channels} channels, "
    f"{config.model.dtype}",
    flush=True,
  )
  if not _SEARCH.value:
    for work in programs(_IMAGES.value):
      try:
        measured = compiled(work)
      except TooLargeError as error:
        stop(f"{work.name} with {_IMAGES.value} image(s) per chip does not fit: {error}")
      print(report(work, measured, chip, _IMAGES.value, len(devices)), flush=True)
      if measured.peak > chip.memory:
        stop(f"{work.name} with {_IMAGES.value} image(s) per chip does not fit")
    return

  found: dict[int, str] = {}

  def peak(images: int) -> int | None:
    (work,) = programs(images)
    try:
      measured = compiled(work)
    except TooLargeError as error:
      print(f"{images} image(s) per chip: {error}", flush=True)
      return None
    found[images] = report(work, measured, chip, images, len(devices))
    print(f"{images} image(s) per chip: {measured.peak / GIB:.2f} GiB", flush=True)
    return measured.peak

  most = largest(peak, chip.memory, _IMAGES.value)
  if not most:
    stop(f"{_IMAGES.value} image(s) per chip do not fit")
  print(f"{most} image(s) per chip are the most that fit\n{found[most]}")


def stop(reason: str) -> None:
  """Prints why the program does not fit and exits with status 1."""
  print(f"error: {reason}", file=sys.stderr)
  sys.exit(1)


def compiled(work: tpu_programs.Work) -> Measured:
  """Compiles a program.

  Raises:
    TooLargeError: it needs more memory than a chip has.
    UserError: it does not compile for another reason.
  """
  begun = time.monotonic()
  try:
    program = work.lowered().compile()
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())[:300]
    if "RESOURCE_EXHAUSTED" in reason:
      raise TooLargeError(needed(reason)) from error
    raise UserError(f"{work.name} does not compile: {reason}") from error
  memory = program.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  # outputs in the place of arguments, such as the new state, need no memory of their own
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = max(memory.peak_memory_in_bytes, arguments + temporaries + outputs)
  return Measured(arguments, temporaries, peak, program.as_text(), time.monotonic() - begun)


def needed(message: str) -> str:
  """Returns the sizes in the compiler's message that a program is too large, or the message."""
  found = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])", message) or re.search(
    r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message
  )
  return f"it needs {found[1]}iB of {found[2]}iB" if found else message


def largest(peak: Callable[[int], int | None], memory: int, start: int) -> int:
  """Returns the largest number of images per chip that fits, with few compilations.

  Numbers are doubled until one does not fit. Between that and the largest that fits, memory is taken to grow
  linearly, and every candidate is compiled.

  Args:
    peak: function from images per chip to the bytes that they need; None if they do not compile.
    memory: bytes of a chip.
    start: number of images to begin with.

  Returns:
    The number of images, or 0 if not even `start` fits.
  """
  fits: list[tuple[int, int]] = []
  too_many = None
  images = start
  while True:
    size = peak(images)
    if size is not None and size <= memory:
      fits.append((images, size))
      fits.sort()
    else:
      too_many = images
    if not fits:
      return 0
    best = fits[-1][0]
    if too_many == best + 1:
      return best
    images = 2 * best
    if len(fits) > 1:
      (few, small), (many, large) = fits[-2:]
      growth = (large - small) / (many - few)
      extrapolated = many + int((memory - large) / growth) if growth > 0 else images
      images = min(images, extrapolated)
    elif too_many is not None:
      images = (best + too_many) // 2
    images = max(images, best + 1)
    if too_many is not None:
      images = min(images, too_many - 1)


def report(work: tpu_programs.Work, measured: Measured, chip: Chip, images: int, chips: int) -> str:
  """Returns what is known about a compiled program, in lines."""
  program = hlo_text.Program(measured.text)
  collectives = program.collectives()
  memory_bytes, flops = program.memory_bytes(), work.flops()
  sent = sum(c.sent * c.times for c in collectives)
  least = tpu_chips.roofline(chip, flops=flops, memory_bytes=memory_bytes, network_bytes=sent)
  height, width = work.canvas
  lines = [
    f"{work.name}: {images} image(s) of {height} x {width} per chip, compiled in "
    f"{measured.seconds:.0f} s",
    f"  memory       {measured.peak / GIB:.2f} GiB of {chip.memory / GIB:.2f} GiB: "
    f"{measured.arguments / GIB:.2f} arguments, {measured.temporaries / GIB:.2f} temporaries",
  ]
  for kind in hlo_text.KINDS:
    these = [c for c in collectives if c.kind == kind]
    if these:
      most = max(these, key=lambda c: c.bytes)
      lines.append(
        f"  {kind:<12} {sum(c.times for c in these)} times, "
        f"{sum(c.times * c.bytes for c in these) / 1e6:.2f} MB, the largest {most.bytes / 1e6:.2f} MB: "
        f"{most.source[-70:]}"
      )
  if unknown := program.loops_of_unknown_length():
    lines.append(f"  {unknown} loop(s) whose length depends on the data count as one pass")
  return "\n".join(
    [
      *lines,
      f"  least time   {least.seconds * 1e3:.1f} ms, bound by {least.bound}: "
      f"compute {least.compute * 1e3:.1f} ms ({flops / 1e12:.3f} TFLOP), "
      f"memory {least.memory * 1e3:.1f} ms ({memory_bytes / 1e9:.2f} GB), "
      f"network {least.network * 1e3:.1f} ms ({sent / 1e6:.2f} MB)",
      f"  at most      {images * chips / least.seconds:.0f} images/s on {chips} chips, "
      f"{least.utilisation:.0%} of the peak",
    ]
  )


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
