#!/usr/bin/env python3
"""Convolutions on this machine: ours against XLA's, in one run.

    python scripts/benchmark_convolution.py

The rows are layers of ResNet-50 and its pyramid for 8 images of 320 x 320 pixels, and depthwise layers of
EfficientNet-Lite0 for 8 images of 288 x 384 pixels. Times are medians of interleaved repetitions.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import argparse

import jax
import jax.numpy as jnp

from fpt_jax.ops.convolution import convolve, pointwise
from fpt_jax.ops.depthwise import depthwise
from scripts import markdown
from scripts.timing import device, medians, run_of, turns

LAYERS = [  # our convolution, rows, columns, channels, kernel, stride
  (convolve, 80, 80, 64, 3, 1),
  (convolve, 40, 40, 128, 3, 1),
  (convolve, 40, 40, 256, 3, 1),
  (convolve, 10, 10, 512, 3, 1),
  (pointwise, 80, 80, 256, 1, 1),
  (pointwise, 40, 40, 512, 1, 1),
  (depthwise, 144, 192, 32, 3, 1),
  (depthwise, 144, 192, 96, 3, 2),
  (depthwise, 72, 96, 144, 3, 1),
  (depthwise, 36, 48, 240, 5, 1),
  (depthwise, 18, 24, 672, 5, 1),
  (depthwise, 9, 12, 1152, 5, 1),
]


def programs(convolution, stride: int, groups: int):
  """Forward, and forward with the gradients of input and kernel."""

  def run(x_BHWC, kernel_hwCD):
    pad = kernel_hwCD.shape[0] // 2
    return convolution(
      x_BHWC,
      kernel_hwCD,
      (stride, stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
      precision=None,
    )

  square = lambda *arguments: jnp.sum(run(*arguments) ** 2)
  return jax.jit(run), jax.jit(jax.grad(square, argnums=(0, 1)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=8)
  parser.add_argument("--repetitions", type=int, default=5)
  options = parser.parse_args()
  cells = []
  for convolution, rows, columns, channels, kernel, stride in LAYERS:
    groups = channels if convolution is depthwise else 1
    keys = jax.random.split(jax.random.key(0))
    arguments = (
      jax.random.normal(keys[0], (options.images, rows, columns, channels)),
      jax.random.normal(keys[1], (kernel, kernel, channels // groups, channels)),
    )
    pairs = zip(
      ("forward", "gradient"),
      programs(convolution, stride, groups),
      programs(jax.lax.conv_general_dilated, stride, groups),
      strict=True,
    )
    kind = "depthwise " if convolution is depthwise else ""
    for name, ours, theirs in pairs:
      runs = {program: run_of(program, *arguments) for program in (ours, theirs)}
      mine, other = medians(turns(runs, options.repetitions)).values()
      layer = f"{rows} x {columns} x {channels}, {kind}{kernel} x {kernel}, stride {stride}"
      times = [f"{1e3 * seconds:.1f} ms" for seconds in (mine, other)]
      cells.append([layer, name, *times, f"{mine / other:.2f}"])
  print(f"{options.images} images on {device()}\n")
  print(markdown.table(["layer", "program", "ours", "XLA", "ours / XLA"], cells, texts=2))


if __name__ == "__main__":
  main()
