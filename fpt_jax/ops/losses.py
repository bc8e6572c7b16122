"""Losses in float32, reduced over the whole batch.

Shape suffixes: B images, N anchors, R regions, K classes (in detection, background is class 0), P rows
and columns of a mask, H W rows and columns of an image, 4 box deltas.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

# The point where smooth L1 changes from a parabola to a line, for box deltas: torchvision's, and that of
# Detectron's RPN. Fast R-CNN has 1, the box heads of PANet and of the release of FPT 1/3.
BOX_BETA = 1 / 9


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Computes the element-wise binary cross-entropy.

  Args:
    logits: logits of any shape, float.
    targets: probabilities of the positive class, same shape.

  Returns:
    Same shape, float32.
  """
  return optax.sigmoid_binary_cross_entropy(_float32(logits), _float32(targets))


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the cross-entropy of integer labels.

  Args:
    logits: [..., K] float.
    labels: [...] integers in [0, K).

  Returns:
    [...] float32.
  """
  return optax.softmax_cross_entropy_with_integer_labels(_float32(logits), labels)


def smooth_l1(predictions: jax.Array, targets: jax.Array, beta: float) -> jax.Array:
  """Computes 0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta, element-wise.

  Args:
    predictions: predictions of any shape, float.
    targets: targets, same shape; d is their difference.
    beta: point where the loss becomes linear, positive.

  Returns:
    Same shape, float32.

  Raises:
    ValueError: beta is not positive.

  Source: Girshick, Fast R-CNN, eq. 3.
  """
  if beta <= 0:
    raise ValueError(f"beta must be positive, got {beta}")
  return optax.huber_loss(_float32(predictions), _float32(targets), delta=beta) / beta


def rpn_losses(
  objectness_BN: jax.Array,
  deltas_BN4: jax.Array,
  labels_BN: jax.Array,
  targets_BN4: jax.Array,
  selected_BN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the losses of the region proposal network.

  Args:
    objectness_BN: [B, N] float logits.
    deltas_BN4: [B, N, 4] float predicted deltas.
    labels_BN: [B, N] integers: 1 foreground, 0 background, -1 ignored.
    targets_BN4: [B, N, 4] float target deltas; used where foreground.
    selected_BN: [B, N] bool, the sampled anchors.

  Returns:
    (objectness, box) float32 scalars: binary cross-entropy of the sampled anchors and smooth L1 of the
    sampled foreground, both divided by the number of sampled anchors in the batch. 0 without samples.

  Raises:
    ValueError: shapes disagree.

  Source: Ren et al., Faster R-CNN, eq. 1.
  """
  _agree(objectness_BN, labels_BN, selected_BN, deltas_BN4[..., 0], targets_BN4[..., 0])
  objectness_BN = sigmoid_cross_entropy(objectness_BN, labels_BN > 0)
  box_BN = jnp.sum(smooth_l1(deltas_BN4, targets_BN4, BOX_BETA), axis=-1)
  count = jnp.sum(selected_BN)
  return (
    _sum_over(objectness_BN, selected_BN, count),
    _sum_over(box_BN, selected_BN & (labels_BN > 0), count),
  )


def box_losses(
  logits_BRK: jax.Array,
  deltas_BRK4: jax.Array,
  labels_BR: jax.Array,
  targets_BR4: jax.Array,
  valid_BR: jax.Array,
  beta: float = BOX_BETA,
) -> tuple[jax.Array, jax.Array]:
  """Computes the losses of the box head.

  Args:
    logits_BRK: [B, R, K] float class logits.
    deltas_BRK4: [B, R, K, 4] float predicted deltas of every class.
    labels_BR: [B, R] integers in [0, K), 0 background.
    targets_BR4: [B, R, 4] float target deltas; used where foreground.
    valid_BR: [B, R] bool, the sampled regions.
    beta: see `smooth_l1`.

  Returns:
    (classification, box) float32 scalars: cross-entropy of the sampled regions and smooth L1 of the
    foreground's deltas for its class, both divided by the number of sampled regions in the batch. 0
    without samples.

  Raises:
    ValueError: shapes disagree.

  Source: Girshick, Fast R-CNN, eq. 1.
  """
  _agree(labels_BR, valid_BR, logits_BRK[..., 0], targets_BR4[..., 0], deltas_BRK4[..., 0, 0])
  num_classes = logits_BRK.shape[-1]
  class_BR = softmax_cross_entropy(logits_BRK, labels_BR)
  of_class_BRK1 = jax.nn.one_hot(labels_BR, num_classes, dtype=jnp.bool_)[..., None]
  deltas_BR4 = jnp.sum(jnp.where(of_class_BRK1, _float32(deltas_BRK4), 0), axis=-2)
  box_BR = jnp.sum(smooth_l1(deltas_BR4, targets_BR4, beta), axis=-1)
  count = jnp.sum(valid_BR)
  return (
    _sum_over(class_BR, valid_BR, count),
    _sum_over(box_BR, valid_BR & (labels_BR > 0), count),
  )


