"""Unscathed Feature Pyramid: windows of four sizes around every pixel (paper, section 3.5).

Shapes: B batch, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.layers import ConvNorm, Norm, conv

KERNELS = (1, 7, 15, 31)


class UnscathedFeaturePyramid(nnx.Module):
  """Global convolutions with kernels of 1, 7, 15 and 31 on the last level of a dilated backbone.

  All levels have the size of that level, so none has lost anything to a stride. The level of the
  smallest kernel is the finest.

  The paper gives the kernels and 256 channels per level. Here, a 1x1 convolution to 256 channels comes
  first: on the 2048 channels of C5 the branches alone would have 64M parameters and 948 GFLOPs on crops
  of 969 pixels, where the paper's whole network has 71.3M and 916 (table 4).

  Args:
    kernels: side of the window of each level, odd, in positions; a kernel of twice the map's side covers
      the whole map from every position.
    in_channels, channels, norm, dtype, rngs: see `fpt_jax.models.pyramids`.

  Raises:
    ValueError: a kernel is even, or there are not as many kernels as FPT has levels.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    channels: int = 256,
    kernels: tuple[int, ...] = KERNELS,
    norm: str = "sync_bn",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if any(kernel % 2 == 0 for kernel in kernels) or len(kernels) != len(KERNELS):
      raise ValueError(f"kernels={tuple(kernels)} must be {len(KERNELS)} odd numbers")
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.reduce = ConvNorm(in_channels[-1], channels, 1, **options)
    self.branches = nnx.List([GlobalConvolution(channels, kernel, **options) for kernel in kernels])
    self.channels = (channels,) * len(kernels)

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    x = self.reduce(levels[-1], train=train)
    return tuple(branch(x, train=train) for branch in self.branches)


class GlobalConvolution(nnx.Module):
  """A k x k window with O(k) parameters (Peng et al. 2017, section 3.1, fig. 3b).

  The sum of a k x 1 followed by a 1 x k convolution and of the same in the other order, without a
  nonlinearity in between. The normalisation and the ReLU after the sum are ours: Peng et al. compute
  class scores here, we compute features.

  Args:
    channels: input, inner and output channels.
    kernel: k, odd, in positions.
    norm: normalisation of the sum, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, kernel: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    # The layers are linear, so the variance is kept without the factor 2 for a ReLU.
    init = nnx.initializers.lecun_normal()
    tall, wide = (kernel, 1), (1, kernel)
    self.pairs = nnx.List(
      [
        nnx.List(
          [
            conv(channels, channels, sides, bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
            for sides in pair
          ]
        )
        for pair in ((tall, wide), (wide, tall))
      ]
    )
    self.norm = Norm(norm, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    y_BHWC = sum(self.convolve(first, second, x) for first, second in self.pairs)
    return x.with_values(nnx.relu(self.norm(y_BHWC, valid_BHW=x.valid_BHW, train=train)))

  def convolve(self, first: nnx.Conv, second: nnx.Conv, x: FeatureMap) -> jax.Array:
    """[B, H, W, C]: both convolutions; the second does not see what the first put on padding."""
    return second(x.with_values(first(x.masked())).masked())
