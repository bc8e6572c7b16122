"""Attention under a mixture of softmaxes, exact, without the query-by-key matrix in memory.

Shapes: B batch, Q queries, K keys, M parts of the mixture, D channels of a part, C channels of a
value, N blocks of queries, q queries of one block.

    out_i = sum_j W_ij v_j,    W_ij = sum_m pi_m exp(s_mij - lse_mi)

Three facts make it cheap. `-||q - k||^2` is `2 q.k - ||k||^2` up to a constant per row, to which the
softmax is invariant, so both similarities are a dot product with a bias per key; a mask is a bias too.
Once the normalisers of the parts are known, W is one matrix, so the values are multiplied once, not M
times, and so are `dO V^T` and `W^T dO` in the backward pass. The backward pass needs only two numbers per
row, from which it computes W again.
"""

import functools
import logging
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fpt_jax.ops import target
from fpt_jax.ops.attention_blocks import (
  KeyGradients,
  Keys,
  attend,
  attend_backward,
  biased_product,
  product,
)

logger = logging.getLogger(__name__)

Similarity = Literal["dot", "euclidean"]
Implementation = Literal["auto", "naive", "chunked", "pallas"]

# Up to this many scores, the whole matrix needs little memory, and one einsum has the least overhead.
_NAIVE_MAX_SCORES = 1 << 18


class _Blocks(NamedTuple):
  """How "chunked" cuts queries and keys.

  Attributes:
    scores: scores of a block of queries in one part, of one image.
    least, most: bounds on the number of queries in a block.
    piece: largest number of keys in one product.
  """

  scores: int
  least: int
  most: int
  piece: int


# Measured. A CPU wants what fits into its caches, a GPU few and large kernels.
_CPU_BLOCKS = _Blocks(scores=1 << 21, least=64, most=256, piece=4096)
_GPU_BLOCKS = _Blocks(scores=1 << 26, least=64, most=4096, piece=16384)


@jax.named_scope("attention")
def mos_attention(
  q_BQMD: jax.Array,
  k_BKMD: jax.Array,
  v_BKC: jax.Array,
  pi_BM: jax.Array,
  *,
  similarity: Similarity = "dot",
  scale: float = 1.0,
  key_valid_BK: jax.Array | None = None,
  implementation: Implementation = "auto",
) -> jax.Array:
  """Attends with `sum_m pi_m softmax_j(scale * s_m(i, j))` (eq. 2, 3 and 5 of the FPT paper).

  Args:
    q_BQMD: [B, Q, M, D] queries, float32 or bfloat16 (statistics are float32 in both cases).
    k_BKMD: [B, K, M, D] keys, of the queries' dtype.
    v_BKC: [B, K, C] values, of the queries' dtype.
    pi_BM: [B, M] weight of each part, float; the caller makes the weights sum to one.
    similarity: "dot" for `q.k`, "euclidean" for `-||q - k||^2`.
    scale: factor of the similarity, the inverse of a temperature.
    key_valid_BK: [B, K] bool, the keys that may be attended to; None for all. A batch element without a
      valid key gives zeros, and zero gradients.
    implementation: "naive" for the formula, "chunked" for the same in little memory, "pallas" for the TPU
      kernels; "auto" uses the kernels on TPU, and naive or chunked by size elsewhere.

  Returns:
    [B, Q, C] of the values' dtype.

  Raises:
    ValueError: shapes, dtypes or names do not fit.
  """
  _check_arguments(q_BQMD, k_BKMD, v_BKC, pi_BM, similarity, key_valid_BK, implementation)
  if target.is_written_out():
    implementation = "naive"
  if implementation == "auto":
    implementation = _choose(q_BQMD.shape[1] * k_BKMD.shape[1])
  if key_valid_BK is not None:
    # So masked values, including NaN, reach neither the output nor a gradient.
    k_BKMD = jnp.where(key_valid_BK[:, :, None, None], k_BKMD, 0)
    v_BKC = jnp.where(key_valid_BK[:, :, None], v_BKC, 0)
  if similarity == "euclidean":
    q_BQMD, k_BKMD = _centre(q_BQMD, k_BKMD)
  mean_B1C = None
  if v_BKC.dtype != jnp.bfloat16:
    # Attention to v is attention to v - mean, plus the mean. The gradients of q and k are computed from
    # differences of values, which are more exact this way. In bfloat16, the subtraction would lose more.
    mean_B1C = lax.stop_gradient(jnp.mean(v_BKC, axis=1, keepdims=True))
    v_BKC -= mean_B1C

  q_BQMD, bias_BMK = _as_biased_dot(q_BQMD, k_BKMD, similarity, scale, key_valid_BK)
  if implementation == "naive":
    out_BQC = _naive(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK)
  else:
    attention = _pallas() if implementation == "pallas" else _chunked
    bias_has_gradient = similarity == "euclidean"
    pi_BM = pi_BM.astype(jnp.float32)
    out_BQC = attention(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient)
  return (
    out_BQC
    if mean_B1C is None
    else out_BQC + (_weight_sum(pi_BM, key_valid_BK) * mean_B1C).astype(v_BKC.dtype)
  )


