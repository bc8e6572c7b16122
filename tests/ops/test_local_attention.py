"""Local attention against float64 NumPy loops over queries, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.local_attention import local_mos_attention
from fpt_jax.ops.mos_attention import mos_attention

TOLERANCE = 2e-6


def oracle(q, k, v, pi, dout, window, similarity, scale, valid, outside="zero"):
  """For each query, eq. 2 to 5 on its window of the zero-padded map, and their gradients."""
  q, k, v, pi, dout = (np.asarray(x, np.float64) for x in (q, k, v, pi, dout))
  B, H, W, M, _ = q.shape
  h, w = k.shape[1:3]
  margin = window // 2
  around = [(0, 0), (margin, margin), (margin, margin)]
  part_Bhw = np.pad(valid, around) if outside == "masked" else None
  k = np.pad(k * valid[..., None, None], [*around, (0, 0), (0, 0)])
  v = np.pad(v * valid[..., None], [*around, (0, 0)])
  out, dq, dk, dv, dpi = np.zeros_like(dout), *(np.zeros_like(x) for x in (q, k, v, pi))
  for b, y, x in np.ndindex(B, H, W):
    rows, columns = (slice(i, i + window) for i in (y // -(-H // h), x // -(-W // w)))
    dw = v[b, rows, columns] @ dout[b, y, x]
    weights = 0
    for m in range(M):
      k_m, q_m = k[b, rows, columns, m], q[b, y, x, m]
      away = k_m - q_m
      s = scale * (k_m @ q_m if similarity == "dot" else -np.sum(away**2, -1))
      p = np.exp(s - s.max())
      if part_Bhw is not None:
        p = np.where(part_Bhw[b, rows, columns], p, 0)
      p /= max(p.sum(), 1e-300)
      weights += pi[b, m] * p
      dpi[b, m] += np.sum(p * dw)
      ds = (scale * pi[b, m] * p * (dw - np.sum(p * dw)))[..., None]
      dq[b, y, x, m] = np.sum(ds * (k_m if similarity == "dot" else 2 * away), axis=(0, 1))
      dk[b, rows, columns, m] += ds * (q_m if similarity == "dot" else -2 * away)
    out[b, y, x] = np.tensordot(weights, v[b, rows, columns], 2)
    dv[b, rows, columns] += weights[..., None] * dout[b, y, x]
  inside = (slice(None), slice(margin, margin + h), slice(margin, margin + w))
  return out, dq, dk[inside] * valid[..., None, None], dv[inside] * valid[..., None], dpi


def draw(B, H, W, h, w, M, D, C):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
  pi = rng.dirichlet(np.ones(M), size=B).astype(np.float32)
  valid = rng.random((B, h, w)) < 0.7
  q, k = normal(B, H, W, M, D), normal(B, h, w, M, D)
  return (q, k, 0.5 + normal(B, h, w, C), pi, 0.5 + normal(B, H, W, C)), valid


def value_and_gradients(q, k, v, pi, dout, **options):
  @jax.jit
  def run(q, k, v, pi, dout):
    out, transpose = jax.vjp(lambda *x: local_mos_attention(*x, **options), q, k, v, pi)
    return out, *transpose(dout)

  return run(q, k, v, pi, dout)


@pytest.mark.parametrize("outside", ["zero", "masked"])
@pytest.mark.parametrize("implementation", ["naive", "tiled"])
@pytest.mark.parametrize(
  ("similarity", "sizes", "window", "masked"),
  [
    ("dot", (2, 5, 7, 5, 7, 2, 4, 6), 5, False),  # smaller than a tile
    ("dot", (1, 23, 19, 23, 19, 4, 8, 16), 5, True),  # several tiles, the last ones partial
    ("euclidean", (1, 9, 11, 9, 11, 2, 8, 16), 5, True),
    ("euclidean", (2, 13, 9, 7, 5, 1, 3, 4), 3, True),  # twice as fine, odd sides
    ("euclidean", (1, 24, 40, 6, 10, 2, 8, 16), 5, False),  # four times as fine
    ("euclidean", (1, 20, 17, 10, 17, 2, 8, 8), 1, False),  # different ratios of the two axes
    ("dot", (1, 3, 2, 1, 1, 3, 2, 2), 7, False),  # a window far larger than the map
  ],
)
def test_equals_the_equations(implementation, outside, similarity, sizes, window, masked):
  inputs, valid = draw(*sizes)
  scale = sizes[6] ** -0.5
  options = {"window": window, "similarity": similarity, "scale": scale, "outside": outside}
  mask = valid if masked else np.ones_like(valid)
  got = value_and_gradients(
    *inputs, key_valid_Bhw=mask if masked else None, implementation=implementation, **options
  )
  want = oracle(*inputs, window, similarity, scale, mask, outside)
  for name, g, w in zip(("out", "dq", "dk", "dv", "dpi"), got, want, strict=True):
    assert g.shape == w.shape, name
    assert np.abs(np.asarray(g) - w).max() <= TOLERANCE * np.abs(w).max() + 1e-12, name


@pytest.mark.parametrize("implementation", ["naive", "tiled"])
def test_a_map_without_a_valid_key_gives_zeros(implementation):
  (q, k, v, pi, dout), valid = draw(1, 6, 6, 3, 3, 2, 4, 5)
  v = v + np.nan
  options = {"key_valid_Bhw": np.zeros_like(valid), "implementation": implementation}
  for name, x in zip("oqkv", value_and_gradients(q, k, v, pi, dout, **options), strict=False):
    assert np.all(np.asarray(x) == 0), name


def test_a_window_over_the_whole_map_is_attention_beside_zero_keys():
  """A 5 x 5 window around the centre of a 3 x 3 map: attention to the map and 16 zero keys."""
  (q, k, v, pi, _), _ = draw(1, 3, 3, 3, 3, 2, 4, 5)
  options = {"similarity": "euclidean", "scale": 0.5}
  local = jax.jit(lambda *x: local_mos_attention(*x, window=5, **options))(q, k, v, pi)
  flat_k = np.concatenate([k.reshape(1, 9, 2, 4), np.zeros((1, 16, 2, 4), np.float32)], axis=1)
  flat_v = np.concatenate([v.reshape(1, 9, 5), np.zeros((1, 16, 5), np.float32)], axis=1)
  attention = jax.jit(lambda *x: mos_attention(*x, **options))
  whole = attention(q[:, 1, 1:2], flat_k, flat_v, pi)
  np.testing.assert_allclose(local[:, 1, 1:2], whole, rtol=1e-5, atol=1e-6)


def test_bfloat16():
  inputs, _ = draw(1, 12, 20, 6, 10, 2, 16, 16)
  low = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
  got = value_and_gradients(*low, similarity="euclidean", scale=0.25)
  assert [x.dtype for x in got] == [jnp.bfloat16] * 5
  exact = [np.asarray(x, np.float32) for x in low]
  want = oracle(*exact, 5, "euclidean", 0.25, np.ones((1, 6, 10), bool))
  for g, w in zip(got, want, strict=True):
    assert np.abs(np.asarray(g, np.float64) - w).max() <= 2**-6 * np.abs(w).max()


def test_vmap_equals_a_loop():
  (q, k, v, pi, _), _ = draw(2, 6, 8, 3, 4, 2, 4, 5)

  def loss(q, k, v, pi):
    return jnp.sum(jnp.sin(local_mos_attention(q[None], k[None], v[None], pi[None])))

  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
  mapped = jax.jit(jax.vmap(gradient))(q, k, v, pi)
  for b in range(2):
    for m, g in zip(mapped, jax.jit(gradient)(q[b], k[b], v[b], pi[b]), strict=True):
      np.testing.assert_allclose(m[b], g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"q": np.zeros((1, 6, 4, 2), np.float32)}, r"\(1, 6, 4, 2\)"),
    ({"q": np.zeros((1, 5, 4, 2, 4), np.float32)}, "5 x 4 queries are not"),
    ({"q": np.zeros((1, 2, 4, 2, 4), np.float32)}, "2 x 4 queries are not"),
    ({"v": np.zeros((1, 3, 2, 5), np.float16)}, "float16"),
    ({"pi": np.zeros((1, 3), np.float32)}, r"\(1, 3\)"),
    ({"window": 4}, "4"),
    ({"similarity": "cosine"}, "cosine"),
    ({"implementation": "pallas"}, "pallas"),
    ({"key_valid_Bhw": np.ones((1, 3, 2), np.int32)}, "int32"),
  ],
)
def test_mistakes_are_quoted(change, message):
  (q, k, v, pi, _), _ = draw(1, 6, 4, 3, 2, 2, 4, 5)
  if message.startswith("5 x 4"):
    k, v = np.zeros((1, 4, 2, 2, 4), np.float32), np.zeros((1, 4, 2, 5), np.float32)
  options = {"q": q, "k": k, "v": v, "pi": pi} | change
  arrays = [options.pop(name) for name in ("q", "k", "v", "pi")]
  with pytest.raises(ValueError, match=message):
    local_mos_attention(*arrays, **options)
