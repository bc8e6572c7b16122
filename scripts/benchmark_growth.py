#!/usr/bin/env python3
"""How time and memory grow with the size of the images: a detector with FPT, and FPT alone beside torch.

    python scripts/benchmark_growth.py                        # minutes; the detector up to 800 pixels
    python scripts/benchmark_growth.py --sizes 256 384 --batches 1 2 --neck_sizes 256 384

First the training step of `configs/coco_mask.py` with all three transformers, on square images, and on
batches of images of 320 pixels. Then FPT alone in its literal form, forward and with the gradient of its
parameters and levels, beside the same written in torch with all pairs of positions (`scripts/torch_fpt.py`),
if torch is installed; the largest difference between their levels is printed. The exponent says how a figure
grows with the number of pixels: from each row to the next, figure ~ pixels ^ exponent. Memory is that of the
compiled program's temporaries for ours, and the growth of a process's peak in the neck's table.
"""

import argparse
import functools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.feature_pyramid_transformer import FeaturePyramidTransformer
from fpt_jax.models.state import arrays_of, skeleton
from fpt_jax.run.command_line import load_config
from scripts import markdown
from scripts.benchmark_configs import compiled_step
from scripts.process_memory import peak_growth
from scripts.timing import device, medians, number_printed_by, run_of, turns

try:
  import torch

  from scripts import torch_fpt
  from scripts.torch_device import torch_device
except ImportError:
  torch = None

ROOT = pathlib.Path(__file__).resolve().parent.parent
STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def main() -> None:
  options = parse_arguments()
  if options.weigh:
    name, size = options.weigh
    print(peak_growth(neck_runs(int(size))[name]))
    return
  print(f"{options.dtype} on {device()}")
  cases = [(size, 1) for size in options.sizes]
  report("Training step, one image", cases, detector_figures(cases, options))
  cases = [(320, batch) for batch in options.batches]
  report("Training step, images of 320 x 320", cases, detector_figures(cases, options))
  if options.neck_sizes:
    report_neck(options)


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  sizes = functools.partial(parser.add_argument, type=int, nargs="*")
  sizes("--sizes", default=[256, 384, 512, 640, 800], help="sides of the detector's images, pixels")
  sizes("--batches", default=[1, 2, 4], help="images of 320 pixels per step")
  sizes("--neck_sizes", default=[256, 384, 512, 640, 800], help="sides of the images of FPT alone")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--repetitions", type=int, default=3)
  parser.add_argument("--weigh", nargs=2, help=argparse.SUPPRESS)
  return parser.parse_args()


def detector_figures(cases, options) -> list[tuple[float, float]]:
  """Seconds and MB of the training step for each (size, batch)."""
  figures = []
  for size, batch in cases:
    config = load_config(str(ROOT / "configs/coco_mask.py"))
    config.data.short_edge = config.data.long_edge = size
    config.data.buckets = ((size, size),)
    config.model.dtype = options.dtype
    step, megabytes = compiled_step(config, batch)
    seconds = medians(turns({"step": step}, options.repetitions))
    figures.append((seconds["step"], megabytes))
  return figures


def report(title: str, cases, figures: Sequence[tuple[float, float]]) -> None:
  if not cases:
    return
  work = [size**2 * batch for size, batch in cases]
  times, sizes = zip(*figures, strict=True)
  rows = [
    [
      *map(str, case),
      f"{times[i]:.2f} s",
      exponent(work, times, i),
      f"{sizes[i]:.0f} MB",
      exponent(work, sizes, i),
    ]
    for i, case in enumerate(cases)
  ]
  header = ["pixels", "images", "time", "exponent", "memory", "exponent"]
  print(f"\n{title}:\n\n{markdown.table(header, rows, texts=0)}", flush=True)


def exponent(work: Sequence[float], figures: Sequence[float], i: int) -> str:
  """The exponent from the row before to row `i`."""
  if not i or not figures[i] > 0 or not figures[i - 1] > 0:
    return "-"
  return f"{math.log(figures[i] / figures[i - 1]) / math.log(work[i] / work[i - 1]):.2f}"


