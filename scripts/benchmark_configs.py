#!/usr/bin/env python3
"""Times one training step of two configs, interleaved, and prints their ratio.

    python scripts/benchmark_configs.py configs/coco_mask.py:demo configs/coco_mask.py:demo,literal

Each step is the one that `fpt_jax.train` runs, optimizer included, on noise with a few
objects per image. Times are medians. Memory is what the compiled step needs beside its arguments.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax import models, optim
from fpt_jax.models.state import initial_arrays
from fpt_jax.run.command_line import load_config
from fpt_jax.tasks.task import task_of
from fpt_jax.train_step import make_train_step, training_state
from scripts import markdown
from scripts.timing import device, medians, run_of, turns

OBJECTS = 6  # per image, of those that a batch has room for


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("ours", help="config file, with words after a colon")
  parser.add_argument("other", help="the config to compare with")
  parser.add_argument("--batch", type=int, default=8, help="images per step")
  parser.add_argument("--repetitions", type=int, default=9)
  arguments = parser.parse_args()
  files = (arguments.ours, arguments.other)
  steps, megabytes = zip(
    *(compiled_step(load_config(file), arguments.batch) for file in files), strict=True
  )
  # places, because both configs may be the same
  seconds = turns(dict(enumerate(steps)), arguments.repetitions)
  rows = [
    [f"`{file}`", f"{median:.3f} s", f"{memory:.0f} MB"]
    for file, median, memory in zip(files, medians(seconds).values(), megabytes, strict=True)
  ]
  print(f"{arguments.batch} images per step on {device()}\n")
  print(markdown.table(["config", "step", "memory"], rows))
  ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
  print(f"\nRatio {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


def compiled_step(config: ConfigDict, images: int) -> tuple[Callable[[], None], float]:
  """The training step of a config as a function without arguments, and its temporaries in MB."""
  structure = models.structure_of(config)
  optimizer = optim.optimizer(config)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
  trained = {n: arrays[n] for n in optim.trainable(config, structure.parameters())}
  state = training_state(arrays, trained, jax.jit(optimizer.init)(trained))
  task = task_of(config)
  shapes = task.batch_shapes(config, images, task.canvas(config))
  batch = {name: filled(name, shape) for name, shape in shapes.items()}
  step = make_train_step(structure, optimizer, optim.total_steps(config))
  others = jnp.int32(0), jax.random.key(0), jnp.bool_(False)
  compiled = jax.jit(step).lower(state, batch, *others).compile()

  return run_of(
    compiled, state, batch, *others
  ), compiled.memory_analysis().temp_size_in_bytes / 1e6


def filled(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
  """An array of a batch: noise for images, and squares in a row for objects."""
  if name == "image_BHWC":
    return jax.random.randint(jax.random.key(0), shape.shape, 0, 256).astype(shape.dtype)
  if name == "size_B2":
    return jnp.full(shape.shape, 10_000, shape.dtype)  # the whole canvas
  if name == "gt_boxes_BG4":
    corners_G = jnp.arange(shape.shape[1], dtype=shape.dtype) * 16
    boxes_G4 = jnp.stack([corners_G, corners_G, corners_G + 24, corners_G + 24], axis=-1)
    return jnp.broadcast_to(boxes_G4[None], shape.shape)
  if name == "gt_valid_BG":
    return jnp.broadcast_to((jnp.arange(shape.shape[1]) < OBJECTS)[None], shape.shape)
  return jnp.ones(shape.shape, shape.dtype)


if __name__ == "__main__":
  main()
