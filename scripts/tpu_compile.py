#!/usr/bin/env python3
"""Compiles a config for a TPU topology, on any machine, and prints the memory that each chip needs.

    python scripts/tpu_compile.py --config=configs/coco_mask.py --config.model.dtype=bfloat16
    python scripts/tpu_compile.py --config=configs/cityscapes.py --config.model.dtype=bfloat16 --part=step

The parts are FPT alone, forward and with its gradient, and a whole training step with the optimizer.

It needs libtpu (requirements-test.txt), but no TPU. By default there is one image per chip.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
# libtpu needs these variables on a machine without a TPU
os.environ |= {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from fpt_jax import configs, models, optim
from fpt_jax.errors import UserError
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import build_fpt
from fpt_jax.models.state import skeleton
from fpt_jax.run import command_line, sharding
from fpt_jax.tasks.task import check_config, task_of
from fpt_jax.train import make_train_step, training_state

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config to compile.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU and its chips: v5e:2x2, v5p:2x2x1, ...")
_PART = flags.DEFINE_enum("part", "fpt", ["fpt", "step"], "FPT alone, or a whole training step.")
_IMAGES = flags.DEFINE_integer("images_per_chip", 1, "Images on each chip.")
_QUICK = flags.DEFINE_bool(
  "quick",
  False,
  "Compile with less effort: a fraction of the time, and a program that needs more memory.",
)


def main() -> None:
  config = _CONFIG.value
  if config is None:
    raise UserError("--config=FILE is missing, such as configs/coco_mask.py")
  check_config(config)
  if _QUICK.value:
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
  devices = topology_devices(_TOPOLOGY.value)
  mesh = Mesh(np.array(devices), ("data",))
  height, width = task_of(config).canvas(config)
  print(
    f"{_TOPOLOGY.value}, {len(devices)} chips, {_IMAGES.value} image(s) of {height} x {width} each, "
    f"{config.model.pyramid.channels} channels, {config.model.dtype}"
  )
  print(
    f"{'program':<10}{'arguments':>12}{'temporaries':>13}{'peak':>10}   MB per chip, seconds to compile"
  )
  if _PART.value == "step":
    report("step", *training_step(config, mesh, (height, width)), donate_argnums=0)
    return
  model, strides = FrozenConfigDict(config.model), strides_of(config)
  structure = skeleton(
    lambda: build_fpt(model, (model.pyramid.channels,) * len(strides), rngs=nnx.Rngs(0))
  )
  for name, program in programs(structure).items():
    report(name, program, abstract_arguments(config, structure, mesh, strides, height, width))


def training_step(config: ConfigDict, mesh: Mesh, canvas: tuple[int, int]) -> tuple:
  """The step that `fpt_jax.train` runs, and the shapes of its arguments."""
  structure = models.structure_of(config)
  shapes, trained = structure.shapes, optim.trainable(config, structure.parameters())
  optimizer = optim.optimizer(config)
  optimizer_state = jax.eval_shape(optimizer.init, {n: shapes[n] for n in trained})
  state = training_state(shapes, trained, optimizer_state)
  batch = task_of(config).batch_shapes(config, _IMAGES.value * mesh.size, canvas)
  replicated, shared = sharding.replicated(mesh), sharding.over_batch(mesh)
  arguments = (
    laid_out(state, replicated),
    laid_out(batch, shared),
    laid_out(jax.ShapeDtypeStruct((), jnp.int32), replicated),
    laid_out(jax.eval_shape(lambda: jax.random.key(0)), replicated),
    laid_out(jax.ShapeDtypeStruct((), jnp.bool_), replicated),
  )
  return make_train_step(structure, optimizer, optim.total_steps(config)), arguments


def laid_out(tree, where: NamedSharding):
  """Shapes with a sharding."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree)


def strides_of(config: ConfigDict) -> tuple[int, ...]:
  """Strides of the four levels: those of P2 to P5, or the output stride of a dilated backbone."""
  backbone = config.model.backbone
  return (backbone.output_stride,) * 4 if "output_stride" in backbone else (4, 8, 16, 32)


def topology_devices(name: str) -> list:
  """The chips of a topology.

  Raises:
    UserError: libtpu is not installed or does not know the topology.
  """
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except (RuntimeError, ValueError, KeyError) as error:
    raise UserError(
      f"--topology={name}: {error}; is libtpu installed (requirements-test.txt)?"
    ) from error


def programs(structure) -> dict:
  """The forward pass, and the gradient to parameters and inputs, as a training step needs it."""

  def forward(arrays, maps, key):
    return tuple(m.values_BHWC for m in structure.fill(arrays)(maps, key=key))

  def gradient(arrays, maps, key):
    parameters = {n: arrays[n] for n in structure.parameters()}
    values = [m.values_BHWC for m in maps]

    def total(parameters, values):
      levels = tuple(m.with_values(v) for m, v in zip(maps, values, strict=True))
      outputs = forward({**arrays, **parameters}, levels, key)
      return sum(jnp.sum(jnp.square(o.astype(jnp.float32))) for o in outputs)

    return jax.grad(total, argnums=(0, 1))(parameters, values)

  return {"forward": forward, "gradient": gradient}


def abstract_arguments(config, structure, mesh, strides, height, width):
  over_batch = sharding.over_batch(mesh)
  images = _IMAGES.value * mesh.size

  def level(stride):
    size = (images, -(-height // stride), -(-width // stride))
    shape = (*size, config.model.pyramid.channels)
    return FeatureMap(
      jax.ShapeDtypeStruct(shape, config.model.dtype, sharding=over_batch),
      jax.ShapeDtypeStruct(size, bool, sharding=over_batch),
      stride,
    )

  replicated = sharding.replicated(mesh)
  key = laid_out(jax.eval_shape(lambda: jax.random.key(0)), replicated)
  levels = tuple(level(stride) for stride in strides)
  return laid_out(structure.shapes, replicated), levels, key


def report(name: str, program, arguments, **options) -> None:
  """Prints the memory that the compiled program needs, or why it does not compile."""
  begun = time.monotonic()
  try:
    # code that depends on the backend must choose as on the TPU
    with mock.patch("jax.default_backend", return_value="tpu"):
      lowered = jax.jit(program, **options).lower(*arguments)
    memory = lowered.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    print(f"{name:<10} does not compile: {str(error).splitlines()[0][:160]}")
    return
  seconds = time.monotonic() - begun
  arguments_mb, temporaries_mb, outputs_mb, reused_mb = (
    size / 1e6
    for size in (
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes,
      memory.output_size_in_bytes,
      memory.alias_size_in_bytes,
    )
  )
  peak = arguments_mb + temporaries_mb + outputs_mb - reused_mb
  print(f"{name:<10}{arguments_mb:>12.0f}{temporaries_mb:>13.0f}{peak:>10.0f}{seconds:>15.0f} s")


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
