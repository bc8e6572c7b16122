"""Compiles programs for TPUs: the memory that they need, what fits, and the least time that they take."""

import dataclasses
import re
import time
from collections.abc import Callable

import jax

from fpt_jax.errors import UserError
from scripts.hlo_collectives import KINDS, collectives
from scripts.hlo_memory import memory_bytes
from scripts.hlo_text import Program
from scripts.tpu_chips import GIB, Chip, roofline
from scripts.tpu_programs import Work


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


def compiled(work: Work) -> Measured:
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


def report(work: Work, measured: Measured, chip: Chip, images: int, groups: int) -> str:
  """Returns what is known about a compiled program, in lines.

  Args:
    work: the program.
    measured: what the compiler reports about it.
    chip: kind of the chips.
    images: images on each of the groups of chips that share images.
    groups: number of these groups; without `config.mesh.shape`, that of the chips.
  """
  chips = groups * work.shares
  per = "chip" if work.shares == 1 else f"{work.shares} chips"
  program, flops = Program(measured.text), work.flops()
  exchanged, moved = collectives(program), memory_bytes(program)
  sent = sum(c.sent * c.times for c in exchanged)
  least = roofline(chip, flops=flops, memory_bytes=moved, network_bytes=sent)
  height, width = work.canvas
  lines = [
    f"{work.name}: {images} image(s) of {height} x {width} per {per}, compiled in "
    f"{measured.seconds:.0f} s",
    f"  memory       {measured.peak / GIB:.2f} GiB of {chip.memory / GIB:.2f} GiB: "
    f"{measured.arguments / GIB:.2f} arguments, {measured.temporaries / GIB:.2f} temporaries",
  ]
  for kind in KINDS:
    these = [c for c in exchanged if c.kind == kind]
    if these:
      most = max(these, key=lambda c: c.bytes)
      lines.append(
        f"  {kind:<12} {sum(c.times for c in these)} times, "
        f"{sum(c.times * c.bytes for c in these) / 1e6:.2f} MB, the largest {most.bytes / 1e6:.2f} MB "
        f"of {most.dtype}: {most.source[-70:]}"
      )
  if unknown := program.loops_of_unknown_length():
    lines.append(f"  {unknown} loop(s) whose length depends on the data count as one pass")
  return "\n".join(
    [
      *lines,
      f"  least time   {least.seconds * 1e3:.1f} ms, bound by {least.bound}: "
      f"compute {least.compute * 1e3:.1f} ms ({flops / 1e12:.3f} TFLOP), "
      f"memory {least.memory * 1e3:.1f} ms ({moved / 1e9:.2f} GB), "
      f"network {least.network * 1e3:.1f} ms ({sent / 1e6:.2f} MB)",
      f"  at most      {images * groups / least.seconds:.0f} images/s on {chips} chips, "
      f"{least.utilisation:.0%} of the peak",
    ]
  )
