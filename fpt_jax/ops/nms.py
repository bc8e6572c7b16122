"""Non-maximum suppression with static shapes: greedy, by score, a strict threshold.

Shape suffixes: N boxes, T boxes of a tile, 4 coordinates. Everything can be vmapped.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Implementation = Literal["auto", "sequential", "tiled"]

_TILE = 256


def nms(
  boxes_N4: jax.Array,
  scores_N: jax.Array,
  iou_threshold: float,
  max_outputs: int,
  *,
  valid_N: jax.Array | None = None,
  implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Keeps the best box of every group of overlapping ones.

  A box falls if its IoU with a kept box of higher score is greater than the threshold; of equal
  scores the lower index comes first.

  Args:
    boxes_N4: [N, 4] float, pixels.
    scores_N: [N] float.
    iou_threshold: in [0, 1], static.
    max_outputs: number of indices to return, static; may exceed N.
    valid_N: [N] bool; other boxes neither appear nor suppress. None: all are valid.
    implementation: "sequential" goes box by box (CPU), "tiled" by tiles of 256 boxes (TPU);
      "auto" takes the one for the platform. Both keep the same set.

  Returns:
    indices [max_outputs] int32 into the boxes in order of score (0 where not valid), and
    valid [max_outputs] bool.

  Raises:
    ValueError: a shape, dtype or the implementation is not as said.
  """
  return _nms(boxes_N4, scores_N, None, iou_threshold, max_outputs, valid_N, implementation)


def batched_nms(
  boxes_N4: jax.Array,
  scores_N: jax.Array,
  classes_N: jax.Array,
  iou_threshold: float,
  max_outputs: int,
  *,
  valid_N: jax.Array | None = None,
  implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
  """`nms` within each class (or pyramid level), all classes ranked together.

  Boxes are compared as they are, only if of one class: no offsets are added to coordinates,
  so no overlap is rounded.

  Args:
    boxes_N4: [N, 4] float, pixels.
    scores_N: [N] float.
    classes_N: [N] integers.
    iou_threshold: as for `nms`.
    max_outputs: as for `nms`, over all classes together.
    valid_N: as for `nms`.
    implementation: as for `nms`.

  Returns:
    As `nms`.

  Raises:
    ValueError: a shape, dtype or the implementation is not as said.
  """
  if classes_N.shape != scores_N.shape or not jnp.issubdtype(classes_N.dtype, jnp.integer):
    raise ValueError(
      f"classes_N must be integers {scores_N.shape}, got {classes_N.dtype} {classes_N.shape}"
    )
  return _nms(boxes_N4, scores_N, classes_N, iou_threshold, max_outputs, valid_N, implementation)


def _nms(boxes_N4, scores_N, classes_N, iou_threshold, max_outputs, valid_N, implementation):
  if boxes_N4.ndim != 2 or boxes_N4.shape[1] != 4:
    raise ValueError(f"boxes_N4 must be [N, 4], got {boxes_N4.shape}")
  if scores_N.shape != boxes_N4.shape[:1]:
    raise ValueError(f"scores_N must be [{len(boxes_N4)}], got {scores_N.shape}")
  if valid_N is not None and (valid_N.shape != scores_N.shape or valid_N.dtype != jnp.bool_):
    raise ValueError(f"valid_N must be bool {scores_N.shape}, got {valid_N.dtype} {valid_N.shape}")
  if max_outputs < 1:
    raise ValueError(f"max_outputs must be positive, got {max_outputs}")

  num_boxes = len(scores_N)
  if num_boxes == 0:
    return jnp.zeros(max_outputs, jnp.int32), jnp.zeros(max_outputs, bool)
  boxes_N4 = jax.lax.stop_gradient(jnp.asarray(boxes_N4, jnp.float32))
  scores_N = jax.lax.stop_gradient(jnp.asarray(scores_N))
  classes_N = None if classes_N is None else jnp.asarray(classes_N)
  valid_N = jnp.ones(num_boxes, bool) if valid_N is None else jnp.asarray(valid_N)
  # Two stable keys: validity first, so that a valid score of -inf still ranks before padding.
  order_N = jnp.lexsort((-scores_N, ~valid_N)).astype(jnp.int32)

  sorted_classes_N = None if classes_N is None else classes_N[order_N]
  arguments = (boxes_N4[order_N], sorted_classes_N, valid_N[order_N])
  static = (_float32_at_most(iou_threshold), max_outputs)
  match implementation:
    case "auto":
      keep_N = jax.lax.platform_dependent(
        *arguments,
        cpu=lambda *args: _sequential(*args, *static),
        default=lambda *args: _tiled(*args, *static),
      )
    case "sequential":
      keep_N = _sequential(*arguments, *static)
    case "tiled":
      keep_N = _tiled(*arguments, *static)
    case _:
      raise ValueError(f"implementation must be auto, sequential or tiled, got {implementation!r}")

  # Kept boxes to the front, in order of score.
  front = jnp.argsort(~keep_N, stable=True)[:max_outputs]
  num_padding = max_outputs - len(front)
  kept = jnp.pad(keep_N[front], (0, num_padding))
  return jnp.where(kept, jnp.pad(order_N[front], (0, num_padding)), 0), kept


def _float32_at_most(threshold: float) -> np.float32:
  """The largest float32 <= threshold: `iou > it` says what comparing in float64 would say."""
  rounded = np.float32(threshold)
  return rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf))