def _pallas():
  """The TPU kernels; importing Pallas takes a tenth of the program's start, so only where they are used."""
  from fpt_jax.ops.mos_attention_tpu import mos_attention_tpu

  return mos_attention_tpu


def _weight_sum(pi_BM, key_valid_BK):
  """[B, 1, 1]: the sum of the weights of a row."""
  sum_B11 = jnp.sum(pi_BM, axis=1)[:, None, None]
  if key_valid_BK is None:
    return sum_B11
  return jnp.where(jnp.any(key_valid_BK, axis=1)[:, None, None], sum_B11, 0)


def _choose(scores: int) -> Implementation:
  choice: Implementation
  if target.platform() == "tpu":
    choice = "pallas"
  else:
    choice = "naive" if scores <= _NAIVE_MAX_SCORES else "chunked"
  _log_once(choice, target.platform())
  return choice


@functools.cache
def _log_once(choice, backend):
  logger.info("mos_attention runs as %r on %s", choice, backend)


def _check_arguments(q_BQMD, k_BKMD, v_BKC, pi_BM, similarity, key_valid_BK, implementation):
  if implementation not in ("auto", "naive", "chunked", "pallas"):
    raise ValueError(
      f"implementation must be auto, naive, chunked or pallas, got {implementation!r}"
    )
  shapes = f"q {q_BQMD.shape}, k {k_BKMD.shape}, v {v_BKC.shape}, pi {pi_BM.shape}"
  if (q_BQMD.ndim, k_BKMD.ndim, v_BKC.ndim, pi_BM.ndim) != (4, 4, 3, 2):
    raise ValueError(
      f"need q [B, Q, M, D], k [B, K, M, D], v [B, K, C] and pi [B, M], got {shapes}"
    )
  B, _, M, D = q_BQMD.shape
  K = k_BKMD.shape[1]
  if k_BKMD.shape != (B, K, M, D) or v_BKC.shape[:2] != (B, K) or pi_BM.shape != (B, M):
    raise ValueError(f"batch, keys, parts or channels disagree: {shapes}")
  if 0 in q_BQMD.shape or 0 in v_BKC.shape:
    raise ValueError(f"no axis may be empty: {shapes}")
  dtypes = {x.dtype for x in (q_BQMD, k_BKMD, v_BKC)}
  if len(dtypes) > 1 or not all(jnp.issubdtype(d, jnp.floating) for d in (*dtypes, pi_BM.dtype)):
    raise ValueError(
      "q, k and v must share one floating dtype and pi be floating, got "
      f"{q_BQMD.dtype}, {k_BKMD.dtype}, {v_BKC.dtype} and {pi_BM.dtype}"
    )
  if similarity not in ("dot", "euclidean"):
    raise ValueError(f"similarity must be dot or euclidean, got {similarity!r}")
  if key_valid_BK is not None and (key_valid_BK.shape != (B, K) or key_valid_BK.dtype != jnp.bool_):
    raise ValueError(
      f"key_valid must be bool {(B, K)}, got {key_valid_BK.dtype} {key_valid_BK.shape}"
    )


