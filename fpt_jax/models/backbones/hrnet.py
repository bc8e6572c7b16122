"""HRNetV2 (Wang et al. 2019): branches of four resolutions in parallel that exchange their features.

Wang et al., Deep High-Resolution Representation Learning for Visual Recognition (arXiv 1908.07919).

Shapes: B batch, H W rows and columns, C channels.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones.resnet import BasicBlock, Bottleneck, Context
from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid, average_pool, upsampled_bilinear
from fpt_jax.models.layers import ConvNorm
from fpt_jax.models.pixel_attention import concatenated
from fpt_jax.models.remat import recomputed

STEM_CHANNELS = 64
FINEST_CHANNELS = {"hrnet_w48": 48}  # of the finest branch; each coarser one has twice as many
BRANCHES = 4
MODULES = (1, 4, 3)  # of stages 2, 3 and 4, which have 2, 3 and 4 branches
BLOCKS = 4  # residual blocks of stage 1, and of each branch in a module
UPSAMPLINGS = ("nearest", "bilinear")
OUTPUT_STRIDES = (32, 16, 8, 4)


class HRModule(nnx.Module):
  """Residual blocks on every branch, then every branch receives the features of all (section 3.1, fig. 3).

  A coarser branch arrives through a 1x1 convolution, a normalisation and upsampling; a finer one through
  3x3 convolutions with stride 2, each with a normalisation and, but for the last one, a ReLU. The sum has a
  ReLU.

  Args:
    channels: channels of each branch, fine to coarse.
    upsampling: how coarser branches are upsampled, one of `UPSAMPLINGS`.
    norm: normalisation, see `layers.Norm`.
    masks_padding: as for `HRNet`.
    options: `dtype` and `rngs` of the layers.
  """

  def __init__(
    self,
    channels: Sequence[int],
    *,
    upsampling: str,
    norm: str,
    masks_padding: bool = False,
    options,
  ):
    block = functools.partial(BasicBlock, masks_padding=masks_padding)
    self.branches = nnx.List(
      [nnx.List([residual_block(block, c, c, norm, options) for _ in range(BLOCKS)])
       for c in channels]
    )  # fmt: skip
    self.fuse = nnx.List(
      [
        nnx.Dict(
          {
            f"from_{source}": nnx.List(path(channels, source, target, norm, options))
            for source in range(len(channels))
            if source != target
          }
        )
        for target in range(len(channels))
      ]
    )
    self.upsampling = upsampling

  def __call__(self, maps: Sequence[FeatureMap], run: Callable) -> list[FeatureMap]:
    """Applies the module to one map per branch; `run(layer, x)` applies one layer."""
    done = []
    for x, blocks in zip(maps, self.branches, strict=True):
      for block in blocks:
        x = run(block, x)
      done.append(x)
    fused = []
    for i, (x, paths) in enumerate(zip(done, self.fuse, strict=True)):
      total_BHWC = x.values_BHWC
      for j, y in enumerate(done):
        if i == j:
          continue
        for layer in paths[f"from_{j}"]:
          y = run(layer, y)
        total_BHWC = total_BHWC + upsampled(y, x, self.upsampling)
      fused.append(x.with_values(nnx.relu(total_BHWC)))
    return fused


def residual_block(block: Callable, in_channels: int, width: int, norm: str, options) -> nnx.Module:
  """Builds a residual block with stride 1 and without context."""
  return block(
    in_channels,
    width,
    stride=1,
    dilations=(1, 1),
    context=Context("none", downsample=False),
    norm=norm,
    options=options,
  )


def path(channels: Sequence[int], source: int, target: int, norm: str, options) -> list[ConvNorm]:
  """Builds the convolutions from one branch of a module to another."""
  options = dict(norm=norm, **options)
  if source > target:
    return [ConvNorm(channels[source], channels[target], 1, relu=False, **options)]
  inner = [
    ConvNorm(channels[source], channels[source], 3, stride=2, **options)
    for _ in range(source + 1, target)
  ]
  last = ConvNorm(channels[source], channels[target], 3, stride=2, relu=False, **options)
  return [*inner, last]


def upsampled(x: FeatureMap, fine: FeatureMap, upsampling: str) -> jax.Array:
  """Upsamples a map to the size of a map with the same or a smaller stride.

  The factor is the ratio of the strides, whatever the sizes are, so that positions keep their place in the
  image where a size is not a multiple of the factor.

  Args:
    x: map to upsample.
    fine: map whose size and stride the result has.
    upsampling: one of `UPSAMPLINGS`; "bilinear" has half-pixel centres and does not read padding.

  Returns:
    [B, H, W, C] of x's dtype.
  """
  factor = x.stride // fine.stride
  if factor == 1:
    return x.values_BHWC
  if upsampling == "bilinear":
    return upsampled_bilinear(x, fine)
  height, width = fine.size
  rows_BHwC = jnp.repeat(x.values_BHWC, factor, axis=1)[:, :height]
  return jnp.repeat(rows_BHwC, factor, axis=2)[:, :, :width]


class HRNet(nnx.Module):
  """HRNetV2 with the branches of stage 4 as levels of strides 4, 8, 16 and 32.

  Two 3x3 convolutions with stride 2 and four bottlenecks, then stages of 2, 3 and 4 branches. A stage
  starts with a new branch, made of the last one by a 3x3 convolution with stride 2.

  Args:
    name: "hrnet_w48", whose branches have 48, 96, 192 and 384 channels.
    width: channels of the stem and of the inner convolutions of stage 1, 64 in the paper. The channels of
      the branches change by the same factor.
    norm: normalisation, see `layers.Norm`; "frozen_bn" for pretrained backbones.
    frozen: whether the network is frozen: it uses its running statistics in training too.
    upsampling: how coarser branches are upsampled where branches exchange features: "nearest" in the
      classification networks (the release, timm), "bilinear" in the release for segmentation.
    output_stride: stride of the last level, pixels. With 32, it is the last branch. With 16, 8 or 4, it is
      HRNetV2's representation at this stride: all four branches, the coarser ones upsampled bilinearly
      (section 3.2) and the finer ones averaged, concatenated.
    masks_padding: whether the convolutions of residual blocks see zeros on padding, see `ResNet`; the others
      always do.
    remat: what the backward pass computes again in each layer or residual block, see `models.remat`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the name or one of the options does not exist, or the width does not fit.
  """

  coarsest_stride = 32

  def __init__(
    self,
    name: str,
    *,
    width: int = STEM_CHANNELS,
    norm: str = "frozen_bn",
    frozen: bool = False,
    upsampling: str = "nearest",
    output_stride: int = 32,
    masks_padding: bool = False,
    remat: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("backbone", name, FINEST_CHANNELS)
    check_choice("upsampling", upsampling, UPSAMPLINGS)
    check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    finest, left = divmod(width * FINEST_CHANNELS[name], STEM_CHANNELS)
    if left:
      raise ValueError(f"backbone.width={width} must be a multiple of 4 for {name}")
    branches = tuple(finest * 2**i for i in range(BRANCHES))
    options = dict(dtype=dtype, rngs=rngs)
    normed = dict(norm=norm, **options)
    self.stem = nnx.List([ConvNorm(c, width, 3, stride=2, **normed) for c in (3, width)])
    expanded = width * Bottleneck.expansion

    bottleneck = functools.partial(Bottleneck, stride_in="3x3", masks_padding=masks_padding)
    first = [
      residual_block(bottleneck, expanded if i else width, width, norm, options)
      for i in range(BLOCKS)
    ]
    stages, transitions = [nnx.List(first)], []
    for count, modules in enumerate(MODULES, start=2):
      if count == 2:
        new = [
          ConvNorm(expanded, branches[0], 3, **normed),
          ConvNorm(expanded, branches[1], 3, stride=2, **normed),
        ]
      else:
        new = [ConvNorm(branches[count - 2], branches[count - 1], 3, stride=2, **normed)]
      transitions.append(nnx.List(new))
      exchanging = [
        HRModule(
          branches[:count],
          upsampling=upsampling,
          norm=norm,
          masks_padding=masks_padding,
          options=options,
        )
        for _ in range(modules)
      ]
      stages.append(nnx.List(exchanging))
    self.stages = nnx.List(stages)
    self.transitions = nnx.List(transitions)
    last = branches[-1] if output_stride == self.coarsest_stride else sum(branches)
    self.channels = (*branches[:-1], last)
    self.output_stride = output_stride
    self.frozen = frozen
    self.remat = remat

  def __call__(
    self, image_BHWC: jax.Array, valid_BHW: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """Computes the features of normalised images.

    Args:
      image_BHWC: [B, H, W, 3] float, normalised, zero on padding.
      valid_BHW: [B, H, W] bool, the positions on the image.
      train: use and update batch statistics where the norm has any and is not frozen.

    Returns:
      Levels of strides 4, 8, 16 and `output_stride`, with `self.channels` channels.
    """
    policy = self.remat if train else "none"
    train = train and not self.frozen
    run = recomputed(lambda layer, x: layer(x, train=train), policy)
    x = FeatureMap(image_BHWC, valid_BHW, 1)
    with jax.named_scope("stem"):
      for layer in self.stem:
        x = run(layer, x)
    with jax.named_scope("stages.0"):
      for block in self.stages[0]:
        x = run(block, x)
    maps: list[FeatureMap] = []
    for i, transition in enumerate(self.transitions):
      with jax.named_scope(f"transitions.{i}"):
        source = maps[-1] if maps else x
        maps = maps + [run(layer, source) for layer in transition]
      with jax.named_scope(f"stages.{i + 1}"):
        for module in self.stages[i + 1]:
          maps = module(maps, run)
    if self.output_stride == self.coarsest_stride:
      return tuple(maps)
    return (*maps[:-1], representation(maps, self.output_stride))


def representation(maps: Sequence[FeatureMap], stride: int) -> FeatureMap:
  """Concatenates maps at one stride, which one of them has: HRNetV2's features (section 3.2, fig. 4b)."""
  (target,) = (x for x in maps if x.stride == stride)
  resized = []
  for x in maps:
    while x.stride < stride:
      x = average_pool(x)
    resized.append(target.with_values(upsampled(x, target, "bilinear")))
  return concatenated(*resized)
