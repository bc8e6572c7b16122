#!/usr/bin/env python3
"""Compiles a config's FPT for a TPU topology, on any machine, and prints the memory a chip needs.

    python scripts/tpu_compile.py --config=configs/coco_mask.py --config.model.dtype=bfloat16

Needs libtpu (requirements-test.txt); no TPU. One image a chip unless --images_per_chip says otherwise.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
# What libtpu asks of its surroundings where there is no TPU.
os.environ |= {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from fpt_jax import command_line
from fpt_jax.analyze import canvas_of
from fpt_jax.errors import UserError
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import build_fpt
from fpt_jax.models.state import skeleton

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config whose FPT is compiled.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "TPU and its chips: v5e:2x2, v5p:2x2x1, ...")
_IMAGES = flags.DEFINE_integer("images_per_chip", 1, "Images on each chip.")


def main() -> None:
  config = _CONFIG.value
  if config is None:
    raise UserError("--config=FILE is needed, such as configs/coco_mask.py")
  devices = topology_devices(_TOPOLOGY.value)
  mesh = Mesh(np.array(devices), ("data",))
  model = FrozenConfigDict(as_on_a_tpu(config.model))
  strides = strides_of(config)
  structure = skeleton(lambda: build_fpt(model, levels=len(strides), rngs=nnx.Rngs(0)))
  height, width = canvas_of(config)
  print(
    f"{_TOPOLOGY.value}, {len(devices)} chips, {_IMAGES.value} image(s) of {height} x {width} each, "
    f"{config.model.pyramid.channels} channels, {config.model.dtype}"
  )
  print(
    f"{'program':<10}{'arguments':>12}{'temporaries':>13}{'peak':>10}   MB a chip, seconds to compile"
  )
  for name, program in programs(structure).items():
    report(name, program, abstract_arguments(config, structure, mesh, strides, height, width))


def strides_of(config: ConfigDict) -> tuple[int, ...]:
  """Of the four levels: those of P2 to P5, or the output stride of a dilated backbone."""
  stride = config.model.backbone.get("output_stride")
  return (stride,) * 4 if stride else (4, 8, 16, 32)


def as_on_a_tpu(model: ConfigDict) -> ConfigDict:
  """`model` with what "auto" means there: here it would ask this machine's own backend."""
  if model.fpt.implementation == "auto" and model.fpt.window is None:
    model.fpt.implementation = "pallas"
  return model


def topology_devices(name: str) -> list:
  """The chips of a topology.

  Raises:
    UserError: libtpu is missing or knows no such topology.
  """
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except (RuntimeError, ValueError, KeyError) as error:
    raise UserError(f"--topology={name}: {error}; pip install -r requirements-test.txt?") from error


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
  replicated = NamedSharding(mesh, PartitionSpec())
  over_batch = NamedSharding(mesh, PartitionSpec("data"))
  images = _IMAGES.value * mesh.size

  def level(stride):
    size = (images, -(-height // stride), -(-width // stride))
    shape = (*size, config.model.pyramid.channels)
    return FeatureMap(
      jax.ShapeDtypeStruct(shape, config.model.dtype, sharding=over_batch),
      jax.ShapeDtypeStruct(size, bool, sharding=over_batch),
      stride,
    )

  arrays = {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated)
    for name, s in structure.shapes.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
  return arrays, tuple(level(stride) for stride in strides), key


def report(name: str, program, arguments) -> None:
  begun = time.monotonic()
  try:
    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    print(f"{name:<10} does not compile: {str(error).splitlines()[0][:160]}")
    return
  seconds = time.monotonic() - begun
  arguments_mb, temporaries_mb, outputs_mb = (
    size / 1e6
    for size in (
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes,
      memory.output_size_in_bytes,
    )
  )
  peak = arguments_mb + temporaries_mb + outputs_mb
  print(f"{name:<10}{arguments_mb:>12.0f}{temporaries_mb:>13.0f}{peak:>10.0f}{seconds:>15.0f} s")


if __name__ == "__main__":
  command_line.run(main)
