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
assert split(32, 8).sharding.spec == P(("data", "fsdp"), "query")
for rows in (16, 24, 40):  # two, three and five rows of the coarsest level
  try:
    split(rows, 8)
  except UserError as error:
    assert "heights must be multiples of 16, and at least 32" in str(error)
  else:
    raise AssertionError(f"{rows} rows are not refused")

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


FPT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.state import arrays_of, skeleton
from fpt_jax.run import sharding

rng = np.random.default_rng(0)
shapes = [(4, 16 // 2**i, 12 // 2**i, 8) for i in range(3)]
maps, weights = ([rng.standard_normal(s).astype(np.float32) for s in shapes] for _ in range(2))
size = jnp.array([[16, 12], [9, 12], [16, 7], [13, 10]], jnp.int32)

def build():
  return FeaturePyramidTransformer((8,) * 3, channels=8, keep_probability=1.0, rngs=nnx.Rngs(0))

structure = skeleton(build)
arrays = {n: np.asarray(a) for n, a in jax.jit(lambda: arrays_of(build()))().items()}

def loss(arrays, maps, weights):
  valid = valid_positions(size, 16, 12)
  levels = tuple(
    FeatureMap(sharding.rows_over_query(x * 1.0, stride=1), valid[:, :: 2**i, :: 2**i], 2**i)
    for i, x in enumerate(maps)
  )
  outputs = structure.fill(arrays)(levels, key=jax.random.key(0))
  return sum(jnp.sum(o.masked() * w) for o, w in zip(outputs, weights))

def gradients(shape):
  mesh = sharding.mesh(shape, devices=jax.devices()[: int(np.prod(shape))])
  batch = sharding.over_batch(mesh)
  inputs = ([jax.device_put(x, batch) for x in xs] for xs in (maps, weights))
  return jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(sharding.place(arrays, mesh), *inputs))

one, eight = gradients((1, 1, 1)), gradients((2, 2, 2))
for wanted, found in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
assert max(np.abs(g).max() for g in one[1]) > 0.1
print("equal")
"""


def test_fpt_on_eight_devices_has_the_gradients_of_one():
  """Rows, queries and images are shared; padded positions are on some devices only."""
  assert "equal" in on_eight_devices("-c", FPT).stdout


@pytest.mark.slow
def test_a_segmenter_trains_alike_on_eight_devices(tmp_path):
  """One device and eight, which share images, rows and weights: losses, gradients and compilations."""
  out = tmp_path / "report.json"
  on_eight_devices("-m", "tests.layouts", "segmentation", tmp_path / "data", out)
  report = json.loads(out.read_text())
  for one, eight in zip(report["one"], report["eight"], strict=True):
    for name, value in one.items():
      assert eight[name] == pytest.approx(value, rel=1e-5), name
  largest = max(report["size"].values())
  for name, drift in report["drift"].items():
    assert drift <= 1e-4 * max(report["size"][name], 1e-2 * largest), name
  assert report["compilations"] == [1, 1]
