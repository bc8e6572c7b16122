"""Mixture-of-softmaxes attention within a square window of a coarser map.

Shapes: B batch, H W rows and columns of the queries' map, h w those of the keys' map, M parts,
D channels of a part, C channels of a value; Y X rows and columns of tiles, q k the queries and keys
of one tile, N keys of a window.

The keys' map is divided into square tiles. One dense product multiplies all queries on a tile with all
keys of the tile and of a margin of half a window around it, and a constant bias masks the keys outside
each query's window. This computes more products than necessary, but as matrix products without gathers,
and each key is loaded once for many queries.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fpt_jax.ops import target
from fpt_jax.ops.attention_blocks import Keys, attend, attend_backward

Implementation = Literal["auto", "naive", "tiled"]
Outside = Literal["zero", "masked"]

# Side of a tile in queries: larger tiles compute more masked products, smaller ones smaller matrices.
_TILE_QUERIES = 8
# Score of a masked key: finite, so that a window without a valid key gives zeros instead of NaN.
MASKED = -1e30


@jax.named_scope("attention")
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
  outside: Outside = "zero",
  implementation: Implementation = "auto",
) -> jax.Array:
  """Attends from each query to the window around its position (locality-constrained GT, paper, 3.3).

  A query at row y of H attends to rows `y // ratio - window // 2` to `y // ratio + window // 2` of h,
  with `ratio = ceil(H / h)`; the same holds for columns. With `outside="zero"`, a position outside the
  map, or an invalid one, counts as a zero key with a zero value, which takes part in the softmax, as in the
  paper. With `outside="masked"`, it takes no part; the result of a window without a valid key is zero.

  Args:
    q_BHWMD: [B, H, W, M, D] queries, float32 or bfloat16 (statistics are float32 in both cases).
    k_BhwMD: [B, h, w, M, D] keys, of the queries' dtype.
    v_BhwC: [B, h, w, C] values, of the queries' dtype.
    pi_BM: [B, M] weight of each part, float.
    window: side of the square, odd, in positions of the keys' map.
    similarity: "dot" for `q.k`, "euclidean" for `-||q - k||^2`.
    scale: factor of the similarity.
    key_valid_Bhw: [B, h, w] bool, the keys on the image; None for all.
    outside: "zero" or "masked", for positions outside the map and invalid ones.
    implementation: "naive" gathers every window, "tiled" multiplies tiles; "auto" is "tiled".

  Returns:
    [B, H, W, C] of the values' dtype.

  Raises:
    ValueError: shapes, dtypes or names do not fit.
  """
  _check_arguments(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, window, similarity, key_valid_Bhw)
  if implementation not in ("auto", "naive", "tiled"):
    raise ValueError(f"implementation must be auto, naive or tiled, got {implementation!r}")
  if outside not in get_args(Outside):
    raise ValueError(f"outside must be zero or masked, got {outside!r}")
  if target.is_written_out():
    implementation = "naive"
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
  if outside == "masked":
    valid_Bhw = jnp.ones((1, h, w), bool) if key_valid_Bhw is None else key_valid_Bhw
    rows, columns = (margin, full_h - h + margin), (margin, full_w - w + margin)
    hidden_Bhw = jnp.where(_pad_map(valid_Bhw, rows, columns), 0, MASKED)
    hidden_BhwM = jnp.broadcast_to(hidden_Bhw[..., None], k_BhwMD.shape[:4])
    bias_BhwM = hidden_BhwM if bias_BhwM is None else bias_BhwM + hidden_BhwM
  q_BHWMD *= jnp.asarray(scale, q_BHWMD.dtype)
  pi_BM = pi_BM.astype(jnp.float32)
  if implementation == "naive":
    out_BHWC = _naive(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, ratio, window)
  else:
    # With the parts concatenated in the channels, a TPU pads fewer lanes.
    q_BHWX, k_BhwX = (x.reshape(*x.shape[:3], -1) for x in (q_BHWMD, k_BhwMD))
    out_BHWC = _tiled(q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, _Tiling(tile, ratio, window))
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
      raise ValueError(f"{H} x {W} queries are not a (rounded) multiple of {h} x {w} keys")
  dtypes = {x.dtype for x in (q_BHWMD, k_BhwMD, v_BhwC)}
  if len(dtypes) > 1 or not all(jnp.issubdtype(d, jnp.floating) for d in (*dtypes, pi_BM.dtype)):
    raise ValueError(
      "q, k and v must share one floating dtype and pi be floating, got "
      f"{q_BHWMD.dtype}, {k_BhwMD.dtype}, {v_BhwC.dtype} and {pi_BM.dtype}"
    )
  if window < 1 or window % 2 == 0:
    raise ValueError(f"window must be odd and positive, got {window}")
  if similarity not in ("dot", "euclidean"):
    raise ValueError(f"similarity must be dot or euclidean, got {similarity!r}")
  if key_valid_Bhw is not None and (
    key_valid_Bhw.shape != (B, h, w) or key_valid_Bhw.dtype != jnp.bool_
  ):
    raise ValueError(
      f"key_valid must be bool {(B, h, w)}, got {key_valid_Bhw.dtype} {key_valid_Bhw.shape}"
    )


def _pad_map(x_Bhw, rows, columns):
  return jnp.pad(x_Bhw, [(0, 0), rows, columns] + [(0, 0)] * (x_Bhw.ndim - 3))


def _euclidean_as_dot(q_BHWMD, k_BhwMD, scale):
  """Writes `-scale ||q - k||^2` as `2 scale q.k + bias`, up to a constant per row of the softmax.

  The origin is moved to the mean key, which loses the fewest digits; zero keys are moved as well.
  """
  dtype = q_BHWMD.dtype
  mean_B11MD = jnp.mean(k_BhwMD.astype(jnp.float32), axis=(1, 2), keepdims=True)
  mean_B11MD = lax.stop_gradient(mean_B11MD)
  q_BHWMD = (q_BHWMD - mean_B11MD).astype(dtype)
  k_BhwMD = (k_BhwMD - mean_B11MD).astype(dtype)
  kk_BhwM = jnp.einsum("bhwmd,bhwmd->bhwm", k_BhwMD, k_BhwMD, preferred_element_type=jnp.float32)
  return q_BHWMD, k_BhwMD, -scale * kk_BhwM


def _naive(q_BHWMD, k_BhwMD, v_BhwC, pi_BM, bias_BhwM, ratio, window):
  """The literal formula, with a copy of the window for every position: the reference for the tiles."""
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
  # One weight per query, as in `mos_attention._naive`: its gradient is summed row by row first.
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
  """The division of the maps into tiles.

  Attributes:
    tile: side of a tile, keys.
    ratio: queries per key, along rows and columns.
    window: side of the window, keys.
  """

  tile: int
  ratio: tuple[int, int]
  window: int


def _tile_side(ratio: int, window: int, longest: int) -> int:
  """Returns the side of a tile in keys: at least its margins, at most the map."""
  return max(window - 1, min(-(-_TILE_QUERIES // ratio), longest), 1)


def _hidden(tiling: _Tiling) -> np.ndarray:
  """[1, q, k]: the bias of a tile, 0 within a query's window and -inf outside."""
  tile, ratio, window = tiling
  keys = np.arange(tile + window - 1)

  def within(ratio):
    place = np.arange(tile * ratio) // ratio
    return (keys >= place[:, None]) & (keys < place[:, None] + window)

  both = within(ratio[0])[:, None, :, None] & within(ratio[1])[None, :, None, :]
  queries = tile * tile * ratio[0] * ratio[1]
  return np.where(both.reshape(1, queries, len(keys) ** 2), 0, -np.inf).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, tiling):
  return _tiled_forward(q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, tiling)[0]


