"""Matching of anchors and proposals with ground truth, and their sampling for training.

Shape suffixes: G ground truths, N anchors or proposals, S samples, K blocks of B boxes, W words of 32 bits.
All functions can be vmapped over images.
"""

import jax
import jax.numpy as jnp

from fpt_jax.ops.boxes import iou_of_columns

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1


def match(
  iou_GN: jax.Array, gt_valid_G: jax.Array, fg_threshold: float, bg_threshold: float
) -> tuple[jax.Array, jax.Array]:
  """Assigns each box to the ground truth that it overlaps most, and labels it.

  Args:
    iou_GN: [G, N] float IoU of every ground truth with every box, G > 0.
    gt_valid_G: [G] bool; invalid ground truths match nothing.
    fg_threshold: smallest IoU of foreground.
    bg_threshold: IoU below which a box is background; between the two thresholds it is ignored.

  Returns:
    matched_gt [N] int32 (the lowest index if tied; meaningful for foreground) and
    label [N] int32: 1 foreground, 0 background, -1 ignored. Without a valid ground truth, all boxes are
    background.

  Raises:
    ValueError: a shape or dtype is not as described, or bg_threshold > fg_threshold.

  Source: Ren et al., Faster R-CNN, section 3.1.2; ties as in torchvision.
  """
  if iou_GN.ndim != 2 or len(iou_GN) == 0:
    raise ValueError(f"iou_GN must be [G, N] with G > 0, got {iou_GN.shape}")
  _check(len(iou_GN), gt_valid_G, fg_threshold, bg_threshold)
  iou_GN = jnp.where(gt_valid_G[:, None], iou_GN, -1.0)
  label_N = _labels(jnp.max(iou_GN, axis=0), fg_threshold, bg_threshold)
  return jnp.argmax(iou_GN, axis=0).astype(jnp.int32), label_N


def match_anchors(
  gt_boxes_G4: jax.Array,
  gt_valid_G: jax.Array,
  anchors_4N: jax.Array,
  fg_threshold: float,
  bg_threshold: float,
  *,
  block: int = 16384,
) -> tuple[jax.Array, jax.Array]:
  """Assigns each anchor as `match`, so that every ground truth has one, without an array [G, N].

  The anchors that overlap a ground truth most (all of them, if tied) are foreground at any IoU. Such an
  anchor is still assigned to the ground truth that it overlaps most. A ground truth that overlaps no anchor
  has none.

  Args:
    gt_boxes_G4: [G, 4] float32 ground truths, pixels, G > 0.
    gt_valid_G, fg_threshold, bg_threshold: as for `match`.
    anchors_4N: [4, N] float32, x0, y0, x1 and y1 of the anchors, pixels.
    block: number of anchors whose IoU is computed at a time.

  Returns:
    As `match`.

  Raises:
    ValueError: as `match`.

  Source: Ren et al., Faster R-CNN, section 3.1.2; ties as in torchvision.
  """
  if gt_boxes_G4.ndim != 2 or len(gt_boxes_G4) == 0:
    raise ValueError(f"gt_boxes_G4 must be [G, 4] with G > 0, got {gt_boxes_G4.shape}")
  _check(len(gt_boxes_G4), gt_valid_G, fg_threshold, bg_threshold)
  count = anchors_4N.shape[1]
  block = min(block, count)
  blocks = -(-count // block)
  padded_4N = jnp.pad(anchors_4N, ((0, 0), (0, blocks * block - count)))

  def best_of_block(anchors_4B: jax.Array):
    iou_GB = iou_of_columns(gt_boxes_G4.T, anchors_4B)
    # The barrier keeps one array: if two fusions computed the IoU separately, its last bit could differ,
    # and the comparison with its maximum could fail.
    iou_GB = jax.lax.optimization_barrier(jnp.where(gt_valid_G[:, None], iou_GB, -1.0))
    best_G = jnp.max(iou_GB, axis=1)
    return {
      "label_B": _labels(jnp.max(iou_GB, axis=0), fg_threshold, bg_threshold),
      "matched_B": jnp.argmax(iou_GB, axis=0).astype(jnp.int32),
      "best_G": best_G,
      "is_best_WB": _packed((iou_GB == best_G[:, None]) & (best_G > 0)[:, None]),
    }

  found = jax.lax.map(best_of_block, jnp.moveaxis(padded_4N.reshape(4, blocks, block), 1, 0))
  best_KG = found["best_G"]
  is_best_KG = best_KG == jnp.max(best_KG, axis=0, keepdims=True)
  is_best_KWB = found["is_best_WB"] & _packed(is_best_KG.T).T[:, :, None]
  label_KB = jnp.where(jnp.any(is_best_KWB > 0, axis=1), FOREGROUND, found["label_B"])
  return found["matched_B"].reshape(-1)[:count], label_KB.reshape(-1)[:count]


def _check(count: int, gt_valid_G: jax.Array, fg_threshold: float, bg_threshold: float) -> None:
  if gt_valid_G.shape != (count,) or gt_valid_G.dtype != jnp.bool_:
    raise ValueError(
      f"gt_valid_G must be bool [{count}], got {gt_valid_G.dtype} {gt_valid_G.shape}"
    )
  if bg_threshold > fg_threshold:
    raise ValueError(f"bg_threshold {bg_threshold} exceeds fg_threshold {fg_threshold}")


def _labels(best_N: jax.Array, fg_threshold: float, bg_threshold: float) -> jax.Array:
  """[N] int32: the label of boxes by the largest IoU of each."""
  background_N = jnp.where(best_N < bg_threshold, BACKGROUND, IGNORED)
  return jnp.where(best_N >= fg_threshold, FOREGROUND, background_N).astype(jnp.int32)


def _packed(bits_GN: jax.Array) -> jax.Array:
  """[W, N] uint32: the bools of 32 rows in each word."""
  words = -(-len(bits_GN) // 32)
  padded_GN = jnp.pad(bits_GN, ((0, words * 32 - len(bits_GN)), (0, 0)))
  values_132 = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))[None, :, None]
  padded_W32N = padded_GN.reshape(words, 32, -1).astype(jnp.uint32)
  return jnp.sum(padded_W32N * values_132, axis=1, dtype=jnp.uint32)


