"""Pyramid pooling: what the image's quarters, ninths, ... say, at every position (Zhao et al. 2017).

Shapes: B batch, H W rows and columns, n bins a side, C channels.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.layers import ConvNorm
from fpt_jax.ops.bins import bin_means, spread_bins

BINS = (6, 3, 2, 1)  # fine to coarse


class PyramidPooling(nnx.Module):
  """The pyramid pooling module of PSPNet (Zhao et al. 2017, section 3.2, fig. 3c) as four levels.

  Means over 6 x 6, 3 x 3, 2 x 2 and 1 x 1 bins of the backbone's last map, each through a 1x1
  convolution, a normalisation and a ReLU, interpolated to the map's size. Bins divide the image
  without its padding. PSPNet goes on with the map itself beside them; the paper's pyramid (4.2) is of
  four scales.

  Args:
    in_channels: of the backbone's levels; only the last level is looked at.
    channels: of every level.
    norm: see `layers.Norm`.
  """

  def __init__(
    self,
    in_channels,
    *,
    channels: int = 256,
    norm: str = "sync_bn",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.branches = nnx.List([ConvNorm(in_channels[-1], channels, 1, **options) for _ in BINS])
    self.channels = (channels,) * len(BINS)

  def __call__(self, pyramid: Pyramid, *, train: bool = False) -> Pyramid:
    x = pyramid[-1]
    levels = []
    for bins, branch in zip(BINS, self.branches, strict=True):
      pooled_BnnC = bin_means(x.values_BHWC, x.valid_BHW, bins).astype(x.values_BHWC.dtype)
      pooled = FeatureMap(pooled_BnnC, jnp.ones(pooled_BnnC.shape[:3], bool), x.stride)
      y_BnnC = branch(pooled, train=train).values_BHWC
      levels.append(x.with_values(spread_bins(y_BnnC, x.valid_BHW).astype(y_BnnC.dtype)))
    return tuple(levels)