def _tiled_forward(q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, tiling):
  maps = _Maps(k_BhwX, v_BhwC, bias_BhwM)
  hidden_1qk = _hidden(tiling)

  def row_of_tiles(inputs):
    y, q_BXqX = inputs
    keys, pi_TM = _tile_keys(_strip(maps, y, tiling), pi_BM, hidden_1qk, tiling)
    out_TqC, rows = attend(_merge(q_BXqX, pi_BM), [keys], pi_TM)
    return out_TqC.reshape(*q_BXqX.shape[:3], -1), rows

  q_YBXqX = _cut_queries(q_BHWX, tiling)
  out_YBXqC, rows = lax.map(row_of_tiles, (jnp.arange(len(q_YBXqX)), q_YBXqX))
  saved = (q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, rows)
  return _join_queries(out_YBXqC, q_BHWX.shape, tiling), saved


def _tiled_backward(tiling, saved, dout_BHWC):
  q_BHWX, k_BhwX, v_BhwC, pi_BM, bias_BhwM, rows = saved
  maps = _Maps(k_BhwX, v_BhwC, bias_BhwM)
  hidden_1qk = _hidden(tiling)
  tile, margins = tiling.tile, tiling.window - 1

  def row_of_tiles(above, inputs):
    y, q_BXqX, dout_BXqC, rows = inputs
    strip = _strip(maps, y, tiling)
    keys, pi_TM = _tile_keys(strip, pi_BM, hidden_1qk, tiling)
    dout_TqC = dout_BXqC.reshape(-1, *dout_BXqC.shape[2:])
    dq_TqMD, here, delta_TMq = attend_backward(
      _merge(q_BXqX, pi_BM), dout_TqC, rows, [keys], pi_TM, bias_BhwM is not None
    )
    sums = _strip_gradient(here, strip, pi_TM, tiling)
    # The sums of the tiles above complete the first rows; the last rows are completed by the tiles below.
    sums = jax.tree.map(lambda s, a: s.at[:, :margins].add(a), sums, above)
    done = jax.tree.map(lambda s, x: s[:, :tile].astype(x.dtype), sums, maps)
    below = jax.tree.map(lambda s: s[:, tile:], sums)
    dpi_BM = jnp.sum(delta_TMq.reshape(*q_BXqX.shape[:2], *delta_TMq.shape[1:]), axis=(1, 3))
    return below, (dq_TqMD.astype(q_BXqX.dtype).reshape(q_BXqX.shape), done, dpi_BM)

  q_YBXqX = _cut_queries(q_BHWX, tiling)
  inputs = (jnp.arange(len(q_YBXqX)), q_YBXqX, _cut_queries(dout_BHWC, tiling), rows)
  above = jax.tree.map(lambda x: jnp.zeros_like(x[:, :margins], jnp.float32), maps)
  last, (dq_YBXqX, done, dpi_YBM) = lax.scan(row_of_tiles, above, inputs)

  def join_strips(done_YBaw, last_Bmw):
    done_BYaw = jnp.moveaxis(done_YBaw, 0, 1)
    done_Bhw = done_BYaw.reshape(done_BYaw.shape[0], -1, *done_BYaw.shape[3:])
    return jnp.concatenate([done_Bhw, last_Bmw.astype(done_Bhw.dtype)], axis=1)

  dmaps = jax.tree.map(join_strips, done, last)
  dq_BHWX = _join_queries(dq_YBXqX, q_BHWX.shape, tiling)
  return dq_BHWX, dmaps.k_BhwX, dmaps.v_BhwC, jnp.sum(dpi_YBM, axis=0), dmaps.bias_BhwM


