"""Trains a tiny run on several layouts of eight devices: python -m tests.layouts TASK DATA_DIR OUT.

It has to start in an environment with eight devices, see `runs.host_devices`.
"""

import json
import sys

import jax
import numpy as np
import optax
from flax import nnx

from fpt_jax import data, models, optim
from fpt_jax.models.state import initial_arrays
from fpt_jax.run import sharding
from fpt_jax.tasks.task import task_of
from fpt_jax.train_step import make_train_step, state_shapes, training_state
from tests.runs import tiny_config, tiny_segmentation_config

CONFIGS = {
  "detection": lambda **fields: tiny_config(
    data__buckets=((128, 128),), data__short_edge=128, data__long_edge=128, **fields
  ),
  # FPT by itself is compared in tests/run/test_sharding.py
  "segmentation": lambda **fields: tiny_segmentation_config(
    "fpt=none", model__align_corners=True, **fields
  ),
}
STEPS = {"detection": 1, "segmentation": 10}
LAYOUTS = ((1, 1, 1), (2, 2, 2))  # the second one uses every axis


def trained(config, mesh: jax.sharding.Mesh, steps: int) -> dict:
  """Returns the losses of each step, the gradient of the first one, and the number of compilations."""
  task, structure = task_of(config), models.structure_of(config)
  names = optim.trainable(config, structure.parameters())
  optimizer = optim.optimizer(config)
  placement = sharding.shardings(sharding.laid_out(state_shapes(structure, names, optimizer), mesh))
  whole = sharding.replicated(mesh)
  arrays = initial_arrays(
    lambda: models.build(config, nnx.Rngs(config.seed)),
    {**placement["trained"], **placement["rest"]},
  )
  moments = jax.jit(optimizer.init, out_shardings=placement["optimizer"])(
    {n: arrays[n] for n in names}
  )
  state = training_state(arrays, names, moments)
  step = jax.jit(
    make_train_step(structure, optimizer, steps), out_shardings=(placement, whole, whole)
  )
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=whole)()
  losses, gradient = [], {}
  with task.train_batches(config, 0) as batches:
    for i in range(steps):
      batch = next(batches)
      batch = sharding.to_devices({k: batch[k] for k in task.BATCH_KEYS}, mesh)
      numbers = sharding.replicate({"step": np.int32(i), "measure": np.bool_(False)}, mesh)
      state, found, _ = step(state, batch, numbers["step"], key, numbers["measure"])
      losses.append({name: float(value) for name, value in found.items()})
      if i == 0:
        trace = optax.tree_utils.tree_get(state["optimizer"], "trace")
        gradient = {n: np.asarray(trace[n]) for n in names}
  assert sharding.shardings(state) == placement
  return {"losses": losses, "gradient": gradient, "compilations": step._cache_size()}


def main() -> None:
  task, data_dir, out = sys.argv[1:]
  # a low rate: training amplifies differences of rounding
  config = CONFIGS[task](batch_size=8, data__data_dir=data_dir, optim__learning_rate=1e-3)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task_of(config).adopt_classes(config, data.info(config.data))
  results = []
  for shape in LAYOUTS:
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.mesh(shape, batch_sizes=(config.batch_size,), devices=devices)
    results.append(trained(config, mesh, STEPS[task]))
  one, eight = results
  pairs = {n: (gradient, eight["gradient"][n]) for n, gradient in one["gradient"].items()}
  drift = {n: float(np.abs(a - b).max()) for n, (a, b) in pairs.items()}
  size = {n: float(np.abs(a).max()) for n, (a, _) in pairs.items()}
  report = {
    "one": one["losses"],
    "eight": eight["losses"],
    "drift": drift,
    "size": size,
    "compilations": [r["compilations"] for r in results],
  }
  with open(out, "w") as file:
    json.dump(report, file)


if __name__ == "__main__":
  main()
