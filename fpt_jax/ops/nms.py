"""Non-maximum suppression with static shapes: greedy, in order of score, with a strict threshold.

Shape suffixes: N boxes, T boxes of a tile, 4 coordinates. All functions can be vmapped.
"""

import functools
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
  """Keeps the boxes that no kept box of higher score suppresses.

  A box is suppressed if its IoU with a kept box of higher score exceeds the threshold. Among equal
  scores, the lower index comes first.

  Args:
    boxes_N4: [N, 4] float, pixels.
    scores_N: [N] float.
    iou_threshold: IoU in [0, 1], static.
    max_outputs: number of indices to return, static; may exceed N.
    valid_N: [N] bool; invalid boxes are neither kept nor suppress others. None for all valid.
    implementation: "sequential" processes one box at a time (CPU), "tiled" tiles of 256 boxes (TPU);
      "auto" chooses by platform. Both keep the same boxes.

  Returns:
    indices [max_outputs] int32 into the boxes in order of score (0 where not valid), and
    valid [max_outputs] bool.

  Raises:
    ValueError: a shape, a dtype or the implementation is not as described.
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
  """Applies `nms` within each class (or pyramid level), with all classes ranked together.

  Boxes of different classes are not compared. No offsets are added to coordinates, so overlaps are not
  rounded.

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
    ValueError: a shape, a dtype or the implementation is not as described.
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
  # Two stable keys, validity first, so that a valid score of -inf ranks before padding.
  order_N = jnp.lexsort((-scores_N, ~valid_N)).astype(jnp.int32)

  sorted_classes_N = None if classes_N is None else classes_N[order_N]
  arguments = (boxes_N4[order_N], sorted_classes_N, valid_N[order_N])
  threshold = _float32_at_most(iou_threshold)
  sequential = functools.partial(_sequential, threshold=threshold, max_outputs=max_outputs)
  tiled = functools.partial(_tiled, threshold=threshold, max_outputs=max_outputs)
  match implementation:
    case "auto":
      keep_N = jax.lax.platform_dependent(*arguments, cpu=sequential, default=tiled)
    case "sequential":
      keep_N = sequential(*arguments)
    case "tiled":
      keep_N = tiled(*arguments)
    case _:
      raise ValueError(f"implementation must be auto, sequential or tiled, got {implementation!r}")

  # Move the kept boxes to the front, in order of score.
  front = jnp.argsort(~keep_N, stable=True)[:max_outputs]
  num_padding = max_outputs - len(front)
  kept = jnp.pad(keep_N[front], (0, num_padding))
  return jnp.where(kept, jnp.pad(order_N[front], (0, num_padding)), 0), kept


def _float32_at_most(threshold: float) -> np.float32:
  """Returns the largest float32 <= threshold: comparing with it equals a comparison in float64."""
  rounded = np.float32(threshold)
  return rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf))


def _overlaps(a_4, area_a, b_4, area_b, threshold):
  """Returns whether the IoU exceeds the threshold, for tuples of four broadcastable columns."""
  (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a_4, b_4
  width = jnp.maximum(jnp.minimum(ax1, bx1) - jnp.maximum(ax0, bx0), 0)
  height = jnp.maximum(jnp.minimum(ay1, by1) - jnp.maximum(ay0, by0), 0)
  intersection = width * height
  # The union of two empty boxes is empty; 0 / tiny never exceeds the threshold.
  union = jnp.maximum(area_a + area_b - intersection, np.finfo(np.float32).tiny)
  return intersection / union > threshold


def _sequential(boxes_N4, classes_N, alive_N, threshold, max_outputs):
  """Lets each box that is still alive suppress the later boxes that it overlaps, in order of score."""
  num_boxes = len(alive_N)
  columns = tuple(boxes_N4.T)
  areas_N = (columns[2] - columns[0]) * (columns[3] - columns[1])
  rank_N = jnp.arange(num_boxes)

  def unfinished(state):
    i, _, num_kept = state
    return (i < num_boxes) & (num_kept < max_outputs)

  def iteration(state):
    i, alive_N, num_kept = state
    suppressed_N = _overlaps([c[i] for c in columns], areas_N[i], columns, areas_N, threshold)
    if classes_N is not None:
      suppressed_N &= classes_N == classes_N[i]
    suppressed_N &= alive_N[i] & (rank_N > i)
    return i + 1, alive_N & ~suppressed_N, num_kept + alive_N[i]

  # Boxes after the last iteration were not all compared; the caller takes max_outputs from the front.
  return jax.lax.while_loop(unfinished, iteration, (0, alive_N, 0))[1]


def _tiled(boxes_N4, classes_N, alive_N, threshold, max_outputs):
  """Decides on the boxes of one tile, then suppresses the later boxes that the kept ones overlap."""
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

  def iteration(state):
    t, alive_N, num_kept = state

    def of_tile(x_N):
      return jax.lax.dynamic_slice_in_dim(x_N, t * tile, tile)

    overlaps_TN = _overlaps(
      [of_tile(c)[:, None] for c in columns],
      of_tile(areas_N)[:, None],
      [c[None] for c in columns],
      areas_N[None],
      threshold,
    )
    if classes_N is not None:
      overlaps_TN &= of_tile(classes_N)[:, None] == classes_N[None]
    overlaps_TN &= rank_N[None] > of_tile(rank_N)[:, None]
    overlaps_TT = jax.lax.dynamic_slice_in_dim(overlaps_TN, t * tile, tile, axis=1)
    candidates_T = of_tile(alive_N)

    # The greedy result is the only fixed point of this step: after n steps the first n boxes of the
    # tile are final, and usually a handful of steps is enough.
    def step(state):
      _, keep_T = state
      return keep_T, candidates_T & ~jnp.any(overlaps_TT & keep_T[:, None], axis=0)

    _, keep_T = jax.lax.while_loop(
      lambda state: jnp.any(state[0] != state[1]),
      step,
      step((candidates_T, candidates_T)),
    )
    alive_N = alive_N & ~jnp.any(overlaps_TN & keep_T[:, None], axis=0)
    return t + 1, alive_N, num_kept + jnp.sum(keep_T)

  return jax.lax.while_loop(unfinished, iteration, (0, alive_N, 0))[1][:num_boxes]
