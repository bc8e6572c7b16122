"""PSPNet: a map and its means over parts of the image (Zhao et al. 2017)."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.layers import ConvNorm
from fpt_jax.models.pixel_attention import concatenated
from fpt_jax.models.pyramids.ppm import PyramidPooling


class PyramidPoolingContext(nnx.Module):
  """The pyramid pooling module beside the map itself, and a 3x3 convolution (section 3.2, fig. 3).

  Args:
    in_channels: channels of the map.
    channels: channels of each level of the pyramid and of the output, 512 in PSPNet on a ResNet.
    norm: normalisation behind each convolution, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self, in_channels: int, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.pooling = PyramidPooling((in_channels,), channels=channels, **options)
    self.fuse = ConvNorm(in_channels + sum(self.pooling.channels), channels, 3, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    return self.fuse(concatenated(x, *self.pooling((x,), train=train)), train=train)
