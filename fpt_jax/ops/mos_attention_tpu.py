"""Mixture-of-softmaxes attention as TPU kernels.

Shapes: B batch, Q queries, K keys, M parts, D channels of a part, C channels of a value; q k the
queries and keys of one block, 1 an axis kept for broadcasting.

Every kernel iterates over blocks of scores that never leave the chip. The forward kernel passes over the
keys twice: first for the largest score and the sum of each row, online, then for the output, where the
mixed weight W multiplies the values once for all parts. For the gradient

    ds = p (dw - delta),    dw = dO V^T,    delta = sum_j p dw

a first kernel computes dQ and delta in one pass over the keys, although ds depends on delta: it sums
`p (dw - c) K` and `p K` separately and combines them at the end. The constant per row c = dO . O, the mean
of delta over the parts, keeps this difference from losing digits. A second kernel, with queries innermost,
computes dK, dV and the gradient of the bias.

Rows of scores lie along lanes in memory; `_column` transposes them where a kernel needs a column.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from fpt_jax.ops.mesh import mesh_of

# Queries and keys per block: they fit into 16 MB of VMEM, v5e's default, along with the accumulators.
_BLOCK = 512
_LANES = 128
_LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def mos_attention_tpu(
  q_BQMD: jax.Array,
  k_BKMD: jax.Array,
  v_BKC: jax.Array,
  pi_BM: jax.Array,
  bias_BMK: jax.Array | None,
  bias_has_gradient: bool,
) -> jax.Array:
  """Attends with `sum_m pi_m softmax(q_m . k_m + bias_m)`, in interpret mode where there is no TPU.

  Args:
    q_BQMD: [B, Q, M, D] queries, float32 or bfloat16, already multiplied by the scale.
    k_BKMD: [B, K, M, D] keys, of the queries' dtype.
    v_BKC: [B, K, C] values, of the queries' dtype.
    pi_BM: [B, M] float32 weight of each part.
    bias_BMK: [B, M, K] float32, -inf for masked keys; None for zero.
    bias_has_gradient: whether to compute the gradient of the bias; otherwise it is zero.

  Returns:
    [B, Q, C] of the values' dtype.
  """
  return _forward(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient)[0]


def _forward(q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, bias_has_gradient):
  del bias_has_gradient
  Q = q_BQMD.shape[1]
  q_BQX, k_BKX, v_pad_BKC, bias_pad_BMK = _pad_keys_and_queries(q_BQMD, k_BKMD, v_BKC, bias_BMK)
  out_BQC, top_BMQ, share_BMQ = _run(
    _forward_kernel_call,
    (q_BQX, k_BKX, v_pad_BKC, pi_BM, bias_pad_BMK),
  )
  out_BQC = out_BQC[:, :Q]
  return out_BQC, (q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, out_BQC, top_BMQ, share_BMQ)


def _backward(bias_has_gradient, saved, dout_BQC):
  q_BQMD, k_BKMD, v_BKC, pi_BM, bias_BMK, out_BQC, top_BMQ, share_BMQ = saved
  Q, K = q_BQMD.shape[1], k_BKMD.shape[1]
  q_BQX, k_BKX, v_pad_BKC, bias_pad_BMK = _pad_keys_and_queries(q_BQMD, k_BKMD, v_BKC, bias_BMK)
  mean_BQ = jnp.einsum("bqc,bqc->bq", dout_BQC, out_BQC, preferred_element_type=jnp.float32)
  dout_BQC = _pad_axis(dout_BQC, 1, q_BQX.shape[1])
  mean_B1Q = _pad_axis(mean_BQ[:, None], 2, q_BQX.shape[1])
  dq_BQX, delta_BMQ = _run(
    _query_gradient_call,
    (q_BQX, k_BKX, v_pad_BKC, pi_BM, bias_pad_BMK, dout_BQC, top_BMQ, share_BMQ, mean_B1Q),
  )
  dk_BKX, dv_BKC, dbias_BMK = _run(
    _key_gradient_call,
    (q_BQX, k_BKX, v_pad_BKC, pi_BM, bias_pad_BMK, dout_BQC, top_BMQ, share_BMQ, delta_BMQ),
  )
  if not bias_has_gradient:
    dbias_BMK = None if bias_BMK is None else jnp.zeros_like(bias_BMK)
  return (
    dq_BQX[:, :Q].reshape(q_BQMD.shape),
    dk_BKX[:, :K].reshape(k_BKMD.shape),
    dv_BKC[:, :K],
    jnp.sum(delta_BMQ[:, :, :Q], axis=-1),
    dbias_BMK if dbias_BMK is None else dbias_BMK[:, :, :K],
  )


mos_attention_tpu.defvjp(_forward, _backward)


def _pad_keys_and_queries(q_BQMD, k_BKMD, v_BKC, bias_BMK):
  """Pads queries and keys to whole blocks, concatenates the parts, and masks the padding by the bias."""
  B, Q, M, D = q_BQMD.shape
  K = k_BKMD.shape[1]
  full_Q, full_K = (-(-n // _block(n)) * _block(n) for n in (Q, K))
  if bias_BMK is None:
    bias_BMK = jnp.zeros((B, M, K), jnp.float32)
  bias_BMK = jnp.pad(bias_BMK, [(0, 0), (0, 0), (0, full_K - K)], constant_values=-jnp.inf)
  q_BQX = _pad_axis(q_BQMD.reshape(B, Q, M * D), 1, full_Q)
  k_BKX = _pad_axis(k_BKMD.reshape(B, K, M * D), 1, full_K)
  return q_BQX, k_BKX, _pad_axis(v_BKC, 1, full_K), bias_BMK


def _block(n: int) -> int:
  return min(_BLOCK, -(-n // _LANES) * _LANES)


def _pad_axis(x, axis, size):
  return jnp.pad(x, [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)])


def _run(call, args):
  """Runs a kernel, compiled on TPU and interpreted elsewhere, on each device for its own images."""

  def on_one_device(*args):
    return lax.platform_dependent(
      *args,
      tpu=lambda *args: tuple(call(*args, interpret=False)),
      default=lambda *args: tuple(call(*args, interpret=True)),
    )

  @jax.custom_batching.custom_vmap
  def on_all_devices(*args):
    mesh = mesh_of(args[0])
    if mesh.size <= 1:
      return on_one_device(*args)
    # XLA cannot partition a kernel; `shard_map` states that images are independent.
    split = args[0].shape[0] % mesh.size == 0
    spec = PartitionSpec(mesh.axis_names) if split else PartitionSpec()
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
      *args
    )

  @on_all_devices.def_vmap
  def fold(axis_size, in_batched, *args):
    """Merges the mapped axis into the batch."""
    whole = [
      x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
      for x, batched in zip(args, in_batched, strict=True)
    ]
    outs = _run(call, [x.reshape(-1, *x.shape[2:]) for x in whole])
    outs = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outs)
    return outs, (True,) * len(outs)

  return on_all_devices(*args)


def _dot(a, b, contract):
  return lax.dot_general(
    a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32
  )


def _column(row_1n):
  """[1, n] -> [n, 1], by a transpose of whole tiles, which the hardware supports."""
  return jnp.broadcast_to(row_1n, (_LANES, row_1n.shape[1])).T[:, :1]


def _row(column_n1):
  """[n, 1] -> [1, n], as `_column`."""
  return jnp.broadcast_to(column_n1, (column_n1.shape[0], _LANES)).T[:1]


def _one(m):
  return slice(m, m + 1)


def _forward_kernel(pi, q, k, v, bias, out, top, share, top_qM, sum_qM, out_qC):
  """Grid (B, blocks of queries, 2 passes, blocks of keys)."""
  b, turn, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  M = pi.shape[1]
  D = q.shape[2] // M
  last = j == pl.num_programs(3) - 1

  def scores(m):
    part = slice(m * D, (m + 1) * D)
    return _dot(q[0, :, part], k[0, :, part], (1, 1)) + bias[0, _one(m)]

  @pl.when((turn == 0) & (j == 0))
  def _():
    top_qM[...] = jnp.full(top_qM.shape, _LOWEST)
    sum_qM[...] = jnp.zeros(sum_qM.shape, jnp.float32)

  @pl.when(turn == 0)
  def _():
    for m in range(M):
      s_qk = scores(m)
      old_q1 = top_qM[:, _one(m)]
      top_q1 = jnp.maximum(old_q1, jnp.max(s_qk, axis=1, keepdims=True))
      new_q1 = jnp.sum(jnp.exp(s_qk - top_q1), axis=1, keepdims=True)
      sum_qM[:, _one(m)] = sum_qM[:, _one(m)] * jnp.exp(old_q1 - top_q1) + new_q1
      top_qM[:, _one(m)] = top_q1

  @pl.when((turn == 0) & last)
  def _():
    out_qC[...] = jnp.zeros(out_qC.shape, jnp.float32)
    # From here on, `sum_qM` holds the inverse of the sum.
    sum_qM[...] = jnp.where(sum_qM[...] > 0, 1 / sum_qM[...], 0)
    for m in range(M):
      top[0, _one(m)] = _row(top_qM[:, _one(m)])
      share[0, _one(m)] = _row(sum_qM[:, _one(m)])

  @pl.when(turn == 1)
  def _():
    w_qk: Any = 0.0
    for m in range(M):
      factor_q1 = pi[b, m] * sum_qM[:, _one(m)]
      w_qk += factor_q1 * jnp.exp(scores(m) - top_qM[:, _one(m)])
    out_qC[...] += _dot(w_qk.astype(v.dtype), v[0], (1, 0))

  @pl.when((turn == 1) & last)
  def _():
    out[0] = out_qC[...].astype(out.dtype)


def _forward_kernel_call(q_BQX, k_BKX, v_BKC, pi_BM, bias_BMK, interpret):
  B, Q, X = q_BQX.shape
  K, C = v_BKC.shape[1:]
  M = pi_BM.shape[1]
  q, k = _block(Q), _block(K)
  rows = jax.ShapeDtypeStruct((B, M, Q), jnp.float32)
  return pl.pallas_call(
    _forward_kernel,
    grid=(B, Q // q, 2, K // k),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((1, q, X), lambda b, i, t, j: (b, i, 0)),
      pl.BlockSpec((1, k, X), lambda b, i, t, j: (b, j, 0)),
      # The first pass needs no values: it keeps the block that the second pass begins with.
      pl.BlockSpec((1, k, C), lambda b, i, t, j: (b, t * j, 0)),
      pl.BlockSpec((1, M, k), lambda b, i, t, j: (b, 0, j)),
    ],
    out_specs=[
      pl.BlockSpec((1, q, C), lambda b, i, t, j: (b, i, 0)),
      pl.BlockSpec((1, M, q), lambda b, i, t, j: (b, 0, i)),
      pl.BlockSpec((1, M, q), lambda b, i, t, j: (b, 0, i)),
    ],
    out_shape=[jax.ShapeDtypeStruct((B, Q, C), v_BKC.dtype), rows, rows],
    scratch_shapes=[
      pltpu.VMEM((q, M), jnp.float32),
      pltpu.VMEM((q, M), jnp.float32),
      pltpu.VMEM((q, C), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
    ),
    interpret=interpret,
    name="mos_attention_forward",
  )(pi_BM, q_BQX, k_BKX, v_BKC, bias_BMK)


def _query_gradient_kernel(
  pi,
  q,
  k,
  v,
  bias,
  dout,
  top,
  share,
  mean,
  dq,
  delta,
  top_qM,
  share_qM,
  mean_q1,
  pdwk,
  pk,
  delta_qM,
):
  """Grid (B, blocks of queries, blocks of keys)."""
  b, j = pl.program_id(0), pl.program_id(2)
  M = pi.shape[1]
  D = q.shape[2] // M

  @pl.when(j == 0)
  def _():
    mean_q1[...] = _column(mean[0])
    for m in range(M):
      top_qM[:, _one(m)] = _column(top[0, _one(m)])
      share_qM[:, _one(m)] = _column(share[0, _one(m)])
    for x in (pdwk, pk, delta_qM):
      x[...] = jnp.zeros(x.shape, jnp.float32)

  dw_qk = _dot(dout[0], v[0], (1, 1)) - mean_q1[...]
  for m in range(M):
    part = slice(m * D, (m + 1) * D)
    k_kD = k[0, :, part]
    s_qk = _dot(q[0, :, part], k_kD, (1, 1)) + bias[0, _one(m)]
    p_qk = jnp.exp(s_qk - top_qM[:, _one(m)]) * share_qM[:, _one(m)]
    pdw_qk = p_qk * dw_qk
    delta_qM[:, _one(m)] += jnp.sum(pdw_qk, axis=1, keepdims=True)
    pdwk[:, part] += _dot(pdw_qk.astype(k.dtype), k_kD, (1, 0))
    pk[:, part] += _dot(p_qk.astype(k.dtype), k_kD, (1, 0))

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    for m in range(M):
      part = slice(m * D, (m + 1) * D)
      delta_q1 = delta_qM[:, _one(m)]
      dq[0, :, part] = (pi[b, m] * (pdwk[:, part] - delta_q1 * pk[:, part])).astype(dq.dtype)
      delta[0, _one(m)] = _row(delta_q1) + mean[0]


def _query_gradient_call(
  q_BQX, k_BKX, v_BKC, pi_BM, bias_BMK, dout_BQC, top_BMQ, share_BMQ, mean_B1Q, interpret
):
  B, Q, X = q_BQX.shape
  K, C = v_BKC.shape[1:]
  M = pi_BM.shape[1]
  q, k = _block(Q), _block(K)
  rows_spec = pl.BlockSpec((1, M, q), lambda b, i, j: (b, 0, i))
  return pl.pallas_call(
    _query_gradient_kernel,
    grid=(B, Q // q, K // k),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((1, q, X), lambda b, i, j: (b, i, 0)),
      pl.BlockSpec((1, k, X), lambda b, i, j: (b, j, 0)),
      pl.BlockSpec((1, k, C), lambda b, i, j: (b, j, 0)),
      pl.BlockSpec((1, M, k), lambda b, i, j: (b, 0, j)),
      pl.BlockSpec((1, q, C), lambda b, i, j: (b, i, 0)),
      rows_spec,
      rows_spec,
      pl.BlockSpec((1, 1, q), lambda b, i, j: (b, 0, i)),
    ],
    out_specs=[pl.BlockSpec((1, q, X), lambda b, i, j: (b, i, 0)), rows_spec],
    out_shape=[
      jax.ShapeDtypeStruct(q_BQX.shape, q_BQX.dtype),
      jax.ShapeDtypeStruct(top_BMQ.shape, jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((q, M), jnp.float32),
      pltpu.VMEM((q, M), jnp.float32),
      pltpu.VMEM((q, 1), jnp.float32),
      pltpu.VMEM((q, X), jnp.float32),
      pltpu.VMEM((q, X), jnp.float32),
      pltpu.VMEM((q, M), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="mos_attention_query_gradient",
  )(pi_BM, q_BQX, k_BKX, v_BKC, bias_BMK, dout_BQC, top_BMQ, share_BMQ, mean_B1Q)


def _key_gradient_kernel(
  pi, q, k, v, bias, dout, top, share, delta, dk, dv, dbias, bias_kM, dk_kX, dv_kC, dbias_kM
):
  """Grid (B, blocks of keys, blocks of queries); scores are transposed, keys by queries."""
  b, i = pl.program_id(0), pl.program_id(2)
  M = pi.shape[1]
  D = q.shape[2] // M

  @pl.when(i == 0)
  def _():
    for m in range(M):
      bias_kM[:, _one(m)] = _column(bias[0, _one(m)])
    for x in (dk_kX, dv_kC, dbias_kM):
      x[...] = jnp.zeros(x.shape, jnp.float32)

  dw_kq = _dot(v[0], dout[0], (1, 1))
  w_kq: Any = 0.0
  for m in range(M):
    part = slice(m * D, (m + 1) * D)
    q_qD = q[0, :, part]
    s_kq = _dot(k[0, :, part], q_qD, (1, 1)) + bias_kM[:, _one(m)]
    p_kq = jnp.exp(s_kq - top[0, _one(m)]) * share[0, _one(m)]
    w_kq += pi[b, m] * p_kq
    ds_kq = p_kq * (dw_kq - delta[0, _one(m)])
    dbias_kM[:, _one(m)] += jnp.sum(ds_kq, axis=1, keepdims=True)
    dk_kX[:, part] += _dot(ds_kq.astype(q.dtype), q_qD, (1, 0))
  dv_kC[...] += _dot(w_kq.astype(dout.dtype), dout[0], (1, 0))

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    dv[0] = dv_kC[...].astype(dv.dtype)
    for m in range(M):
      part = slice(m * D, (m + 1) * D)
      dk[0, :, part] = (pi[b, m] * dk_kX[:, part]).astype(dk.dtype)
      dbias[0, _one(m)] = pi[b, m] * _row(dbias_kM[:, _one(m)])


def _key_gradient_call(
  q_BQX, k_BKX, v_BKC, pi_BM, bias_BMK, dout_BQC, top_BMQ, share_BMQ, delta_BMQ, interpret
):
  B, Q, X = q_BQX.shape
  K, C = v_BKC.shape[1:]
  M = pi_BM.shape[1]
  q, k = _block(Q), _block(K)
  rows_spec = pl.BlockSpec((1, M, q), lambda b, j, i: (b, 0, i))
  keys_spec = pl.BlockSpec((1, k, X), lambda b, j, i: (b, j, 0))
  values_spec = pl.BlockSpec((1, k, C), lambda b, j, i: (b, j, 0))
  bias_spec = pl.BlockSpec((1, M, k), lambda b, j, i: (b, 0, j))
  return pl.pallas_call(
    _key_gradient_kernel,
    grid=(B, K // k, Q // q),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((1, q, X), lambda b, j, i: (b, i, 0)),
      keys_spec,
      values_spec,
      bias_spec,
      pl.BlockSpec((1, q, C), lambda b, j, i: (b, i, 0)),
      rows_spec,
      rows_spec,
      rows_spec,
    ],
    out_specs=[keys_spec, values_spec, bias_spec],
    out_shape=[
      jax.ShapeDtypeStruct(k_BKX.shape, k_BKX.dtype),
      jax.ShapeDtypeStruct(v_BKC.shape, v_BKC.dtype),
      jax.ShapeDtypeStruct(bias_BMK.shape, jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((k, M), jnp.float32),
      pltpu.VMEM((k, X), jnp.float32),
      pltpu.VMEM((k, C), jnp.float32),
      pltpu.VMEM((k, M), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="mos_attention_key_gradient",
  )(pi_BM, q_BQX, k_BKX, v_BKC, bias_BMK, dout_BQC, top_BMQ, share_BMQ, delta_BMQ)
