"""Attention of one block of queries under a mixture of softmaxes, and its gradients.

Shapes: B batch, q queries of the block, K keys of a piece, M parts of the mixture, D channels of a part,
C channels of a value. The formula and its symbols are those of `mos_attention`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Keys(NamedTuple):
  """A piece of the keys and values, in lists of parts: XLA on CPUs is slow along an axis of parts.

  Attributes:
    k_parts: [B, K, D] keys of each part.
    v_BKC: [B, K, C] values.
    bias_parts: biases of each part, [B, 1, K] or another shape that broadcasts with [B, q, K], or None.
  """

  k_parts: list[jax.Array]
  v_BKC: jax.Array
  bias_parts: list[jax.Array | None]


class Rows(NamedTuple):
  """Statistics of each row for the backward pass: `p = exp(s - top) * share`.

  Two numbers, because one, `top + log(sum)`, would lose digits where scores are large.

  Attributes:
    top_BMq: largest score.
    share_BMq: inverse of the sum of the exponentials; 0 without a valid key.
  """

  top_BMq: jax.Array
  share_BMq: jax.Array


class KeyGradients(NamedTuple):
  """Sums over queries, in the pieces of the keys; keys are the last axis, which is fastest.

  Attributes:
    dk: [B, D, K] by part and piece.
    dv: [B, C, K] by piece.
    dbias: [B, K] by part and piece; empty if the bias has no gradient.
  """

  dk: list[list[jax.Array]]
  dv: list[jax.Array]
  dbias: list[list[jax.Array]]


def attend(q_BqMD: jax.Array, keys: list[Keys], pi_BM: jax.Array) -> tuple[jax.Array, Rows]:
  """Attends from one block of queries to all pieces of the keys.

  Args:
    q_BqMD: [B, q, M, D] queries, already multiplied by the scale.
    keys: all pieces of the keys.
    pi_BM: [B, M] float32 weight of each part.

  Returns:
    out_BqC of the values' dtype, and the statistics of the rows for `attend_backward`.
  """
  dtype = keys[0].v_BKC.dtype
  w_pieces: list[Any] = [0.0] * len(keys)
  tops, shares = [], []
  for m in range(pi_BM.shape[1]):
    s_pieces = [_scores(q_BqMD, piece, m) for piece in keys]
    # The largest score of a row without a valid key is -inf; a finite one avoids NaN.
    lowest = jnp.finfo(s_pieces[0].dtype).min
    top_Bq = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1) for s in s_pieces], lowest)
    # The barrier keeps XLA from computing the exponentials twice, for their sum and for W.
    e_pieces = [lax.optimization_barrier(jnp.exp(s - top_Bq[:, :, None])) for s in s_pieces]
    total_Bq = sum(jnp.sum(e, axis=-1) for e in e_pieces)
    share_Bq = jnp.where(total_Bq > 0, 1 / total_Bq, 0)
    factor_Bq1 = (pi_BM[:, m, None] * share_Bq)[:, :, None]
    w_pieces = [w + factor_Bq1 * e for w, e in zip(w_pieces, e_pieces, strict=True)]
    tops.append(top_Bq)
    shares.append(share_Bq)
  out_BqC: Any = sum(
    product("bqk,bkc->bqc", w.astype(dtype), piece.v_BKC)
    for w, piece in zip(w_pieces, keys, strict=True)
  )
  return out_BqC.astype(dtype), Rows(jnp.stack(tops, axis=1), jnp.stack(shares, axis=1))


def attend_backward(
  q_BqMD: jax.Array,
  dout_BqC: jax.Array,
  rows: Rows,
  keys: list[Keys],
  pi_BM: jax.Array,
  bias_has_gradient: bool,
) -> tuple[jax.Array, KeyGradients, jax.Array]:
  """Computes the gradients of `attend` for one block of queries, in float32.

  Args:
    q_BqMD, keys, pi_BM: as for `attend`.
    dout_BqC: [B, q, C] gradient of the output.
    rows: statistics from `attend`.
    bias_has_gradient: whether to compute the gradient of the bias.

  Returns:
    dq_BqMD; the sums over these queries for the keys, where those of k and of the bias still lack the
    factor pi of their part (multiplying after the sum over all blocks is cheaper); and delta_BMq, whose
    sum over the queries is the gradient of pi.
  """
  dtype = q_BqMD.dtype
  dw_pieces = [product("bqc,bkc->bqk", dout_BqC, piece.v_BKC) for piece in keys]
  w_pieces: list[Any] = [0.0] * len(keys)
  dq_parts, deltas = [], []
  sums = KeyGradients([], [], [])
  for m in range(pi_BM.shape[1]):
    top_Bq1, share_Bq1 = (x[:, m, :, None] for x in rows)
    p_pieces = [jnp.exp(_scores(q_BqMD, piece, m) - top_Bq1) * share_Bq1 for piece in keys]
    pi_B11 = pi_BM[:, m, None, None]
    w_pieces = [w + pi_B11 * p for w, p in zip(w_pieces, p_pieces, strict=True)]
    # As a matrix product, this sum over the row writes no array of its size to memory.
    products = [product("bqk,bqk->bq", p, dw) for p, dw in zip(p_pieces, dw_pieces, strict=True)]
    delta_Bq = sum(products)
    ds_pieces = [p * (dw - delta_Bq[:, :, None]) for p, dw in zip(p_pieces, dw_pieces, strict=True)]
    if bias_has_gradient:
      sums.dbias.append([jnp.sum(ds, axis=1) for ds in ds_pieces])
    ds_pieces = [ds.astype(dtype) for ds in ds_pieces]
    sums.dk.append([product("bqd,bqk->bdk", q_BqMD[:, :, m], ds) for ds in ds_pieces])
    dq_BqD = sum(
      product("bqk,bkd->bqd", ds, piece.k_parts[m])
      for ds, piece in zip(ds_pieces, keys, strict=True)
    )
    dq_parts.append(pi_B11 * dq_BqD)
    deltas.append(delta_Bq)
  sums.dv.extend(product("bqc,bqk->bck", dout_BqC, w.astype(dtype)) for w in w_pieces)
  return jnp.stack(dq_parts, axis=2), sums, jnp.stack(deltas, axis=1)


def product(subscripts, a, b):
  """Multiplies as `jnp.einsum`, with a float32 result."""
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(q_BqMD, keys: Keys, m):
  return biased_product("bqd,bkd->bqk", q_BqMD[:, :, m], keys.k_parts[m], keys.bias_parts[m])


def biased_product(subscripts, q_D, k_D, bias):
  """Multiplies over the last axis D and adds a bias that broadcasts with the products, or None."""
  if bias is None:
    return product(subscripts, q_D, k_D)
  half = q_D.shape[-1] // 2
  if half < 64 or q_D.dtype == jnp.bfloat16:
    return product(subscripts, q_D, k_D) + bias
  # Two partial sums lose fewer digits than one, which matters for distances.
  first = product(subscripts, q_D[..., :half], k_D[..., :half])
  return first + bias + product(subscripts, q_D[..., half:], k_D[..., half:])