def _centre(q_BQMD, k_BKMD):
  """Moves the origin to the mean key, where `2 q.k - ||k||^2` loses the fewest digits.

  Distances are invariant to the move, so the mean needs no gradient.
  """
  dtype = q_BQMD.dtype
  mean_B1MD = lax.stop_gradient(jnp.mean(k_BKMD.astype(jnp.float32), axis=1, keepdims=True))
  return (q_BQMD - mean_B1MD).astype(dtype), (k_BKMD - mean_B1MD).astype(dtype)


def _naive(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK):
  """The literal formula, with the whole matrix of weights in memory."""
  f32 = jnp.float32
  s_BMQK = biased_product(
    "bqmd,bkmd->bmqk", q_BQMD, k_BKMD, None if bias_BMK is None else bias_BMK[:, :, None]
  )
  # As in `attend`: finite, so that a row without a valid key gives zeros.
  top_BMQ1 = jnp.maximum(jnp.max(s_BMQK, axis=-1, keepdims=True), jnp.finfo(f32).min)
  e_BMQK = jnp.exp(s_BMQK - lax.stop_gradient(top_BMQ1))
  total_BMQ1 = jnp.sum(e_BMQK, axis=-1, keepdims=True)
  p_BMQK = e_BMQK / jnp.where(total_BMQ1 > 0, total_BMQ1, 1)
  # One weight per query, although all are equal: its gradient is summed row by row, then over rows,
  # which keeps digits that one long sum would lose.
  pi_BMQ = jnp.broadcast_to(pi_BM.astype(f32)[:, :, None], p_BMQK.shape[:3])
  w_BQK = jnp.einsum("bmq,bmqk->bqk", pi_BMQ, p_BMQK)
  return product("bqk,bkc->bqc", w_BQK.astype(v_BKC.dtype), v_BKC).astype(v_BKC.dtype)


def _as_biased_dot(q_BQMD, k_BKMD, similarity, scale, key_valid_BK):
  """Writes both similarities and the mask as `q'.k + bias`, up to a constant per row of the softmax."""
  B, K, M, _ = k_BKMD.shape
  bias_BMK = None
  if similarity == "euclidean":
    kk_BMK = jnp.einsum("bkmd,bkmd->bmk", k_BKMD, k_BKMD, preferred_element_type=jnp.float32)
    # Minus a constant per row, again, so that scores are small and lose few digits.
    mean_BM1 = lax.stop_gradient(jnp.mean(kk_BMK, axis=-1, keepdims=True))
    bias_BMK = -scale * (kk_BMK - mean_BM1)
    scale = 2 * scale
  if key_valid_BK is not None:
    bias_BMK = jnp.zeros((B, M, K), jnp.float32) if bias_BMK is None else bias_BMK
    bias_BMK = jnp.where(key_valid_BK[:, None, :], bias_BMK, -jnp.inf)
  return q_BQMD * jnp.asarray(scale, q_BQMD.dtype), bias_BMK