def mask_loss(logits_BRPP: jax.Array, targets_BRPP: jax.Array, positive_BR: jax.Array) -> jax.Array:
  """Computes the loss of the mask head: the mean over the pixels of a region, summed over regions.

  Divided by the number of foreground regions in the batch, it is the loss of the source.

  Args:
    logits_BRPP: [B, R, P, P] float mask logits of each region's class.
    targets_BRPP: [B, R, P, P] float in [0, 1].
    positive_BR: [B, R] bool, the foreground regions.

  Returns:
    Float32 scalar; 0 without foreground.

  Raises:
    ValueError: shapes disagree.

  Source: He et al., Mask R-CNN, section 3.
  """
  _agree(logits_BRPP, targets_BRPP)
  _agree(logits_BRPP[..., 0, 0], positive_BR)
  pixels_BR = jnp.mean(sigmoid_cross_entropy(logits_BRPP, targets_BRPP), axis=(-2, -1))
  return jnp.sum(jnp.where(positive_BR, pixels_BR, 0))


def segmentation_loss(
  logits_BHWK: jax.Array,
  labels_BHW: jax.Array,
  weights_K: Sequence[float] = (),
  *,
  hard_pixels: int = 0,
  hard_probability: float = 0.0,
) -> jax.Array:
  """Computes the mean cross-entropy over the labelled pixels of the batch, or over the hard ones alone.

  Hard pixels are those whose own class has at most the probability `hard_probability`, or else the
  `hard_pixels` with the smallest probabilities (online hard example mining: Shrivastava et al. 2016, in the
  form of OCNet's code).

  Args:
    logits_BHWK: [B, H, W, K] float.
    labels_BHW: [B, H, W] integers; pixels with values outside [0, K) have no class and are ignored.
    weights_K: positive weight of each class in the mean; () for equal weights.
    hard_pixels: smallest number of hard pixels in the batch; 0 for all labelled pixels.
    hard_probability: probability up to which a pixel is hard.

  Returns:
    Float32 scalar; 0 without labelled pixels.

  Raises:
    ValueError: shapes disagree, or there are not as many weights as classes.
  """
  _agree(logits_BHWK[..., 0], labels_BHW)
  labelled_BHW = (labels_BHW >= 0) & (labels_BHW < logits_BHWK.shape[-1])
  class_BHW = jnp.where(labelled_BHW, labels_BHW, 0)
  loss_BHW = softmax_cross_entropy(logits_BHWK, class_BHW)
  if hard_pixels:
    probability_BHW = jax.lax.stop_gradient(jnp.where(labelled_BHW, jnp.exp(-loss_BHW), jnp.inf))
    nth = min(hard_pixels, probability_BHW.size) - 1
    smallest = jnp.sort(probability_BHW.reshape(-1))[nth]
    labelled_BHW &= probability_BHW <= jnp.maximum(smallest, hard_probability)
  if not weights_K:
    return _sum_over(loss_BHW, labelled_BHW, jnp.sum(labelled_BHW))
  if len(weights_K) != logits_BHWK.shape[-1]:
    raise ValueError(f"{len(weights_K)} weights for {logits_BHWK.shape[-1]} classes")
  weight_BHW = jnp.where(labelled_BHW, jnp.asarray(weights_K, jnp.float32)[class_BHW], 0)
  total = jnp.sum(weight_BHW)
  return jnp.sum(weight_BHW * loss_BHW) / jnp.where(total > 0, total, 1)


def _sum_over(loss, chosen, count):
  return jnp.sum(jnp.where(chosen, loss, 0)) / jnp.maximum(count, 1)


def _float32(x):
  return jnp.asarray(x, jnp.float32)


def _agree(*arrays):
  if len({array.shape for array in arrays}) > 1:
    raise ValueError(f"leading shapes disagree: {', '.join(str(a.shape) for a in arrays)}")
