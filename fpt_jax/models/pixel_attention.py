"""Attention between the positions of feature maps, and their means, as pyramids and heads of segmentation use
them.

Shapes: B batch, H W rows and columns, h w those of the keys' map, Q = H W, C channels, D channels of a
key, K keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fpt_jax.models.feature_map import FeatureMap, mean_over_valid
from fpt_jax.ops.bins import bin_means
from fpt_jax.ops.mos_attention import mos_attention

BINS = (1, 3, 6, 8)  # per side: 110 keys (Zhu et al. 2019, section 3.2)


def attend(
  q_BHWD: jax.Array, k_BhwD: jax.Array, v_BhwC: jax.Array, valid_Bhw: jax.Array
) -> jax.Array:
  """Attends with one softmax over all valid keys.

  Args:
    q_BHWD: [B, H, W, D] queries, already multiplied by the scale.
    k_BhwD: [B, h, w, D] keys, or [B, K, D].
    v_BhwC: [B, h, w, C] values, or [B, K, C].
    valid_Bhw: [B, h, w] bool, the keys that may be attended to, or [B, K].

  Returns:
    [B, H, W, C] of the values' dtype.
  """
  B, H, W, D = q_BHWD.shape
  out_BQC = mos_attention(
    q_BHWD.reshape(B, H * W, 1, D),
    k_BhwD.reshape(B, -1, 1, D),
    v_BhwC.reshape(B, -1, v_BhwC.shape[-1]),
    jnp.ones((B, 1), jnp.float32),
    key_valid_BK=valid_Bhw.reshape(B, -1),
  )
  return out_BQC.reshape(B, H, W, -1)


def attend_to_bins(q_BHWD: jax.Array, key: FeatureMap, value: FeatureMap) -> jax.Array:
  """Attends to the means of keys and values over 1, 9, 36 and 64 bins (Zhu et al. 2019, section 3.2).

  Args:
    q_BHWD: [B, H, W, D] queries; the similarity is scaled by 1 / sqrt(D).
    key: map of D channels.
    value: map of C channels, of the keys' size.

  Returns:
    [B, H, W, C] of the values' dtype.
  """

  def means(x: FeatureMap) -> jax.Array:
    B, *_, C = x.values_BHWC.shape
    pooled = [bin_means(x.values_BHWC, x.valid_BHW, bins).reshape(B, -1, C) for bins in BINS]
    return jnp.concatenate(pooled, axis=1).astype(x.values_BHWC.dtype)

  k_BKD, v_BKC = means(key), means(value)
  all_valid_BK = jnp.ones(k_BKD.shape[:2], bool)
  return attend(q_BHWD * k_BKD.shape[-1] ** -0.5, k_BKD, v_BKC, all_valid_BK)


def mean_everywhere(
  x: FeatureMap, transform: Callable[..., FeatureMap], *, train: bool
) -> FeatureMap:
  """Returns the mean of each image, transformed as a map of one position, at every position.

  Args:
    x: map whose mean over valid positions is taken.
    transform: module that is called with the mean and `train`.
    train: use and update batch statistics.
  """
  mean_B11C = mean_over_valid(x)[:, None, None].astype(x.values_BHWC.dtype)
  mean = FeatureMap(mean_B11C, jnp.ones(mean_B11C.shape[:3], bool), x.stride)
  y_B11C = transform(mean, train=train).values_BHWC
  return x.with_values(jnp.broadcast_to(y_B11C, (*x.values_BHWC.shape[:3], y_B11C.shape[-1])))


def concatenated(*maps: FeatureMap) -> FeatureMap:
  """Returns maps of one size as one map, with the channels of each in turn."""
  return maps[0].with_values(jnp.concatenate([m.values_BHWC for m in maps], axis=-1))
