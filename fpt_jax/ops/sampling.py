"""Matching of anchors and proposals with ground truth, and their sampling for training.

Shape suffixes: G ground truths, N anchors or proposals, S samples. All functions can be vmapped over
images.
"""

import jax
import jax.numpy as jnp

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1


def match(
  iou_GN: jax.Array,
  gt_valid_G: jax.Array,
  fg_threshold: float,
  bg_threshold: float,
  allow_low_quality: bool,
) -> tuple[jax.Array, jax.Array]:
  """Assigns each box to the ground truth that it overlaps most, and labels it.

  Args:
    iou_GN: [G, N] float IoU of every ground truth with every box, G > 0.
    gt_valid_G: [G] bool; invalid ground truths match nothing.
    fg_threshold: smallest IoU of foreground.
    bg_threshold: IoU below which a box is background; between the two thresholds it is ignored.
    allow_low_quality: whether the boxes that overlap a ground truth most (all of them, if tied) are
      foreground at any IoU. Such a box is still assigned to the ground truth that it overlaps most. A
      ground truth that overlaps no box has no such boxes.

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
  if gt_valid_G.shape != iou_GN.shape[:1] or gt_valid_G.dtype != jnp.bool_:
    raise ValueError(
      f"gt_valid_G must be bool [{len(iou_GN)}], got {gt_valid_G.dtype} {gt_valid_G.shape}"
    )
  if bg_threshold > fg_threshold:
    raise ValueError(f"bg_threshold {bg_threshold} exceeds fg_threshold {fg_threshold}")

  # The barrier keeps one array: if two fusions computed the IoU separately, its last bit could differ,
  # and the comparison with its maximum could fail.
  iou_GN = jax.lax.optimization_barrier(jnp.where(gt_valid_G[:, None], iou_GN, -1.0))
  best_N = jnp.max(iou_GN, axis=0)
  label_N = jnp.where(
    best_N >= fg_threshold, FOREGROUND, jnp.where(best_N < bg_threshold, BACKGROUND, IGNORED)
  )
  if allow_low_quality:
    best_G1 = jnp.max(iou_GN, axis=1, keepdims=True)
    low_quality_N = jnp.any((iou_GN == best_G1) & (best_G1 > 0), axis=0)
    label_N = jnp.where(low_quality_N, FOREGROUND, label_N)
  return jnp.argmax(iou_GN, axis=0).astype(jnp.int32), label_N.astype(jnp.int32)


def sample(
  labels_N: jax.Array, key: jax.Array, num_samples: int, positive_fraction: float
) -> jax.Array:
  """Samples boxes at random, at most a fraction of them foreground, the rest background.

  Args:
    labels_N: [N] integers: > 0 foreground, 0 background, -1 ignored.
    key: PRNG key.
    num_samples: number of samples, static; fewer if there are not enough boxes.
    positive_fraction: at most int(num_samples * positive_fraction) samples are foreground.

  Returns:
    [N] bool, the sampled boxes.

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
  drawn_foreground_N = _draw(foreground_N, foreground_key, num_foreground, most_foreground)
  return drawn_foreground_N | _draw(
    background_N, background_key, num_samples - num_foreground, num_samples
  )


def sample_indices(
  labels_N: jax.Array, key: jax.Array, num_samples: int, positive_fraction: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Samples as `sample`, as a list of fixed length: foreground first, then background, then padding.

  Args:
    labels_N: as for `sample`.
    key: as for `sample`.
    num_samples: as for `sample`.
    positive_fraction: as for `sample`.

  Returns:
    With S = min(num_samples, N): indices [S] int32 (ascending within each group; 0 where padded),
    positive [S] bool, valid [S] bool. All foreground is within the first
    int(num_samples * positive_fraction) entries.

  Raises:
    ValueError: a shape or dtype is not as described.
  """
  drawn_N = sample(labels_N, key, num_samples, positive_fraction)
  group_N = jnp.where(drawn_N, 1 + (labels_N > 0).astype(jnp.int32), 0)
  group_S, indices_S = jax.lax.top_k(group_N, min(num_samples, len(labels_N)))
  return jnp.where(group_S > 0, indices_S, 0), group_S == 2, group_S > 0


def _draw(candidates_N, key, count, most):
  """[N] bool: `count` (traced, at most the static `most`) of the candidates, or all if there are fewer."""
  most = min(most, len(candidates_N))
  priority_N = jnp.where(candidates_N, jax.random.uniform(key, candidates_N.shape), -1.0)
  priority_S, indices_S = jax.lax.top_k(priority_N, most)
  drawn_S = (priority_S >= 0) & (jnp.arange(most) < count)
  return jnp.zeros_like(candidates_N).at[indices_S].set(drawn_S, unique_indices=True)