def sample(
  labels_N: jax.Array, key: jax.Array, num_samples: int, positive_fraction: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Samples boxes at random, at most a fraction of them foreground, the rest background.

  Args:
    labels_N: [N] integers: > 0 foreground, 0 background, -1 ignored.
    key: PRNG key.
    num_samples: number of samples, static; fewer if there are not enough boxes.
    positive_fraction: at most int(num_samples * positive_fraction) samples are foreground.

  Returns:
    With S = min(num_samples, N): indices [S] int32, first of the foreground, then of the background
    (ascending within each group), then zeros as padding; positive [S] bool; valid [S] bool. All foreground
    is within the first int(num_samples * positive_fraction) entries.

  Raises:
    ValueError: a shape or dtype is not as described.

  Source: Ren et al., Faster R-CNN, section 3.1.3.
  """
  if labels_N.ndim != 1 or not jnp.issubdtype(labels_N.dtype, jnp.integer):
    raise ValueError(f"labels_N must be integers [N], got {labels_N.dtype} {labels_N.shape}")
  foreground_key, background_key = jax.random.split(key)
  foreground_N, background_N = labels_N > 0, labels_N == BACKGROUND
  most_foreground = int(num_samples * positive_fraction)
  num_foreground = jnp.minimum(jnp.sum(foreground_N), most_foreground)
  foreground, is_foreground = _draw(foreground_N, foreground_key, num_foreground, most_foreground)
  background, is_background = _draw(
    background_N, background_key, num_samples - num_foreground, num_samples
  )
  group = jnp.concatenate([jnp.where(is_foreground, 0, 2), jnp.where(is_background, 1, 2)])
  index = jnp.where(group < 2, jnp.concatenate([foreground, background]), 0)
  group, index = jax.lax.sort((group, index), num_keys=2)
  most = min(num_samples, len(labels_N))
  return index[:most], group[:most] == 0, group[:most] < 2


def _draw(candidates_N, key, count, most):
  """`count` (traced, at most the static `most`) of the candidates, or all if there are fewer.

  Returns their indices, int32 and of a length of at most `most`, and which of these are drawn.
  """
  most = min(most, len(candidates_N))
  priority_N = jnp.where(candidates_N, jax.random.uniform(key, candidates_N.shape), -1.0)
  priority_S, indices_S = jax.lax.top_k(priority_N, most)
  return indices_S, (priority_S >= 0) & (jnp.arange(most) < count)
