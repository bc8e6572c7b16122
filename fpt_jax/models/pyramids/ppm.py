"""Pyramid pooling: means over parts of the image at every position (Zhao et al. 2017, PSPNet).

Shapes: B batch, H W rows and columns, n bins per side, C channels.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.layers import ConvNorm
from fpt_jax.ops.bins import bin_means, spread_bins

BINS = (6, 3, 2, 1)  # fine to coarse


class PyramidPooling(nnx.Module):
  """The pyramid pooling module of PSPNet as four levels (Zhao et al. 2017, section 3.2, fig. 3c).

  Means over 6 x 6, 3 x 3, 2 x 2 and 1 x 1 bins of the last level, each through a 1x1 convolution, a
  normalisation and a ReLU, interpolated to the size of the level. Bins divide the image without its
  padding. The mean of a bin is placed at its centre; PSPNet's code aligns the corners of the bins with those
  of the level. PSPNet also keeps the level itself; the FPT paper's pyramid (section 4.2) has four scales.

  Only the last level is used. Arguments are those of all pyramids, see `fpt_jax.models.pyramids`.
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

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    last = levels[-1]
    outputs = []
    for bins, branch in zip(BINS, self.branches, strict=True):
      pooled_BnnC = bin_means(last.values_BHWC, last.valid_BHW, bins).astype(last.values_BHWC.dtype)
      pooled = FeatureMap(pooled_BnnC, jnp.ones(pooled_BnnC.shape[:3], bool), last.stride)
      y_BnnC = branch(pooled, train=train).values_BHWC
      y_BHWC = spread_bins(y_BnnC, last.valid_BHW).astype(y_BnnC.dtype)
      outputs.append(last.with_values(y_BHWC))
    return tuple(outputs)
