"""Mixture-of-softmaxes attention to a square window of a coarser map.

Shapes: B batch, H W rows and columns of the queries' map, h w those of the keys' map, M parts,
D channels of a part, C channels of a value; Y X rows and columns of tiles, q k the queries and keys
of one tile, N keys of a window.

The keys' map is cut into square tiles. All queries that lie on a tile meet all keys of the tile and
of a margin of half a window around it, in one dense product; a constant bias hides from each query
what lies outside its own window. That multiplies more than it must, but in matrices, with no gather,
and one key is loaded for many queries.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fpt_jax.ops.mos_attention import Keys, attend, attend_backward

# Side of a tile in queries that balances idle products in the margin against small matrices.
_TILE_QUERIES = 8


def local_mos_attention(
  q_BHWMD: jax.Array,
  k_BhwMD: jax.Array,
  v_BhwC: jax.Array,
  pi_BM: jax.Array,
  *,
  window: int = 5,
  similarity: Literal["dot", "euclidean"] = "dot",
  scale: float = 1.0,
  key_valid_Bhw: jax.Array | None = None,
  implementation: Literal["auto", "naive", "tiled"] = "auto",
) -> jax.Array:
  """Attends from each query to the window around its place (locality-constrained GT, paper 3.3).

  A query at row y of H looks at rows `y // ratio - window // 2` to `y // ratio + window // 2` of h,
  where `ratio = ceil(H / h)`; the same for columns. A position outside the map, or an invalid one,
  is a zero key with a zero value, which still takes its share of the softmax.

  Args:
    q_BHWMD: queries, float32 or bfloat16 (statistics are float32 in both).
    k_BhwMD: keys, of the queries' dtype.
    v_BhwC: values, of the queries' dtype.
    pi_BM: the weight of each part, floating.
    window: the odd side of the square, in positions of the keys' map.
    similarity: "dot" for `q.k`, "euclidean" for `-||q - k||^2`.
    scale: factor on the similarity.
    key_valid_Bhw: bool, the keys that lie on the image; all where None.
    implementation: "naive" gathers every window, "tiled" multiplies tiles; "auto" is "tiled".

  Returns:
    [B, H, W, C] of the values' dtype.

  Raises:
    ValueError: for shapes, dtypes or names that do not fit.
  """
  _check_arguments(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, window, similarity, key_valid_Bhw)
  if implementation not in ("auto", "naive", "tiled"):
    raise ValueError(f"implementation must be auto, naive or tiled, not {implementation!r}")
  H, W = q_BHWMD.shape[1:3]
  h, w = k_BhwMD.shape[1:3]
  ratio = (-(-H // h), -(-W // w))
  if key_valid_Bhw is not None:
    k_BhwMD = jnp.where(key_valid_Bhw[..., None, None], k_BhwMD, 0)
    v_BhwC = jnp.where(key_valid_Bhw[..., None], v_BhwC, 0)

  tile = 1 if implementation == "naive" else _tile_side(max(ratio), window, max(h, w))
  full_h, full_w = -(-h // tile) * tile, -(-w // tile) * tile
  margin = window // 2
  k_BhwMD = _pad_map(k_BhwMD, (margin, full_h - h + margin), (margin, full_w - w + margin))
  v_BhwC = _pad_map(v_BhwC, (margin, full_h - h + margin), (margin, full_w - w + margin))
  q_BHWMD = _pad_map(q_BHWMD, (0, full_h * ratio[0] - H), (0, full_w * ratio[1] - W))
  bias_BhwM = None
  if similarity == "euclidean":
    q_BHWMD, k_BhwMD, bias_BhwM = _euclidean_as_dot(q_BHWMD, k_BhwMD, scale)
    scale = 2 * scale
  q_BHWMD *= jnp.asarray(scale, q_BHWMD.dtype)
  pi_BM = pi_BM.astype(jnp.float32)
  if implementation == "naive":
    out_BHWC = _naive(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, ratio, window)
  else:
    out_BHWC = _tiled(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, _Tiling(tile, ratio, window))
  return out_BHWC[:, :H, :W]


def _check_arguments(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, window, similarity, key_valid_Bhw):
  shapes = f"q {q_BHWMD.shape}, k {k_BhwMD.shape}, v {v_BhwC.shape}, pi {pi_BM.shape}"
  if (q_BHWMD.ndim, k_BhwMD.ndim, v_BhwC.ndim, pi_BM.ndim) != (5, 5, 4, 2):
    raise ValueError(
      f"need q [B, H, W, M, D], k [B, h, w, M, D], v [B, h, w, C] and pi [B, M], got {shapes}"
    )
  B, H, W, M, D = q_BHWMD.shape
  h, w = k_BhwMD.shape[1:3]
  if (
    k_BhwMD.shape != (B, h, w, M, D)
    or v_BhwC.shape[:3] != (B, h, w)
    or pi_BM.shape != (B, M)
    or 0 in (*q_BHWMD.shape, *v_BhwC.shape)
  ):
    raise ValueError(f"batch, maps, parts or channels disagree or are empty: {shapes}")
  for fine, coarse in ((H, h), (W, w)):
    if -(-fine // -(-fine // coarse)) != coarse:
      raise ValueError(f"no integer ratio takes {H} x {W} queries to {h} x {w} keys")
  dtypes = {x.dtype for x in (q_BHWMD, k_BhwMD, v_BhwC)}
  if len(dtypes) > 1 or not all(jnp.issubdtype(d, jnp.floating) for d in (*dtypes, pi_BM.dtype)):
    raise ValueError(
      "q, k and v must share one floating dtype and pi be floating, got "
      f"{q_BHWMD.dtype}, {k_BhwMD.dtype}, {v_BhwC.dtype} and {pi_BM.dtype}"
    )
  if window < 1 or window % 2 == 0:
    raise ValueError(f"window must be odd and positive, not {window}")
  if similarity not in ("dot", "euclidean"):
    raise ValueError(f"similarity must be dot or euclidean, not {similarity!r}")
  if key_valid_Bhw is not None and (
    key_valid_Bhw.shape != (B, h, w) or key_valid_Bhw.dtype != jnp.bool_
  ):
    raise ValueError(
      f"key_valid must be bool {(B, h, w)}, got {key_valid_Bhw.dtype} {key_valid_Bhw.shape}"
    )


def _pad_map(x_Bhw, rows, columns):
  return jnp.pad(x_Bhw, [(0, 0), rows, columns] + [(0, 0)] * (x_Bhw.ndim - 3))


def _euclidean_as_dot(q_BHWMD, k_BhwMD, scale):
  """`-scale ||q - k||^2` as `2 scale q.k + bias`, up to a constant of each softmax's row.

  The origin moves to the mean key, where that loses the fewest digits; zero keys move along.
  """
  dtype = q_BHWMD.dtype
  mean_B11MD = jnp.mean(k_BhwMD.astype(jnp.float32), axis=(1, 2), keepdims=True)
  mean_B11MD = lax.stop_gradient(mean_B11MD)
  q_BHWMD = (q_BHWMD - mean_B11MD).astype(dtype)
  k_BhwMD = (k_BhwMD - mean_B11MD).astype(dtype)
  kk_BhwM = jnp.einsum("bhwmd,bhwmd->bhwm", k_BhwMD, k_BhwMD, preferred_element_type=jnp.float32)
  return q_BHWMD, k_BhwMD, -scale * kk_BhwM


def _naive(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, ratio, window):
  """The formula, with a copy of its window for every position: the oracle of the tiles."""
  f32 = jnp.float32
  B, H, W, M, D = q_BHWMD.shape
  h, w = H // ratio[0], W // ratio[1]

  def windows(x_Bhw):
    shifts = [x_Bhw[:, y : y + h, x : x + w] for y in range(window) for x in range(window)]
    return jnp.stack(shifts, axis=3)

  q_BhrwsMD = q_BHWMD.reshape(B, h, ratio[0], w, ratio[1], M, D)
  s_BhrwsMN = jnp.einsum(
    "bhrwsmd,bhwnmd->bhrwsmn", q_BhrwsMD, windows(k_BhwMD), preferred_element_type=f32
  )
  if bias_BhwM is not None:
    s_BhrwsMN += jnp.swapaxes(windows(bias_BhwM), 3, 4)[:, :, None, :, None]
  p_BhrwsMN = jax.nn.softmax(s_BhrwsMN, axis=-1)
  # A weight for each query, as in `mos_attention`: a short sum before the long one in its gradient.
  pi_BhrwsM = jnp.broadcast_to(pi_BM[:, None, None, None, None], p_BhrwsMN.shape[:-1])
  w_BhrwsN = jnp.einsum("bhrwsm,bhrwsmn->bhrwsn", pi_BhrwsM, p_BhrwsMN)
  out_BhrwsC = jnp.einsum(
    "bhrwsn,bhwnc->bhrwsc",
    w_BhrwsN.astype(v_BhwC.dtype),
    windows(v_BhwC),
    preferred_element_type=f32,
  )
  return out_BhrwsC.astype(v_BhwC.dtype).reshape(B, H, W, -1)


class _Tiling(NamedTuple):
  """How the maps are cut: the tile's side in keys, queries a key by axis, the window's side."""

  tile: int
  ratio: tuple[int, int]
  window: int


def _tile_side(ratio: int, window: int, longest: int) -> int:
  """Keys along a tile: no fewer than its margins, no more than the map."""
  return max(window - 1, min(-(-_TILE_QUERIES // ratio), longest), 1)


def _hidden(tiling: _Tiling) -> np.ndarray:
  """The bias [1, q, k] of a tile: 0 within a query's window, -inf outside."""
  tile, ratio, window = tiling
  keys = np.arange(tile + window - 1)

  def within(ratio):
    place = np.arange(tile * ratio) // ratio
    return (keys >= place[:, None]) & (keys < place[:, None] + window)

  both = within(ratio[0])[:, None, :, None] & within(ratio[1])[None, :, None, :]
  queries = tile * tile * ratio[0] * ratio[1]
  return np.where(both.reshape(1, queries, len(keys) ** 2), 0, -np.inf).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, tiling):
  return _tiled_forward(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, tiling)[0]


