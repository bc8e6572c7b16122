"""Attention against float64 NumPy written from the paper's equations, values and all gradients."""

import functools
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.spatial.distance import cdist

from fpt_jax.ops.mos_attention import mos_attention
from tests.runs import host_devices

IMPLEMENTATIONS = ("naive", "chunked")
SIMILARITIES = ("dot", "euclidean")
# Rounding error of float32 products of a few hundred terms, relative to the largest element of an array.
TOLERANCE = 2e-6


def oracle(q, k, v, pi, dout, similarity, scale, valid=None):
  """Output and the gradients of q, k, v and pi, in float64, from eq. 2 to 5."""
  q, k, v, pi, dout = (np.asarray(x, np.float64) for x in (q, k, v, pi, dout))
  q, k = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k))  # [B, M, Q or K, D]
  if similarity == "dot":
    s = scale * (q @ k.swapaxes(2, 3))
  else:
    pairs = [
      [cdist(*part, "sqeuclidean") for part in zip(*b, strict=True)] for b in zip(q, k, strict=True)
    ]
    s = -scale * np.array(pairs)
  seen = np.ones((len(k), k.shape[2]), bool) if valid is None else np.asarray(valid)
  e = np.exp(s - s.max(-1, keepdims=True, initial=-np.inf, where=seen[:, None, None])).clip(max=1)
  e *= seen[:, None, None]
  p = e / np.where(seen.any(-1), e.sum(-1).T, 1).T[..., None]
  w = np.sum(pi[:, :, None, None] * p, axis=1)
  dw = dout @ v.transpose(0, 2, 1)
  delta = np.sum(p * dw[:, None], axis=-1, keepdims=True)
  ds = scale * pi[:, :, None, None] * p * (dw[:, None] - delta)
  dq, dk = ds @ k, ds.swapaxes(2, 3) @ q
  if similarity == "euclidean":
    dq = 2 * (dq - ds.sum(-1)[..., None] * q)
    dk = 2 * (dk - ds.sum(-2)[..., None] * k)
  dq, dk = dq.swapaxes(1, 2), dk.swapaxes(1, 2)
  return w @ v, dq, dk, w.swapaxes(1, 2) @ dout, delta.sum((2, 3))


def draw(B, Q, K, M, D, C, seed=0):
  """q, k, v, pi and the output's gradient.

  Values and gradient have a mean: without, the gradient of pi is the little that is left of long sums,
  and float32 does not hold its digits.
  """
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
  pi = rng.dirichlet(np.ones(M), size=B).astype(np.float32)
  return normal(B, Q, M, D), normal(B, K, M, D), 0.5 + normal(B, K, C), pi, 0.5 + normal(B, Q, C)


def value_and_gradients(q, k, v, pi, dout, key_valid_BK=None, **options):
  return _compiled(tuple(options.items()))(q, k, v, pi, dout, key_valid_BK)


@functools.cache
def _compiled(options):
  @jax.jit
  def run(q, k, v, pi, dout, valid):
    attention = lambda *x: mos_attention(*x, key_valid_BK=valid, **dict(options))
    out, transpose = jax.vjp(attention, q, k, v, pi)
    return out, *transpose(dout)

  return run


def assert_close(got, want, tolerance=TOLERANCE):
  for name, g, w in zip(("out", "dq", "dk", "dv", "dpi"), got, want, strict=True):
    g = np.asarray(g, np.float64)
    assert g.shape == w.shape, name
    assert np.abs(g - w).max() <= tolerance * np.abs(w).max() + 1e-12, name


def random_mask(B, K):
  return np.random.default_rng(1).random((B, K)) < 0.7


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
  ("sizes", "masked"),
  [
    ((2, 7, 5, 1, 3, 4), False),
    ((1, 1, 1, 2, 1, 1), False),
    ((2, 130, 77, 3, 8, 20), True),
    ((1, 33, 530, 8, 4, 32), True),
  ],
)
def test_equals_the_equations(implementation, similarity, sizes, masked):
  inputs = draw(*sizes)
  valid = random_mask(sizes[0], sizes[2]) if masked else None
  scale = sizes[4] ** -0.5
  options = {"similarity": similarity, "scale": scale, "key_valid_BK": valid}
  got = value_and_gradients(*inputs, implementation=implementation, **options)
  assert_close(got, oracle(*inputs, similarity, scale, valid))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("M", [1, 2, 4])
