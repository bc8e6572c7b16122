"""DeepLabv3: dilated convolutions and the mean of the image (Chen et al. 2017).

Shapes: B batch, H W rows and columns, C channels.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import ConvNorm
from fpt_jax.models.pixel_attention import concatenated, mean_everywhere
from fpt_jax.models.pyramids.aspp import AtrousSpatialPyramid


class AtrousPooling(nnx.Module):
  """Atrous Spatial Pyramid Pooling with the mean of the image, and a 3x3 convolution.

  The five branches of section 3.3 (fig. 5) are concatenated and reduced by a 1x1 convolution. As in
  torchvision, a 3x3 convolution follows. torchvision's dropout in front of it is not here: the head drops
  channels in front of the classifier.

  Args:
    in_channels: channels of the map.
    channels: channels of each branch and of the output, 256 in the paper.
    output_stride: stride of the map, pixels.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_channels: int,
    channels: int,
    *,
    output_stride: int,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.parallel = AtrousSpatialPyramid(
      (in_channels,), channels=channels, output_stride=output_stride, **options
    )
    self.image = ConvNorm(in_channels, channels, 1, **options)
    self.project = ConvNorm(sum(self.parallel.channels) + channels, channels, 1, **options)
    self.smooth = ConvNorm(channels, channels, 3, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    branches = self.parallel((x,), train=train)
    image = mean_everywhere(x, self.image, train=train)
    x = self.project(concatenated(*branches, image), train=train)
    return self.smooth(x, train=train)