def report_neck(options) -> None:
  """Prints FPT's table: times in turns, memory of each in a process of its own."""
  print("\nFPT alone, one image, literal form, float32:\n")
  if torch is None:
    print("torch is not installed; only fpt_jax is measured\n")
  rows, difference = [], ""
  for size in options.neck_sizes:
    runs = neck_runs(size)
    memory = {name: number_printed_by(__file__, "--weigh", name, str(size)) for name in runs}
    # a program that did not fit alone would end this process
    fitting = {name: run for name, run in runs.items() if not math.isnan(memory[name])}
    seconds = medians(turns(fitting, options.repetitions))
    for kind in ("forward", "gradient"):
      ours, theirs = f"fpt_jax {kind}", f"torch {kind}"
      nan = float("nan")
      times = [seconds.get(name, nan) for name in (ours, theirs)]
      sizes = [memory.get(name, nan) for name in (ours, theirs)]
      cells = [f"{seconds:.2f} s" for seconds in times] + [f"{times[0] / times[1]:.2f}"]
      cells += [f"{megabytes:.0f} MB" for megabytes in sizes] + [f"{sizes[0] / sizes[1]:.2f}"]
      rows.append([f"{size} pixels, {kind}", *cells])
    if size == options.neck_sizes[0] and torch:
      pairs = zip(runs["fpt_jax forward"](), runs["torch forward"](), strict=True)
      most = max(float(np.abs(a - b.transpose(0, 2, 3, 1)).max()) for a, b in pairs)
      difference = f"\n\nLargest difference between the levels at {size} pixels: {most:.1e}"
  header = ["", "fpt_jax", "torch", "ratio", "memory, fpt_jax", "memory, torch", "ratio"]
  print(markdown.table(header, rows) + difference, flush=True)


def neck_runs(size: int) -> dict[str, Callable[[], list[np.ndarray]]]:
  """The programs of FPT alone for an image of `size` pixels, by implementation and kind."""
  build = functools.partial(
    FeaturePyramidTransformer,
    (CHANNELS,) * 4,
    channels=CHANNELS,
    literal=True,
    keep_probability=1.0,
  )
  structure = skeleton(lambda: build(rngs=nnx.Rngs(0)))
  arrays = jax.jit(lambda: arrays_of(build(rngs=nnx.Rngs(0))))()
  rng = np.random.default_rng(0)
  sides = [-(-size // stride) for stride in STRIDES]
  values = [rng.standard_normal((1, side, side, CHANNELS), np.float32) for side in sides]

  def forward(arrays, values):
    maps = tuple(
      FeatureMap(v, jnp.ones(v.shape[:3], bool), s) for v, s in zip(values, STRIDES, strict=True)
    )
    levels = structure.fill(arrays)(maps, key=jax.random.key(0))
    return [level.values_BHWC for level in levels]

  def gradient(arrays, values):
    trained = {n: arrays[n] for n in structure.parameters()}

    def total(trained, values):
      return sum(jnp.sum(x**3) for x in forward({**arrays, **trained}, values))

    return jax.grad(total, argnums=(0, 1))(trained, values)

  on_device = [jnp.asarray(v) for v in values]
  runs = {
    "fpt_jax forward": run_of(jax.jit(forward), arrays, on_device),
    "fpt_jax gradient": run_of(jax.jit(gradient), arrays, on_device),
  }
  return runs | (torch_runs(arrays, structure.parameters(), values) if torch else {})


def torch_runs(arrays, trained: set[str], values: list[np.ndarray]):
  torch_device(torch)
  tensors = {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}
  levels = [torch.tensor(v).permute(0, 3, 1, 2).contiguous() for v in values]
  leaves = [*(tensors[name] for name in sorted(trained)), *levels]

  def forward():
    with torch.no_grad():
      return [x.numpy() for x in torch_fpt.transformed(tensors, levels)]

  def gradient():
    for leaf in leaves:
      leaf.requires_grad_()
    total = sum((x**3).sum() for x in torch_fpt.transformed(tensors, levels))
    gradients = torch.autograd.grad(total, leaves)
    for leaf in leaves:
      leaf.requires_grad_(False)
    return gradients

  return {"torch forward": forward, "torch gradient": gradient}


if __name__ == "__main__":
  main()
