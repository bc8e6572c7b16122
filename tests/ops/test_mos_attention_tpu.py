"""The TPU kernels: their numbers in interpret mode, and real compilations for real topologies.

The compilations need no TPU: libtpu compiles on any machine, in a process of its own.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.mos_attention import mos_attention
from tests.ops.test_mos_attention import (
  assert_close,
  draw,
  oracle,
  random_mask,
  value_and_gradients,
)


@pytest.mark.parametrize(
  ("similarity", "sizes", "masked"),
  [("dot", (1, 1, 1, 2, 1, 1), False), ("euclidean", (1, 130, 600, 3, 8, 20), True)],
)
def test_equals_the_equations(similarity, sizes, masked):
  inputs = draw(*sizes)
  valid = random_mask(sizes[0], sizes[2]) if masked else None
  options = {"similarity": similarity, "scale": 0.25, "key_valid_BK": valid}
  got = value_and_gradients(*inputs, implementation="pallas", **options)
  want = oracle(*inputs, similarity, 0.25, valid)
  if sizes[2] == 1:
    # With one key, the gradients of q and k are zero, and a relative error is meaningless.
    assert all(np.abs(x).max() < 1e-6 for x in got[1:3])
    got, want = (list(x[:1]) + [np.zeros(1)] * 2 + list(x[3:]) for x in (got, want))
  assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("sizes", [(2, 700, 1100, 4, 16, 64), (1, 33, 530, 8, 16, 32)])
def test_several_blocks_equal_the_equations(similarity, sizes):
  inputs = draw(*sizes)
  valid = random_mask(sizes[0], sizes[2])
  options = {"similarity": similarity, "scale": 0.25, "key_valid_BK": valid}
  got = value_and_gradients(*inputs, implementation="pallas", **options)
  assert_close(got, oracle(*inputs, similarity, 0.25, valid))


def test_no_valid_key_and_extreme_logits():
  q, k, v, pi, dout = draw(2, 9, 12, 2, 4, 8)
  q, k = 1e3 * q, 1e3 * k
  valid = np.array([[False] * 12, [True] * 5 + [False] * 7])
  k[~valid], v[~valid] = np.nan, np.inf
  options = {"similarity": "euclidean", "key_valid_BK": valid, "implementation": "pallas"}
  got = value_and_gradients(q, k, v, pi, dout, **options)
  for x in got:
    assert np.all(np.asarray(x[0]) == 0)
    assert np.all(np.isfinite(np.asarray(x[1])))


def test_bfloat16():
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(1, 140, 600, 2, 16, 32)]
  options = {"similarity": "dot", "scale": 0.25}
  got = value_and_gradients(*inputs, implementation="pallas", **options)
  assert [x.dtype for x in got] == [jnp.bfloat16] * 5
  want = oracle(*[np.asarray(x, np.float32) for x in inputs], "dot", 0.25)
  assert_close(got, want, tolerance=2**-6)


def test_vmap_and_remat_equal_plain_calls():
  q, k, v, pi, _ = draw(3, 20, 33, 2, 4, 8)

  def loss(q, k, v, pi):
    out = mos_attention(q[None], k[None], v[None], pi[None], implementation="pallas")
    return jnp.sum(jnp.sin(out))

  gradient = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))
  mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0, 0)))(q, k[0], v, pi)
  plain = jax.grad(lambda q: jnp.sum(jnp.sin(mos_attention(q, k[:1], v[:1], pi[:1]))))
  dq = jax.jit(plain)(q[:1])
  np.testing.assert_allclose(mapped[0][0], dq[0], rtol=1e-4, atol=1e-5)
  assert [x.shape for x in mapped] == [q.shape, (3, *k.shape[1:]), v.shape, pi.shape]


TPU_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
TOKENS = 51200
# Memory limit for the gradients of the two large maps, 51,200 tokens and local 200 x 256, per device.
MOST_MB = {"v5e:2x2": (300, 350), "v5p:2x2x1": (300, 400), "v6e:2x2": (300, 400)}


def compile_for_tpu(topology: str) -> None:
  """Compiles gradients for each device of a topology; prints one JSON object per program."""
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from fpt_jax.ops.local_attention import local_mos_attention

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))

  def report(name, attention, *arrays):
    def gradient(q, k, v, pi):
      out, transpose = jax.vjp(attention, q, k, v, pi)
      return transpose(out)

    shapes = [
      jax.ShapeDtypeStruct((len(devices), *shape), dtype, sharding=sharding)
      for shape, dtype in arrays
    ]
    compiled = jax.jit(gradient).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    print(
      json.dumps(
        {
          "name": name,
          "MB": memory.peak_memory_in_bytes / 1e6,
          "kernels": text.count("tpu_custom_call"),
          "collectives": [x for x in ("all-gather", "all-reduce", "all-to-all") if x in text],
        }
      )
    )

  def kernels(similarity, Q, K, M, dtype):
    attention = lambda *x: mos_attention(
      *x, similarity=similarity, scale=M**0.5 / 16, implementation="pallas"
    )
    parts = (M, 256 // M)
    report(
      f"{similarity} {Q} {K} {M} {dtype}",
      attention,
      ((Q, *parts), dtype),
      ((K, *parts), dtype),
      ((K, 256), dtype),
      ((M,), "float32"),
    )

  kernels("dot", TOKENS, TOKENS, 2, "bfloat16")
  kernels("euclidean", TOKENS, 3200, 4, "bfloat16")
  kernels("euclidean", 700, 900, 2, "float32")
  report(
    "local",
    lambda *x: local_mos_attention(*x, similarity="euclidean", scale=0.125),
    ((200, 256, 4, 64), "bfloat16"),
    ((200, 256, 4, 64), "bfloat16"),
    ((200, 256, 256), "bfloat16"),
    ((4,), "float32"),
  )


@pytest.mark.slow
@pytest.mark.parametrize("topology", MOST_MB)
def test_gradients_compile_for_tpu(topology):
  """Every kernel compiles, there is no communication, and the large maps fit into memory."""
  done = subprocess.run(
    [sys.executable, "-c", f"import {__name__} as test; test.compile_for_tpu({topology!r})"],
    cwd=pathlib.Path(__file__).parents[len(__name__.split(".")) - 1],
    env=os.environ | TPU_ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  programs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
  assert len(programs) == 4
  for program in programs:
    assert program["collectives"] == [], program
    assert program["kernels"] == (0 if program["name"] == "local" else 3), program
  for program, most in zip((programs[0], programs[3]), MOST_MB[topology], strict=True):
    assert program["MB"] <= most, program