def _overlaps(a_4, area_a, b_4, area_b, threshold):
  """Whether the IoU exceeds the threshold, for tuples of four broadcastable columns."""
  (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a_4, b_4
  width = jnp.maximum(jnp.minimum(ax1, bx1) - jnp.maximum(ax0, bx0), 0)
  height = jnp.maximum(jnp.minimum(ay1, by1) - jnp.maximum(ay0, by0), 0)
  intersection = width * height
  # Two empty boxes have no union: 0 / tiny overlaps nothing.
  union = jnp.maximum(area_a + area_b - intersection, np.finfo(np.float32).tiny)
  return intersection / union > threshold


def _sequential(boxes_N4, classes_N, alive_N, threshold, max_outputs):
  """Each box that is alive when its turn comes strikes out the later ones it overlaps."""
  num_boxes = len(alive_N)
  columns = tuple(boxes_N4.T)
  areas_N = (columns[2] - columns[0]) * (columns[3] - columns[1])
  rank_N = jnp.arange(num_boxes)

  def unfinished(state):
    i, _, num_kept = state
    return (i < num_boxes) & (num_kept < max_outputs)

  def turn(state):
    i, alive_N, num_kept = state
    struck_N = _overlaps([c[i] for c in columns], areas_N[i], columns, areas_N, threshold)
    if classes_N is not None:
      struck_N &= classes_N == classes_N[i]
    struck_N &= alive_N[i] & (rank_N > i)
    return i + 1, alive_N & ~struck_N, num_kept + alive_N[i]

  # Boxes beyond the last turn were not all compared; the caller takes max_outputs from the front.
  return jax.lax.while_loop(unfinished, turn, (0, alive_N, 0))[1]


def _tiled(boxes_N4, classes_N, alive_N, threshold, max_outputs):
  """Settles a tile of boxes at once, then strikes out what the tile's survivors overlap."""
  num_boxes = len(alive_N)
  tile = min(_TILE, num_boxes)
  padding = -num_boxes % tile
  boxes_N4 = jnp.pad(boxes_N4, ((0, padding), (0, 0)))
  alive_N = jnp.pad(alive_N, (0, padding))
  classes_N = None if classes_N is None else jnp.pad(classes_N, (0, padding))
  columns = tuple(boxes_N4.T)
  areas_N = (columns[2] - columns[0]) * (columns[3] - columns[1])
  rank_N = jnp.arange(num_boxes + padding)
  num_tiles = (num_boxes + padding) // tile

  def unfinished(state):
    t, _, num_kept = state
    return (t < num_tiles) & (num_kept < max_outputs)

  def turn(state):
    t, alive_N, num_kept = state

    def of_tile(x_N):
      return jax.lax.dynamic_slice_in_dim(x_N, t * tile, tile)

    strikes_TN = _overlaps(
      [of_tile(c)[:, None] for c in columns],
      of_tile(areas_N)[:, None],
      [c[None] for c in columns],
      areas_N[None],
      threshold,
    )
    if classes_N is not None:
      strikes_TN &= of_tile(classes_N)[:, None] == classes_N[None]
    strikes_TN &= rank_N[None] > of_tile(rank_N)[:, None]
    strikes_TT = jax.lax.dynamic_slice_in_dim(strikes_TN, t * tile, tile, axis=1)
    candidates_T = of_tile(alive_N)

    # The greedy answer is the one fixed point of this step: after n of them the first n boxes
    # of the tile are settled, and mostly a handful are enough.
    def step(state):
      _, keep_T = state
      return keep_T, candidates_T & ~jnp.any(strikes_TT & keep_T[:, None], axis=0)

    _, keep_T = jax.lax.while_loop(
      lambda state: jnp.any(state[0] != state[1]),
      step,
      step((candidates_T, candidates_T)),
    )
    alive_N = alive_N & ~jnp.any(strikes_TN & keep_T[:, None], axis=0)
    return t + 1, alive_N, num_kept + jnp.sum(keep_T)

  return jax.lax.while_loop(unfinished, turn, (0, alive_N, 0))[1][:num_boxes]
