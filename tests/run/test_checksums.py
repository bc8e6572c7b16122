"""Checksums against the formula, one element at a time, and of parts of arrays."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fpt_jax.run import checksums
from tests.runs import ROOT, host_devices


def by_formula(x):
  bits = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")
  return sum(int(b) * (i * checksums.STEP + 1) for i, b in enumerate(bits)) % 2**64


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.bool_])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 6), (3, 4, 5)])
def test_a_checksum_is_the_formula(shape, dtype, rng, monkeypatch):
  monkeypatch.setattr(checksums, "BLOCK", 8)
  x = (10 * rng.standard_normal(shape)).astype(dtype)
  assert checksums.checksums({"x": jnp.asarray(x)}) == {"x": by_formula(np.asarray(x))}


def test_checksums_of_parts_add_up(rng):
  x = rng.standard_normal((4, 6, 5)).astype(np.float32)
  cuts = ([(0, 1), (1, 4)], [(0, 3), (3, 6)], [(0, 2), (2, 5)])
  total = 0
  for part in itertools.product(*cuts):
    index = tuple(slice(*edges) for edges in part)
    total += checksums.part_sum(x[index], index, x.shape)
  assert total % 2**64 == by_formula(x)
  rows = [(slice(0, 3), slice(None), slice(None)), (slice(3, 4), slice(None), slice(None))]
  assert sum(checksums.part_sum(x[r], r, x.shape) for r in rows) % 2**64 == by_formula(x)


def test_every_single_bit_counts(rng):
  x = rng.standard_normal(50).astype(np.float32)
  seen = {checksums.run_sum(x, 0)}
  for bit in range(x.size * 32):
    bits = x.view(np.uint32).copy()
    bits[bit // 32] ^= np.uint32(1 << bit % 32)
    seen.add(checksums.run_sum(bits.view(np.float32), 0))
  assert len(seen) == 1 + x.size * 32
  assert checksums.run_sum(x[::-1].copy(), 0) not in seen


LAYOUTS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from fpt_jax.run import checkpoints
from fpt_jax.run.checksums import checksums
mesh = jax.make_mesh((2, 2), ("a", "b"))
x = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
layouts = [NamedSharding(mesh, spec) for spec in (P(), P("a"), P("b", "a"), P(None, None, ("a", "b")))]
sums = [checksums({"x": jax.device_put(x, layout)})["x"] for layout in layouts]
assert len(set(sums)) == 1, sums
saved = checkpoints.manager(sys.argv[1])
checkpoints.save(saved, 1, {"x": jax.device_put(x, layouts[1])})
checkpoints.finish(saved)
for layout in layouts:
  shapes = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)}
  found = checkpoints.restore_model(saved, 1, shapes)["x"]
  assert found.sharding == layout and (np.asarray(found) == x).all()
print("equal")
"""


def test_the_layout_does_not_matter(tmp_path):
  environment = os.environ | {"JAX_PLATFORMS": "cpu"} | host_devices(4)
  found = subprocess.run(
    [sys.executable, "-c", LAYOUTS, tmp_path], env=environment, cwd=ROOT, capture_output=True,
    text=True, check=False,
  )  # fmt: skip
  assert found.stdout == "equal\n", found.stderr[-2000:]
  assert jax.device_count() == 1
