"""GSCNN's shape stream, and its head that uses the edges of the shape stream.

Takikawa et al., Gated-SCNN: Gated Shape CNNs for Semantic Segmentation (arXiv 1907.05740). Widths and the
order of the layers, which the paper does not give, are those of the authors' code.

Shapes: B batch, H W rows and columns, C channels, K classes.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, subsample, upsampled_bilinear
from fpt_jax.models.layers import ConvNorm, Norm, conv, dropout
from fpt_jax.models.pixel_attention import concatenated, mean_everywhere
from fpt_jax.models.pyramids.aspp import AtrousSpatialPyramid

FINE_CHANNELS = (
  48  # of the fine map in the decoder, as in DeepLabv3+ (Chen et al. 2018, section 4.1)
)


class ResidualBlock(nnx.Module):
  """Two 3x3 convolutions and the map itself (He et al. 2016), which do not see the padding.

  Args:
    channels: channels of the input and the output.
    norm, dtype, rngs: see `ShapeStream`.
  """

  def __init__(self, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.conv1 = ConvNorm(channels, channels, 3, **options)
    self.conv2 = ConvNorm(channels, channels, 3, relu=False, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    y = self.conv2(self.conv1(x, train=train), train=train)
    return x.with_values(nnx.relu(x.values_BHWC + y.values_BHWC))


class GatedConv(nnx.Module):
  """The gated convolutional layer (section 3.1).

      alpha = sigmoid(BN(W3 ReLU(W2 BN([s, r])))),   y = W1 (s (1 + alpha))

  with s the map of the shape stream, r one channel of the backbone, and W 1x1 convolutions.

  Args:
    channels: channels of s and of the output.
    norm, dtype, rngs: see `ShapeStream`.
  """

  def __init__(self, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(dtype=dtype, rngs=rngs)
    self.norm = Norm(norm, channels + 1, **options)
    self.hidden = conv(channels + 1, channels + 1, 1, **options)
    self.attend = ConvNorm(channels + 1, 1, 1, relu=False, norm=norm, **options)
    self.out = conv(channels, channels, 1, bias=False, **options)

  def __call__(self, s: FeatureMap, r_BHW1: jax.Array, *, train: bool) -> FeatureMap:
    """Applies the layer to s and to r, [B, H, W, 1] of the same size."""
    both = concatenated(s, s.with_values(r_BHW1))
    y_BHWC = self.norm(both.values_BHWC, valid_BHW=s.valid_BHW, train=train)
    y = s.with_values(nnx.relu(self.hidden(y_BHWC)))
    alpha_BHW1 = nnx.sigmoid(self.attend(y, train=train).values_BHWC)
    return s.with_values(self.out(s.values_BHWC * (1 + alpha_BHW1)))


class ShapeStream(nnx.Module):
  """The shape stream (section 3.1, fig. 2): from a map of the backbone at full resolution to edges.

  Three times a residual block, a 1x1 convolution to half the channels, and a gated convolution with one
  channel of a coarser map, which a 1x1 convolution computes and which is upsampled bilinearly. The result has
  one more channel in which to see the edges of the image, Canny's, and a 1x1 convolution of both gives the
  map for the head.

  Args:
    in_channels: channels of the map at full resolution and of the three coarser ones, fine to coarse.
    norm: normalisation, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(self, in_channels: Sequence[int], *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(dtype=dtype, rngs=rngs)
    first, *coarse = in_channels
    channels = [max(1, first // 2**i) for i in range(len(in_channels))]
    self.blocks = nnx.List([ResidualBlock(c, norm=norm, **options) for c in channels[:-1]])
    self.narrow = nnx.List([conv(c, d, 1, **options) for c, d in itertools.pairwise(channels)])
    self.squeeze = nnx.List([conv(c, 1, 1, **options) for c in coarse])
    self.gates = nnx.List([GatedConv(c, norm=norm, **options) for c in channels[1:]])
    init = nnx.initializers.normal(0.01)
    self.classify = conv(channels[-1], 1, 1, kernel_init=init, **options)
    self.fuse = conv(2, 1, 1, bias=False, **options)

  def __call__(
    self, maps: Sequence[FeatureMap], canny_BHW: jax.Array, *, train: bool
  ) -> tuple[FeatureMap, FeatureMap]:
    """Computes the edges between classes.

    Args:
      maps: maps of the backbone, the first one at full resolution.
      canny_BHW: [B, H, W] bool, the edges of the image.
      train: use and update batch statistics.

    Returns:
      The logits of an edge, and the map for the head, in 0..1; one channel at full resolution each.
    """
    x, *coarse = maps
    for block, narrow, squeeze, gate, level in zip(
      self.blocks, self.narrow, self.squeeze, self.gates, coarse, strict=True
    ):
      x = block(x, train=train)
      x = x.with_values(narrow(x.values_BHWC))
      r_BHW1 = upsampled_bilinear(level.with_values(squeeze(level.values_BHWC)), x)
      x = gate(x, r_BHW1, train=train)
    logits = x.with_values(self.classify(x.values_BHWC))
    edges_BHW1 = nnx.sigmoid(logits.values_BHWC)
    canny_BHW1 = canny_BHW[..., None].astype(edges_BHW1.dtype)
    both_BHWC = jnp.concatenate([edges_BHW1, canny_BHW1], axis=-1)
    return logits, x.with_values(nnx.sigmoid(self.fuse(both_BHWC)))


class EdgeAwareHead(nnx.Module):
  """The fusion module and the decoder (section 3.2): ASPP with the edges as a branch, and a fine map.

  The branches of ASPP are those of DeepLabv3 and a 1x1 convolution of the edges. Their 1x1 convolution is
  upsampled and concatenated with 48 channels of the fine map, as in DeepLabv3+; two 3x3 convolutions and the
  classifier follow.

  Args:
    fine_channels, coarse_channels: channels of the fine and the coarse map.
    hidden: channels of each branch and of the decoder, 256 in the authors' code.
    output_stride: stride of the coarse map, pixels.
    num_classes: number of classes K.
    dropout: rate of dropout before the classifier, 0 in the authors' code.
    dropout_of: what it drops, see `layers.dropout`.
    norm: normalisation, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    fine_channels: int,
    coarse_channels: int,
    *,
    hidden: int,
    output_stride: int,
    num_classes: int,
    dropout: float,
    dropout_of: str = "channels",
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    normed = dict(norm=norm, **options)
    self.parallel = AtrousSpatialPyramid(
      (coarse_channels,), channels=hidden, output_stride=output_stride, **normed
    )
    self.image = ConvNorm(coarse_channels, hidden, 1, **normed)
    self.edge = ConvNorm(1, hidden, 1, **normed)
    branches = len(self.parallel.channels) + 2
    self.project = conv(branches * hidden, hidden, 1, bias=False, **options)
    self.fine = conv(fine_channels, FINE_CHANNELS, 1, bias=False, **options)
    self.smooth = nnx.List(
      [ConvNorm(c, hidden, 3, **normed) for c in (FINE_CHANNELS + hidden, hidden)]
    )
    init = nnx.initializers.normal(0.01)
    self.classify = conv(hidden, num_classes, 1, kernel_init=init, **options)
    self.dropout, self.dropout_of = dropout, dropout_of

  def __call__(
    self, fine: FeatureMap, coarse: FeatureMap, edges: FeatureMap, *, key: jax.Array | None
  ) -> FeatureMap:
    """Classifies every position of the fine map.

    Args:
      fine, coarse: maps of the backbone.
      edges: one channel at full resolution, see `ShapeStream`.
      key: PRNG key for training (dropout, batch statistics); None for inference.

    Returns:
      The logits at the fine map's stride, [B, H, W, K] in the computation's dtype.
    """
    train = key is not None
    branches = self.parallel((coarse,), train=train)
    image = mean_everywhere(coarse, self.image, train=train)
    edge = self.edge(subsample(edges, coarse.stride), train=train)
    x = concatenated(image, edge, *branches)
    x = x.with_values(self.project(x.values_BHWC))
    detail = fine.with_values(self.fine(fine.values_BHWC))
    x = concatenated(detail, fine.with_values(upsampled_bilinear(x, fine)))
    for layer in self.smooth:
      x = layer(x, train=train)
    x_BHWC = dropout(x.values_BHWC, key, self.dropout, of=self.dropout_of)
    return x.with_values(self.classify(x_BHWC))