_tiled.defvjp(_tiled_forward, _tiled_backward)


class _Maps(NamedTuple):
  """The padded maps of keys, values and biases, or strips of them, or their gradients."""

  k_BhwX: jax.Array
  v_BhwC: jax.Array
  bias_BhwM: jax.Array | None


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


def _merge(q_BXqX, pi_BM):
  """Merges the tiles of a row into the batch, T = B X, and separates the parts."""
  *_, q, X = q_BXqX.shape
  M = pi_BM.shape[1]
  return q_BXqX.reshape(-1, q, M, X // M)


def _strip(maps, y, tiling):
  """Returns the rows of the padded maps that row y of the tiles and its margins cover."""
  high = tiling.tile + tiling.window - 1
  return jax.tree.map(
    lambda x_Bhw: lax.dynamic_slice_in_dim(x_Bhw, y * tiling.tile, high, axis=1), maps
  )


def _overlap(x_Baw, tiling):
  """Divides a strip [B, a, w, ...] into tiles with margins [T, a * a, ...]."""
  B, high, wide, *rest = x_Baw.shape
  tile, margins = tiling.tile, tiling.window - 1
  X = (wide - margins) // tile
  own_BaXb = x_Baw[:, :, : X * tile].reshape(B, high, X, tile, *rest)
  next_BaXb = x_Baw[:, :, margins:].reshape(B, high, X, tile, *rest)[:, :, :, tile - margins :]
  tiles_BaXb = jnp.concatenate([own_BaXb, next_BaXb], axis=3)
  return jnp.moveaxis(tiles_BaXb, 2, 1).reshape(B * X, high * high, *rest)


def _tile_keys(strip, pi_BM, hidden_1qk, tiling) -> tuple[Keys, jax.Array]:
  """Returns the keys of the tiles of a strip, with the tiles as a batch, and pi of each tile."""
  k_TkX, v_TkC, bias_TkM = jax.tree.map(lambda x: _overlap(x, tiling), strip)
  M = pi_BM.shape[1]
  biases = [
    hidden_1qk if bias_TkM is None else hidden_1qk + bias_TkM[:, None, :, m] for m in range(M)
  ]
  keys = Keys(jnp.split(k_TkX, M, axis=2), v_TkC, biases)
  return keys, jnp.repeat(pi_BM, v_TkC.shape[0] // pi_BM.shape[0], axis=0)


def _strip_gradient(here, strip, pi_TM, tiling) -> _Maps:
  """Returns the gradients of a strip: those of its tiles, summed where their margins overlap."""
  dk_TXk = jnp.concatenate(
    [pi_TM[:, m, None, None] * dk for m, (dk,) in enumerate(here.dk)], axis=1
  )
  dbias_TMk = None
  if here.dbias:
    dbias_TMk = pi_TM[:, :, None] * jnp.stack([dbias for (dbias,) in here.dbias], axis=1)

  def add_up(tiles_Txk, strip_Baw):
    like = jax.ShapeDtypeStruct(strip_Baw.shape, jnp.float32)
    return jax.linear_transpose(lambda x: _overlap(x, tiling), like)(tiles_Txk.swapaxes(1, 2))[0]

  return jax.tree.map(add_up, _Maps(dk_TXk, here.dv[0], dbias_TMk), strip)
