"""The mesh, its rules, and that every layout computes the same."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.errors import UserError
from fpt_jax.run import sharding
from tests.runs import ROOT, host_devices

ON_EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from fpt_jax.errors import UserError
from fpt_jax.run import sharding

def refused(shape, text, **options):
  try:
    sharding.mesh(shape, **options)
  except UserError as error:
    assert text in str(error), str(error)
  else:
    raise AssertionError(f"{shape} is not refused")

refused((3, 1, 1), "does not fit 8 devices")
refused((-1, 3, 1), "does not fit 8 devices")
refused((2, 2, 2), "a batch size of 6 cannot be shared by 4 groups of 2 devices", batch_sizes=(8, 6))
refused((-1, 1, 1), "a batch size of 4 cannot be shared by 8 devices", batch_sizes=(4,))
assert dict(sharding.mesh((-1, 1, 2)).shape) == {"data": 4, "fsdp": 1, "query": 2}

mesh = sharding.mesh((2, 2, 2), batch_sizes=(8,))
shapes = {
  "kernel": jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32),
  "odd": jax.ShapeDtypeStruct((81, 81), jnp.float32),
  "small": jax.ShapeDtypeStruct((64,), jnp.float32),
}
placed = sharding.laid_out(shapes, mesh)
specs = {name: s.sharding.spec for name, s in placed.items()}
assert specs == {"kernel": P(None, None, None, "fsdp"), "odd": P(), "small": P()}, specs
line = sharding.describe(mesh, placed, 8)
assert line == (
  "mesh data 2 x fsdp 2 x query 2: 2 images per device, each over 2 devices; weights and optimizer "
  "0.2 MB per device of 0.3 MB"
), line

values = np.random.default_rng(0).standard_normal((3, 3, 64, 128)).astype(np.float32)
array = sharding.place({"kernel": values}, mesh)["kernel"]
assert array.sharding.spec == specs["kernel"] and (np.asarray(array) == values).all()

def split(rows, stride):
  x = sharding.to_devices({"x": np.ones((8, rows, 3))}, mesh)["x"]
  return jax.jit(lambda x: sharding.rows_over_query(x, stride=stride))(x)
assert split(16, 8).sharding.spec == P(("data", "fsdp"), "query")
try:
  split(24, 8)
except UserError as error:
  assert "heights must be multiples of 16" in str(error)
else:
  raise AssertionError("three rows of the coarsest level cannot be shared by two devices")

# queries that two devices cannot share evenly; each device computes its own
batch = sharding.to_devices({"q": np.arange(8 * 5.0).reshape(8, 5, 1), "k": np.ones((8, 3))}, mesh)
def function(split, whole):
  return split * whole.sum(axis=1)[:, None, None]
program = jax.jit(lambda q, k: sharding.in_shares(function, q, k))
assert (np.asarray(program(batch["q"], batch["k"])) == 3 * np.arange(8 * 5.0).reshape(8, 5, 1)).all()
gradient = jax.jit(jax.grad(lambda k, q: jnp.sum(sharding.in_shares(function, q, k))))(batch["k"], batch["q"])
assert (np.asarray(gradient) == np.arange(40.0).reshape(8, 5).sum(axis=1)[:, None]).all()
print("as expected")
"""


def on_eight_devices(*arguments) -> subprocess.CompletedProcess:
  environment = os.environ | {"JAX_PLATFORMS": "cpu"} | host_devices(8)
  command = [sys.executable, *map(str, arguments)]
  found = subprocess.run(
    command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert found.returncode == 0, found.stderr[-3000:]
  return found


def test_rules_on_eight_devices():
  assert "as expected" in on_eight_devices("-c", ON_EIGHT).stdout


def test_a_mesh_of_one_device_shards_nothing():
  mesh = sharding.mesh()
  assert math.prod(mesh.shape.values()) == jax.device_count()
  shape = sharding.laid_out(jax.ShapeDtypeStruct((128, 128), jnp.float32), mesh)
  assert shape.sharding == sharding.replicated(mesh)
  x = jnp.ones((2, 6, 3))
  assert sharding.rows_over_query(x, stride=4) is x and sharding.whole_images(x) is x
  np.testing.assert_array_equal(sharding.in_shares(lambda q, k: q + k, x, 1), np.full((2, 6, 3), 2))


def test_a_shape_that_does_not_fit_is_reported():
  count = jax.device_count() + 1
  with pytest.raises(
    UserError, match=rf"mesh\.shape=\({count}, 1, 1\) \(data, fsdp, query\) does not"
  ):
    sharding.mesh((count, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "tolerance"), [("segmentation", 1e-5), ("detection", 1e-5)])
def test_layouts_compute_the_same(task, tolerance, tmp_path):
  """One device and eight, which share images, rows and weights: losses, gradients and compilations."""
  out = tmp_path / "report.json"
  on_eight_devices("-m", "tests.layouts", task, tmp_path / "data", out)
  report = json.loads(out.read_text())
  for one, eight in zip(report["one"], report["eight"], strict=True):
    for name, value in one.items():
      assert eight[name] == pytest.approx(value, rel=tolerance), name
  largest = max(report["size"].values())
  for name, drift in report["drift"].items():
    assert drift <= 1e-4 * max(report["size"][name], 1e-2 * largest), name
  assert report["compilations"] == [1, 1]