def _tiled_forward(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, tiling):
  maps = (k_BhwMD, v_BhwC, bias_BhwM)
  hidden_1qk = _hidden(tiling)

  def row_of_tiles(inputs):
    y, q_BXqMD = inputs
    keys, pi_TM = _tile_keys(_strip(maps, y, tiling), pi_BM, hidden_1qk, tiling)
    out_TqC, rows = attend(_merge(q_BXqMD), [keys], pi_TM)
    return _unmerge(out_TqC, q_BXqMD), rows

  q_YBXqMD = _cut_queries(q_BHWMD, tiling)
  out_YBXqC, rows = lax.map(row_of_tiles, (jnp.arange(len(q_YBXqMD)), q_YBXqMD))
  saved = (q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, rows)
  return _join_queries(out_YBXqC, q_BHWMD.shape, tiling), saved


def _tiled_backward(tiling, saved, dout_BHWC):
  q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, rows = saved
  maps = (k_BhwMD, v_BhwC, bias_BhwM)
  hidden_1qk = _hidden(tiling)

  def row_of_tiles(sums, inputs):
    y, q_BXqMD, dout_BXqC, rows = inputs
    strip = _strip(maps, y, tiling)
    keys, pi_TM = _tile_keys(strip, pi_BM, hidden_1qk, tiling)
    dq_TqMD, here, delta_TMq = attend_backward(
      _merge(q_BXqMD), _merge(dout_BXqC), rows, [keys], pi_TM, bias_BhwM is not None
    )
    sums = _add_strip(sums, _strip_gradient(here, strip, pi_TM, tiling), y, tiling)
    dpi_BM = jnp.sum(delta_TMq.reshape(*q_BXqMD.shape[:2], *delta_TMq.shape[1:]), axis=(1, 3))
    return sums, (_unmerge(dq_TqMD, q_BXqMD).astype(q_BXqMD.dtype), dpi_BM)

  q_YBXqMD = _cut_queries(q_BHWMD, tiling)
  dout_YBXqC = _cut_queries(dout_BHWC, tiling)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), maps)
  inputs = (jnp.arange(len(q_YBXqMD)), q_YBXqMD, dout_YBXqC, rows)
  (dk_BhwMD, dv_BhwC, dbias_BhwM), (dq_YBXqMD, dpi_YBM) = lax.scan(row_of_tiles, zeros, inputs)
  return (
    _join_queries(dq_YBXqMD, q_BHWMD.shape, tiling),
    dk_BhwMD.astype(k_BhwMD.dtype),
    dv_BhwC.astype(v_BhwC.dtype),
    jnp.sum(dpi_YBM, axis=0),
    dbias_BhwM,
  )


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _cut_queries(x_BHW, tiling):
  """[B, H, W, ...] -> [Y, B, X, q, ...]."""
  B, H, W, *rest = x_BHW.shape
  high, wide = tiling.tile * tiling.ratio[0], tiling.tile * tiling.ratio[1]
  x_BYaXb = x_BHW.reshape(B, H // high, high, W // wide, wide, *rest)
  return jnp.moveaxis(x_BYaXb, (1, 3), (0, 2)).reshape(H // high, B, W // wide, high * wide, *rest)


def _join_queries(x_YBXq, shape, tiling):
  """[Y, B, X, q, ...] -> [B, H, W, ...]."""
  B, H, W = shape[:3]
  high, wide = tiling.tile * tiling.ratio[0], tiling.tile * tiling.ratio[1]
  rest = x_YBXq.shape[4:]
  x_YBXab = x_YBXq.reshape(H // high, B, W // wide, high, wide, *rest)
  return jnp.moveaxis(x_YBXab, (0, 2), (1, 3)).reshape(B, H, W, *rest)


def _merge(x_BX):
  """The tiles of a row join the batch: T = B X."""
  return x_BX.reshape(-1, *x_BX.shape[2:])


def _unmerge(x_T, like_BX):
  return x_T.reshape(*like_BX.shape[:2], *x_T.shape[1:])


def _strip(maps, y, tiling):
  """The rows of the padded maps that row y of the tiles and its margins cover."""
  high = tiling.tile + tiling.window - 1
  return jax.tree.map(
    lambda x_Bhw: lax.dynamic_slice_in_dim(x_Bhw, y * tiling.tile, high, axis=1), maps
  )


def _add_strip(sums, strip, y, tiling):
  def add(sum_Bhw, x_Baw):
    old_Baw = lax.dynamic_slice_in_dim(sum_Bhw, y * tiling.tile, x_Baw.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(sum_Bhw, old_Baw + x_Baw, y * tiling.tile, axis=1)

  return jax.tree.map(add, sums, strip)


def _overlap(x_Baw, tiling):
  """Cuts a strip [B, a, w, ...] into tiles with margins [T, a * a, ...]."""
  B, high, wide, *rest = x_Baw.shape
  tile, margins = tiling.tile, tiling.window - 1
  X = (wide - margins) // tile
  own_BaXb = x_Baw[:, :, : X * tile].reshape(B, high, X, tile, *rest)
  next_BaXb = x_Baw[:, :, margins:].reshape(B, high, X, tile, *rest)[:, :, :, tile - margins :]
  tiles_BaXb = jnp.concatenate([own_BaXb, next_BaXb], axis=3)
  return jnp.moveaxis(tiles_BaXb, 2, 1).reshape(B * X, high * high, *rest)


def _tile_keys(strip, pi_BM, hidden_1qk, tiling) -> tuple[Keys, jax.Array]:
  """The keys of each tile of a strip as a batch of their own, and the batch's pi."""
  k_TkMD, v_TkC, bias_TkM = jax.tree.map(lambda x: _overlap(x, tiling), strip)
  parts = range(k_TkMD.shape[2])
  biases = [hidden_1qk if bias_TkM is None else hidden_1qk + bias_TkM[:, None, :, m] for m in parts]
  keys = Keys([k_TkMD[:, :, m] for m in parts], v_TkC, biases)
  return keys, jnp.repeat(pi_BM, v_TkC.shape[0] // pi_BM.shape[0], axis=0)


def _strip_gradient(here, strip, pi_TM, tiling):
  """What the tiles' keys have gathered, added up where their margins overlap."""
  dk_TMDk = jnp.stack([dk for (dk,) in here.dk], axis=1) * pi_TM[:, :, None, None]
  dk_TkMD = dk_TMDk.transpose(0, 3, 1, 2)
  dv_TkC = here.dv[0].transpose(0, 2, 1)
  dbias_TkM = None
  if here.dbias:
    dbias_TkM = (jnp.stack([db for (db,) in here.dbias], axis=1) * pi_TM[:, :, None]).swapaxes(1, 2)

  def add_up(tiles_Tk, strip_Baw):
    like = jax.ShapeDtypeStruct(strip_Baw.shape, tiles_Tk.dtype)
    return jax.linear_transpose(lambda x: _overlap(x, tiling), like)(tiles_Tk)[0]

  return jax.tree.map(add_up, (dk_TkMD, dv_TkC, dbias_TkM), strip)
