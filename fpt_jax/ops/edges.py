"""Borders between the classes of a label map, and losses on them, in float32 over the whole batch.

Takikawa et al., Gated-SCNN (arXiv 1907.05740), section 3.3.

Shapes: B batch, H W rows and columns, K classes.
"""

import math

import jax
import jax.numpy as jnp

from fpt_jax.ops.losses import sigmoid_cross_entropy
from fpt_jax.ops.neighbours import shifted

_REACH = 2  # of `gradient_magnitude`, positions
_LEAST = 1e-8  # magnitudes above it are not zero


def class_borders(labels_BHW: jax.Array, classes: int, radius: float) -> jax.Array:
  """Marks the labelled pixels that have a pixel of another class within a distance.

  These are the pixels whose distance from the border of a class's region, inside or outside, is at most the
  radius.

  Args:
    labels_BHW: [B, H, W] integers; pixels with values outside [0, K) have no class.
    classes: number of classes K.
    radius: Euclidean distance between the centres of the pixels, pixels.

  Returns:
    [B, H, W] bool.
  """
  # 0 has no class, as what lies outside the map
  class_BHW = jnp.where((labels_BHW >= 0) & (labels_BHW < classes), labels_BHW + 1, 0)
  near_BHW = jnp.zeros(labels_BHW.shape, bool)
  reach = math.floor(radius)
  for rows in range(-reach, reach + 1):
    for columns in range(-reach, reach + 1):
      if 0 < rows**2 + columns**2 <= radius**2:
        other_BHW = shifted(class_BHW, rows, columns)
        near_BHW |= (other_BHW > 0) & (other_BHW != class_BHW)
  return near_BHW & (class_BHW > 0)


def balanced_cross_entropy(
  logits_BHW: jax.Array, edges_BHW: jax.Array, labelled_BHW: jax.Array
) -> jax.Array:
  """Computes the mean binary cross-entropy in which edges and other pixels have the same weight.

  Edges are weighted by the share of the other pixels in the batch, and these by the share of the edges
  (Xie & Tu 2015, Holistically-Nested Edge Detection, eq. 2).

  Args:
    logits_BHW: [B, H, W] float logits of an edge.
    edges_BHW: [B, H, W] bool, the pixels on an edge.
    labelled_BHW: [B, H, W] bool, the pixels in the mean.

  Returns:
    Float32 scalar; 0 without edges, without other pixels and without labelled ones.
  """
  count = jnp.maximum(jnp.sum(labelled_BHW, dtype=jnp.float32), 1)
  share = jnp.sum(labelled_BHW & edges_BHW, dtype=jnp.float32) / count
  weight_BHW = jnp.where(edges_BHW, 1 - share, share)
  loss_BHW = weight_BHW * sigmoid_cross_entropy(logits_BHW, edges_BHW)
  return jnp.sum(jnp.where(labelled_BHW, loss_BHW, 0)) / count


def gradient_magnitude(x_BHWK: jax.Array) -> jax.Array:
  """Computes |grad(G * x)| / sqrt(2) of each channel (section 3.3).

  The paper does not give the width of the Gaussian filter G; here it is the binomial filter (1, 2, 1) / 4
  along both axes. The gradient is half the difference of the two neighbours. What lies outside the map
  counts as zero.

  Args:
    x_BHWK: [B, H, W, K] float.

  Returns:
    [B, H, W, K] of x's dtype. Its gradient is zero where the magnitude is.
  """

  def smooth(y, rows, columns):
    return (shifted(y, -rows, -columns) + 2 * y + shifted(y, rows, columns)) / 4

  def difference(y, rows, columns):
    return (shifted(y, rows, columns) - shifted(y, -rows, -columns)) / 2

  smooth_BHWK = smooth(smooth(x_BHWK, 1, 0), 0, 1)
  squared_BHWK = sum(jnp.square(difference(smooth_BHWK, *axis)) for axis in ((1, 0), (0, 1))) / 2
  is_zero_BHWK = squared_BHWK == 0
  return jnp.where(is_zero_BHWK, 0, jnp.sqrt(jnp.where(is_zero_BHWK, 1, squared_BHWK)))


def gradient_loss(
  logits_BHWK: jax.Array,
  labels_BHW: jax.Array,
  noise_BHWK: jax.Array,
  *,
  temperature: float,
) -> jax.Array:
  """Computes the dual-task regulariser, which compares the borders in predictions and labels (section 3.3).

  Both have a gradient magnitude for each class: the predictions as softmax((logits + noise) / temperature), a
  sample of the classes (Jang et al. 2017, Gumbel-softmax), and the labels as ones and zeros. The loss is the
  mean of the absolute differences where one of the two is not zero. Pixels with an unlabelled pixel or the
  border of the map within two rows and columns, as far as the filters reach, are left out.

  Args:
    logits_BHWK: [B, H, W, K] float.
    labels_BHW: [B, H, W] integers; pixels with values outside [0, K) have no class.
    noise_BHWK: [B, H, W, K] float32, samples of Gumbel's distribution.
    temperature: temperature of the Gumbel-softmax, more than 0.

  Returns:
    Float32 scalar; 0 if no pixel is counted.
  """
  sample_BHWK = jax.nn.softmax(
    (logits_BHWK.astype(jnp.float32) + noise_BHWK) / temperature, axis=-1
  )
  classes = logits_BHWK.shape[-1]
  found_BHWK = gradient_magnitude(sample_BHWK)
  truth_BHWK = gradient_magnitude(jax.nn.one_hot(labels_BHW, classes, dtype=jnp.float32))
  counted_BHW = (labels_BHW >= 0) & (labels_BHW < classes)
  for rows, columns in ((1, 0), (0, 1)):
    near = [shifted(counted_BHW, i * rows, i * columns) for i in range(-_REACH, _REACH + 1) if i]
    for other_BHW in near:
      counted_BHW &= other_BHW
  counted_BHWK = counted_BHW[..., None] & ((found_BHWK > _LEAST) | (truth_BHWK > _LEAST))
  difference_BHWK = jnp.where(counted_BHWK, jnp.abs(found_BHWK - truth_BHWK), 0)
  return jnp.sum(difference_BHWK) / jnp.maximum(jnp.sum(counted_BHWK, dtype=jnp.float32), 1)