def _blocks(B: int) -> _Blocks:
  """How the attention of B images is cut; on a GPU they share the scores of a block."""
  if target.platform() != "gpu":
    return _CPU_BLOCKS
  return _GPU_BLOCKS._replace(scores=_GPU_BLOCKS.scores // B)


def _block_of_queries(B: int, Q: int, K: int) -> int:
  """Returns the number of queries per block: about `scores` scores, with all blocks nearly full."""
  limits = _blocks(B)
  most = max(limits.least, min(limits.most, limits.scores // K // 8 * 8))
  blocks = -(-Q // most)
  return Q if blocks == 1 else min(most, -(-Q // (8 * blocks)) * 8)


def _cut_keys(k_BKMD, v_BKC, bias_BMK) -> list[Keys]:
  """Divides the keys into pieces of about equal length, which fit into the caches."""
  B, K, M, _ = k_BKMD.shape
  length = -(-K // (16 * -(-K // _blocks(B).piece))) * 16
  pieces = [slice(start, min(start + length, K)) for start in range(0, K, length)]
  return [
    Keys(
      [k_BKMD[:, piece, m] for m in range(M)],
      v_BKC[:, piece],
      [None if bias_BMK is None else bias_BMK[:, m, None, piece] for m in range(M)],
    )
    for piece in pieces
  ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient):
  return _chunked_forward(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient)[0]


def _chunked_forward(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient):
  del bias_has_gradient
  Q, K = q_BQMD.shape[1], k_BKMD.shape[1]
  keys = _cut_keys(k_BKMD, v_BKC, bias_BMK)
  q_NBqMD = _split(q_BQMD, _block_of_queries(len(q_BQMD), Q, K))
  out_NBqC, rows = lax.map(lambda q_BqMD: attend(q_BqMD, keys, pi_BM), q_NBqMD)
  return _join(out_NBqC, Q), (q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, rows)


def _chunked_backward(bias_has_gradient, saved, dout_BQC):
  q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, rows = saved
  Q, dtype = q_BQMD.shape[1], q_BQMD.dtype
  keys = _cut_keys(k_BKMD, v_BKC, bias_BMK)

  def one_block(sums, block):
    q_BqMD, dout_BqC, block_rows = block
    dq_BqMD, here, delta_BMq = attend_backward(
      q_BqMD, dout_BqC, block_rows, keys, pi_BM, bias_has_gradient
    )
    return jax.tree.map(jnp.add, sums, here), (dq_BqMD.astype(dtype), delta_BMq)

  block = rows.top_BMq.shape[-1]
  blocks = (_split(q_BQMD, block), _split(dout_BQC, block), rows)
  start = _zero_key_gradients(keys, bias_has_gradient)
  sums, (dq_NBqMD, delta_NBMq) = lax.scan(one_block, start, blocks)

  dk_BMDK = _join_pieces(sums.dk) * pi_BM[:, :, None, None]
  dv_BCK = jnp.concatenate(sums.dv, axis=-1)
  if bias_has_gradient:
    dbias_BMK = _join_pieces(sums.dbias) * pi_BM[:, :, None]
  else:
    dbias_BMK = None if bias_BMK is None else jnp.zeros_like(bias_BMK)
  return (
    _join(dq_NBqMD, Q),
    dk_BMDK.transpose(0, 3, 1, 2).astype(dtype),
    dv_BCK.transpose(0, 2, 1).astype(dtype),
    jnp.sum(delta_NBMq, axis=(0, 3)),
    dbias_BMK,
  )


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _zero_key_gradients(keys: list[Keys], bias_has_gradient: bool) -> KeyGradients:
  def zeros(x_BK):
    B, K, *channels = x_BK.shape
    return jnp.zeros((B, *channels, K), jnp.float32)

  by_part = list(zip(*[piece.k_parts for piece in keys], strict=True))
  return KeyGradients(
    dk=[[zeros(k) for k in pieces] for pieces in by_part],
    dv=[zeros(piece.v_BKC) for piece in keys],
    dbias=[[zeros(k[:, :, 0]) for k in pieces] for pieces in by_part] if bias_has_gradient else [],
  )


def _join_pieces(parts):
  """A list of parts of lists of pieces [B, ..., K] -> [B, M, ..., K]."""
  return jnp.stack([jnp.concatenate(pieces, axis=-1) for pieces in parts], axis=1)


def _split(x_BQ, block):
  """[B, Q, ...] -> [N, B, block, ...], with zeros after the last query."""
  B, Q = x_BQ.shape[:2]
  N = -(-Q // block)
  x_BQ = jnp.pad(x_BQ, [(0, 0), (0, N * block - Q)] + [(0, 0)] * (x_BQ.ndim - 2))
  return jnp.moveaxis(x_BQ.reshape(B, N, block, *x_BQ.shape[2:]), 1, 0)


def _join(x_NBq, Q):
  """[N, B, block, ...] -> [B, Q, ...]."""
  x_BNq = jnp.moveaxis(x_NBq, 0, 1)
  return x_BNq.reshape(x_BNq.shape[0], -1, *x_BNq.shape[3:])[:, :Q]
