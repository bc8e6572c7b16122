"""The box and mask heads of PANet (Liu et al., Path Aggregation Network, CVPR 2018), "AH" in table 3.

Adaptive feature pooling (section 3.2): a region is pooled from every level, goes through a separate first
layer for each level, and the element-wise maximum over the levels is taken. Fully-connected fusion (3.3):
the mask head has a second branch with a fully connected layer on the whole region. Heavier head (4.2): four
convolutions before the box head's fully connected layer. All convolutions are 3x3 with GroupNorm and ReLU,
as in the authors' code (github.com/ShuLiu1993/PANet).

Shapes: B batch, R regions, N all regions of a batch, P side of the pooled square, C channels, K classes
with background as 0.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.heads.box import box_outputs, read_out
from fpt_jax.models.heads.mask import MaskHead
from fpt_jax.models.layers import Norm, conv


class RegionConv(nnx.Module):
  """A 3x3 convolution without a bias, GroupNorm and ReLU on [N, P, P, C] pooled regions.

  Args:
    in_channels, channels: channels of the input and the output.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_channels: int,
    channels: int,
    *,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.conv = conv(in_channels, channels, 3, bias=False, **options)
    self.norm = Norm("group_norm", channels, **options)

  def __call__(self, x_NPPC: jax.Array) -> jax.Array:
    return nnx.relu(self.norm(self.conv(x_NPPC)))


class FusedLevels(nnx.Module):
  """A separate first convolution for each level, and the element-wise maximum over levels (section 3.2).

  Args:
    levels: number of levels.
    in_channels, channels: channels of the input and the output.
    options: other arguments of `RegionConv`.
  """

  def __init__(self, levels: int, in_channels: int, channels: int, **options):
    self.convs = nnx.List([RegionConv(in_channels, channels, **options) for _ in range(levels)])

  def __call__(self, pooled: tuple[jax.Array, ...]) -> jax.Array:
    """[N, P, P, C], N = B R, from the [B, R, P, P, C] regions of every level, fine to coarse."""
    return functools.reduce(
      jnp.maximum,
      [layer(x.reshape(-1, *x.shape[2:])) for layer, x in zip(self.convs, pooled, strict=True)],
    )


class AugmentedBoxHead(nnx.Module):
  """Adaptive feature pooling, three more convolutions, a fully connected layer, and the outputs.

  Args:
    channels: channels of the pooled features and of the convolutions.
    levels: number of levels that a region is pooled from.
    pool_size: side P of the pooled square.
    hidden: width of the fully connected layer, 1024 in PANet.
    num_classes: number of foreground classes; background is added as class 0.
    layers: number of 3x3 convolutions including the first one of each level, 4 in PANet.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    *,
    levels: int,
    pool_size: int,
    hidden: int,
    num_classes: int,
    layers: int = 4,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.fused = FusedLevels(levels, channels, channels, **options)
    self.convs = nnx.List([RegionConv(channels, channels, **options) for _ in range(layers - 1)])
    self.fc6 = nnx.Linear(
      channels * pool_size**2, hidden, kernel_init=nnx.initializers.he_normal(), **options
    )
    self.cls_score, self.bbox_pred = box_outputs(hidden, num_classes, **options)

  @jax.named_scope("box_head")
  def __call__(self, pooled: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Classifies regions and refines their boxes.

    Args:
      pooled: [B, R, P, P, C] regions of every level, fine to coarse.

    Returns:
      Logits [B, R, K] and deltas [B, R, K, 4], float32.
    """
    x_NPPC = self.fused(pooled)
    for layer in self.convs:
      x_NPPC = layer(x_NPPC)
    x_BRC = nnx.relu(self.fc6(x_NPPC.reshape(*pooled[0].shape[:2], -1)))
    return read_out(x_BRC, self.cls_score, self.bbox_pred)


class AugmentedMaskHead(nnx.Module):
  """Adaptive feature pooling, two more convolutions, and two branches whose logits are added.

  One branch is the end of a standard mask head: a convolution, a transposed convolution, one logit per
  class. The other separates foreground from background, independently of the class: two convolutions, of
  which the second halves the channels, and a fully connected layer with one output per pixel (section
  3.3). Its outputs are logits of either sign; the authors' code clips negative ones to zero, which the
  paper does not mention.

  Args:
    channels: channels of the pooled features.
    levels: number of levels that a region is pooled from.
    pool_size: side P of the pooled square.
    hidden: channels of the convolutions, 256 in PANet.
    layers: number of 3x3 convolutions before the transposed one, including the first one of each level
      and the last one, which belongs to the branch; 4 in PANet, at least 2.
    num_classes: number of foreground classes; class 0, background, has a map too.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: fewer than 2 layers.
  """

  def __init__(
    self,
    channels: int,
    *,
    levels: int,
    pool_size: int,
    hidden: int = 256,
    layers: int = 4,
    num_classes: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if layers < 2:
      raise ValueError(f"an augmented mask head has at least 2 layers, got {layers}")
    options = dict(dtype=dtype, rngs=rngs)

    def region_conv(channels: int) -> RegionConv:
      return RegionConv(hidden, channels, **options)

    half = max(1, hidden // 2)
    self.fused = FusedLevels(levels, channels, hidden, **options)
    self.convs = nnx.List([region_conv(hidden) for _ in range(layers - 2)])
    self.last = region_conv(hidden)
    self.of_class = MaskHead(hidden, hidden=hidden, layers=0, num_classes=num_classes, **options)
    self.fc_convs = nnx.List([region_conv(hidden), region_conv(half)])
    self.foreground = nnx.Linear(
      half * pool_size**2,
      (2 * pool_size) ** 2,
      kernel_init=nnx.initializers.normal(0.01),
      **options,
    )

  @jax.named_scope("mask_head")
  def __call__(self, pooled: tuple[jax.Array, ...], labels_BR: jax.Array) -> jax.Array:
    """Predicts the mask of each region.

    Args:
      pooled: [B, R, P, P, C] regions of every level, fine to coarse.
      labels_BR: [B, R] int32, the class of each region.

    Returns:
      [B, R, 2P, 2P] float32 logits of each region's class.
    """
    batch, regions, side = pooled[0].shape[:3]
    x_NPPC = self.fused(pooled)
    for layer in self.convs:
      x_NPPC = layer(x_NPPC)
    last_NPPC = self.last(x_NPPC)
    logits_BRPP = self.of_class(last_NPPC.reshape(batch, regions, *last_NPPC.shape[1:]), labels_BR)
    for layer in self.fc_convs:
      x_NPPC = layer(x_NPPC)
    foreground_NQ = self.foreground(x_NPPC.reshape(batch * regions, -1)).astype(jnp.float32)
    return logits_BRPP + foreground_NQ.reshape(batch, regions, 2 * side, 2 * side)