def test_equals_the_equations_at_two_thousand_tokens(implementation, similarity, M):
  sizes = (1, 1999, 2048, M, 256 // M, 256)
  inputs = draw(*sizes)
  scale = sizes[4] ** -0.5
  options = {"similarity": similarity, "scale": scale, "implementation": implementation}
  got = value_and_gradients(*inputs, **options)
  want = oracle(*inputs, similarity, scale)
  for g, w in zip(got, want, strict=True):
    assert np.linalg.norm(g - w) <= TOLERANCE * np.linalg.norm(w)
  # The worst element of half a million is a little worse: up to 3.4e-6, by seed and CPU.
  assert_close(got, want, tolerance=4e-6)


@pytest.mark.parametrize(
  ("images", "tokens", "platform", "block", "piece"),
  [
    (1, 16384, "cpu", 128, 4096),
    (1, 4096, "gpu", 4096, 4096),
    (1, 16384, "gpu", 4096, 16384),
    (8, 16384, "gpu", 512, 16384),
    (1, 51200, "gpu", 1280, 12800),
  ],
)
def test_a_gpu_has_larger_blocks_of_bounded_memory(
  images, tokens, platform, block, piece, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  part_BQMD, value_BQC, pi_BM = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((images, tokens, 2, 4), (images, tokens, 8), (images, 2))
  )
  chunked = functools.partial(mos_attention, implementation="chunked")
  traced = str(jax.make_jaxpr(chunked)(part_BQMD, part_BQMD, value_BQC, pi_BM))
  assert f"f32[{images},{block},{piece}]" in traced
  assert f"f32[{tokens // block},{images},{block},8]" in traced or block == tokens


def test_keys_and_queries_in_several_pieces():
  """More keys than one piece and more queries than one block, and neither a multiple of it."""
  inputs = draw(1, 301, 4999, 2, 16, 8)
  valid = random_mask(1, 4999)
  options = {"similarity": "euclidean", "scale": 0.25, "key_valid_BK": valid}
  got = value_and_gradients(*inputs, implementation="chunked", **options)
  assert_close(got, oracle(*inputs, "euclidean", 0.25, valid))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_image_without_a_valid_key_gives_zeros(implementation, similarity):
  q, k, v, pi, dout = draw(2, 9, 12, 2, 4, 8)
  valid = np.array([[False] * 12, [True] * 5 + [False] * 7])
  # Masked values must not be read.
  k[~valid], v[~valid] = np.nan, np.inf
  options = {"similarity": similarity, "key_valid_BK": valid, "implementation": implementation}
  got = value_and_gradients(q, k, v, pi, dout, **options)
  for x in got:
    assert np.all(np.asarray(x[0]) == 0)
  k[~valid], v[~valid] = 0, 0
  assert_close(got, oracle(q, k, v, pi, dout, similarity, 1.0, valid))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_keys_equal_absent_keys(implementation):
  q, k, v, pi, dout = draw(1, 20, 30, 2, 4, 8)
  valid = np.arange(30)[None] < 17
  options = {"similarity": "euclidean", "implementation": implementation}
  masked = value_and_gradients(q, k, v, pi, dout, key_valid_BK=valid, **options)
  absent = value_and_gradients(q, k[:, :17], v[:, :17], pi, dout, **options)
  for m, a in zip(masked, absent, strict=True):
    m = np.asarray(m)
    if m.shape != a.shape:
      assert np.all(m[:, 17:] == 0)
      m = m[:, :17]
    np.testing.assert_allclose(m, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_extreme_logits_stay_finite(implementation, similarity):
  q, k, v, pi, dout = draw(1, 40, 50, 2, 8, 8)
  options = {"similarity": similarity, "implementation": implementation}
  for factor in (1e-20, 1e3):
    got = value_and_gradients(factor * q, factor * k, v, pi, dout, **options)
    for x in got:
      assert np.all(np.isfinite(np.asarray(x)))
  # With logits a thousand times larger, each softmax selects one key, so each part gives its value.
  best = oracle(q, k, v, pi, dout, similarity, 1e6)[0]
  assert np.abs(np.asarray(got[0]) - best).max() < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_euclidean_distance_far_from_the_origin(implementation):
  """Moving queries and keys together changes no distance, and should lose few digits."""
  q, k, v, pi, dout = draw(1, 60, 70, 2, 8, 8)
  # Powers of two, so that the move itself rounds all inputs to a grid that float32 holds.
  q, k = (np.round(x * 2**12) / 2**12 for x in (q, k))
  options = {"similarity": "euclidean", "implementation": implementation}
  got = value_and_gradients(q + 64, k + 64, v, pi, dout, **options)
  assert_close(got, oracle(q, k, v, pi, dout, "euclidean", 1.0), tolerance=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_its_statistics_in_float32(implementation):
  inputs = draw(1, 200, 600, 2, 16, 32)
  low = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
  options = {"similarity": "euclidean", "scale": 0.25, "implementation": implementation}
  got = value_and_gradients(*low, **options)
  assert [x.dtype for x in got] == [jnp.bfloat16] * 5
  want = oracle(*[np.asarray(x, np.float32) for x in low], "euclidean", 0.25)
  # Two roundings to 8 bits on the way, one of them of each product's operands.
  assert_close(got, want, tolerance=2**-6)
  # Sums of 600 shares in bfloat16 would miss one by far more than this.
  ones = jnp.ones((1, 600, 32), jnp.bfloat16)
  out = value_and_gradients(low[0], low[1], ones, low[3] * 0 + 0.5, low[4], **options)[0]
  np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=2**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_equals_a_loop(implementation):
  q, k, v, pi, _ = draw(3, 20, 33, 2, 4, 8)
  options = {"similarity": "euclidean", "implementation": implementation}

  def loss(q, k, v, pi):
    return jnp.sum(jnp.sin(mos_attention(q[None], k[None], v[None], pi[None], **options)))

  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
  mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0, 0)))(q, k[0], v, pi)
  for b in range(3):
    for m, g in zip(mapped, jax.jit(gradient)(q[b], k[0], v[b], pi[b]), strict=True):
      np.testing.assert_allclose(m[b], g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_remat_changes_nothing(implementation):
  q, k, v, pi, _ = draw(1, 20, 33, 2, 4, 8)

  def loss(q, k):
    return jnp.sum(mos_attention(q, k, v, pi, implementation=implementation) ** 2)

  plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(q, k)
  remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(q, k)
  for a, b in zip(plain, remat, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_batch_needs_no_communication():
  """Four devices, each with its own images: no communication, and the same numbers."""
  here = pathlib.Path(__file__)
  done = subprocess.run(
    [sys.executable, "-c", f"import {__name__} as test; test.run_sharded()"],
    cwd=here.parents[len(__name__.split(".")) - 1],
    env=os.environ | host_devices(4),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def run_sharded():
  assert jax.device_count() == 4
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  inputs = draw(8, 40, 50, 2, 4, 8)
  arguments = [jax.device_put(x, sharding) for x in inputs]
  for implementation in (*IMPLEMENTATIONS, "pallas"):

    @jax.jit
    def gradient(q, k, v, pi, dout, implementation=implementation):
      attention = lambda *x: mos_attention(*x, implementation=implementation)
      out, transpose = jax.vjp(attention, q, k, v, pi)
      return out, *transpose(dout)

    compiled = gradient.lower(*arguments).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
      assert collective not in compiled.as_text(), (implementation, collective)
    assert_close(compiled(*arguments), oracle(*inputs, "dot", 1.0))


def test_auto_chooses_by_size_and_logs_it_once(caplog):
  with caplog.at_level(logging.INFO, logger="fpt_jax.ops.mos_attention"):
    for _ in range(2):
      small = jax.make_jaxpr(mos_attention)(*draw(1, 8, 8, 2, 4, 8)[:4])
      large = jax.make_jaxpr(mos_attention)(*draw(1, 1024, 1024, 2, 4, 8)[:4])
  assert "scan" not in str(small)
  assert "scan" in str(large)
  for choice in ("naive", "chunked"):
    logged = [r for r in caplog.records if f"runs as '{choice}'" in r.getMessage()]
    assert len(logged) <= 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"q": np.zeros((2, 3, 4), np.float32)}, r"\(2, 3, 4\)"),
    ({"k": np.zeros((2, 5, 2, 3), np.float32)}, r"\(2, 5, 2, 3\)"),
    ({"v": np.zeros((2, 6, 8), np.float32)}, r"\(2, 6, 8\)"),
    ({"v": np.zeros((2, 5, 0), np.float32)}, "empty"),
    ({"pi": np.zeros((2, 3), np.float32)}, r"\(2, 3\)"),
    ({"k": np.zeros((2, 5, 2, 4), np.int32)}, "int32"),
    ({"similarity": "cosine"}, "cosine"),
    ({"implementation": "fast"}, "fast"),
    ({"key_valid_BK": np.ones((2, 5), np.float32)}, "float32"),
    ({"key_valid_BK": np.ones((2, 4), bool)}, r"\(2, 4\)"),
  ],
)
def test_mistakes_are_quoted(change, message):
  q, k, v, pi, _ = draw(2, 3, 5, 2, 4, 8)
  options = {"q": q, "k": k, "v": v, "pi": pi} | change
  arrays = [options.pop(name) for name in ("q", "k", "v", "pi")]
  with pytest.raises(ValueError, match=message):
    mos_attention(*arrays, **options)
