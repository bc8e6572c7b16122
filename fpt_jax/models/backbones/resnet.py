"""ResNet (He et al. 2016), optionally dilated or with context blocks.

Shapes: B batch, H W rows and columns, C channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones.context_blocks import (
  CONTEXTS,
  AttentionAugmentedConv,
  GlobalContext,
  NonLocal,
)
from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid, downsample_valid, masked
from fpt_jax.models.layers import Norm, conv
from fpt_jax.models.remat import recomputed
from fpt_jax.ops.pooling import max_pool
from fpt_jax.ops.residual import relu_of_sum

STAGE_BLOCKS = {
  "resnet18": (2, 2, 2, 2),
  "resnet34": (3, 4, 6, 3),
  "resnet50": (3, 4, 6, 3),
  "resnet101": (3, 4, 23, 3),
}
STRIDES_IN = ("3x3", "1x1")
OUTPUT_STRIDES = (32, 16, 8)


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions with a shortcut; the first has the stride, the second may be augmented.

  Args:
    in_channels, width: channels of the input and the output.
    stride: stride of the block.
    dilations: dilations of the two convolutions.
    context: context block, see `Context`.
    norm: normalisation, see `layers.Norm`.
    masks_padding: whether the 3x3 convolutions see zeros on padding.
    options: `dtype` and `rngs` of the layers.
  """

  expansion = 1

  def __init__(
    self, in_channels, width, *, stride, dilations, context, norm, masks_padding=False, options
  ):
    self.conv1 = conv(
      in_channels, width, 3, stride=stride, dilation=dilations[0], bias=False, **options
    )
    self.bn1 = Norm(norm, width, **options)
    self.conv2 = convolution(width, width, 1, dilations[1], context, options)
    self.bn2 = Norm(norm, width, **options)
    self.context = GlobalContext(width, **options) if context.kind == "global_context" else None
    self.shortcut = Shortcut(in_channels, width, stride, norm=norm, options=options)
    self.stride = stride
    self.masks_padding = masks_padding

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    valid = downsample_valid(x.valid_BHW, self.stride)
    y = self.conv1(x.masked() if self.masks_padding else x.values_BHWC)
    y = nnx.relu(self.bn1(y, valid_BHW=valid, train=train))
    if self.masks_padding:
      y = masked(y, valid)
    y = self.bn2(convolve(self.conv2, y, valid), valid_BHW=valid, train=train)
    if self.context is not None:
      y = self.context(y, valid_BHW=valid)
    shortcut = self.shortcut(x.values_BHWC, valid_BHW=valid, train=train)
    return FeatureMap(relu_of_sum(y, shortcut), valid, x.stride * self.stride)


class Bottleneck(nnx.Module):
  """1x1, 3x3 and 1x1 convolutions with a shortcut.

  Args:
    in_channels: channels of the input.
    width: inner channels; the output has four times as many.
    stride: stride of the block.
    dilations: dilation of the 3x3 convolution if it has the stride, and if the first 1x1 one has it.
    stride_in: convolution with the stride, "3x3" or "1x1".
    context: context block, see `Context`.
    norm: normalisation, see `layers.Norm`.
    masks_padding: whether the 3x3 convolution sees zeros on padding.
    options: `dtype` and `rngs` of the layers.
  """

  expansion = 4

  def __init__(
    self,
    in_channels,
    width,
    *,
    stride,
    dilations,
    stride_in,
    context,
    norm,
    masks_padding=False,
    options,
  ):
    out_channels = width * self.expansion
    self.strides = (stride, 1) if stride_in == "1x1" else (1, stride)
    self.conv1 = conv(in_channels, width, 1, stride=self.strides[0], bias=False, **options)
    self.bn1 = Norm(norm, width, **options)
    dilation = dilations[1 if stride_in == "1x1" else 0]
    self.conv2 = convolution(width, width, self.strides[1], dilation, context, options)
    self.bn2 = Norm(norm, width, **options)
    self.conv3 = conv(width, out_channels, 1, bias=False, **options)
    self.bn3 = Norm(norm, out_channels, **options)
    self.context = (
      GlobalContext(out_channels, **options) if context.kind == "global_context" else None
    )
    self.shortcut = Shortcut(in_channels, out_channels, stride, norm=norm, options=options)
    self.masks_padding = masks_padding

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    inside = downsample_valid(x.valid_BHW, self.strides[0])
    valid = downsample_valid(inside, self.strides[1])
    y = nnx.relu(self.bn1(self.conv1(x.values_BHWC), valid_BHW=inside, train=train))
    if self.masks_padding:
      y = masked(y, inside)
    y = self.bn2(convolve(self.conv2, y, inside), valid_BHW=valid, train=train)
    y = self.bn3(self.conv3(nnx.relu(y)), valid_BHW=valid, train=train)
    if self.context is not None:
      y = self.context(y, valid_BHW=valid)
    shortcut = self.shortcut(x.values_BHWC, valid_BHW=valid, train=train)
    return FeatureMap(relu_of_sum(y, shortcut), valid, x.stride * max(self.strides))


class Context(NamedTuple):
  """The context in a residual block.

  Attributes:
    kind: one of `context_blocks.CONTEXTS`.
    downsample: whether an augmented convolution attends at half the resolution.
  """

  kind: str
  downsample: bool


def convolution(in_channels, out_channels, stride, dilation, context: Context, options):
  """Builds the 3x3 convolution of a block, augmented with attention if the context says so."""
  if context.kind == "attention_augmented":
    return AttentionAugmentedConv(
      in_channels,
      out_channels,
      stride=stride,
      dilation=dilation,
      downsample=context.downsample,
      **options,
    )
  return conv(in_channels, out_channels, 3, stride=stride, dilation=dilation, bias=False, **options)


def convolve(convolution, x_BHWC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """Applies a convolution built by `convolution`; only attention uses the valid positions."""
  if isinstance(convolution, AttentionAugmentedConv):
    return convolution(x_BHWC, valid_BHW=valid_BHW)
  return convolution(x_BHWC)


class Shortcut(nnx.Module):
  """The identity, or a strided 1x1 convolution where the shape changes.

  Args:
    in_channels, out_channels, stride: channels and stride of the block.
    norm: normalisation behind the convolution, see `layers.Norm`.
    options: `dtype` and `rngs` of the layers.
  """

  def __init__(self, in_channels, out_channels, stride, *, norm, options):
    self.projects = stride != 1 or in_channels != out_channels
    if self.projects:
      self.conv = conv(in_channels, out_channels, 1, stride=stride, bias=False, **options)
      self.bn = Norm(norm, out_channels, **options)

  def __call__(self, x_BHWC: jax.Array, *, valid_BHW: jax.Array, train: bool) -> jax.Array:
    if not self.projects:
      return x_BHWC
    return self.bn(self.conv(x_BHWC), valid_BHW=valid_BHW, train=train)


class ResNet(nnx.Module):
  """A ResNet with the levels C2..C5.

  Args:
    name: "resnet18", "resnet34", "resnet50" or "resnet101".
    width: channels of the stem and of the inner convolutions of the first stage, 64 in the paper.
    norm: normalisation, see `layers.Norm`; "frozen_bn" for pretrained backbones.
    context: "non_local": one block before the last residual block of C4 (Wang et al. 2018, section 6);
      "global_context": a block in every residual block of C3 to C5, after its last normalisation (Cao et
      al. 2019, section 4.1); "attention_augmented": the 3x3 convolutions of C3 to C5, with attention on a
      coarser grid where the stride is 8 (Bello et al. 2019, section 4.2); or "none". The arrays that a
      plain ResNet does not have are below an attribute `context`.
    frozen: whether everything but the context blocks is frozen, with its running statistics in training too.
    stride_in: convolution of a bottleneck with the stride: "3x3" as in torchvision, or "1x1" as in the
      paper and in weights from Caffe.
    output_stride: stride of C5, pixels: 32, 16 or 8. Stages that would exceed it have dilations 2 and 4
      instead of strides (Yu et al. 2017, dilated residual networks). The convolution whose stride is
      removed keeps the dilation of the stage before, so that every 2nd or 4th position equals a position
      of the network without dilations, whose weights are used.
    masks_padding: whether convolutions see zeros on padding, so that an image's features do not depend on its
      canvas; otherwise they see what the layers before put there, as in torchvision.
    classes: number of classes of an ImageNet classifier to build as well; 0 for none.
    remat: what the backward pass computes again in each residual block, see `models.remat`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the name or one of the options does not exist.
  """

  def __init__(
    self,
    name: str,
    *,
    width: int = 64,
    norm: str = "frozen_bn",
    context: str = "none",
    frozen: bool = False,
    stride_in: str = "3x3",
    output_stride: int = 32,
    masks_padding: bool = False,
    classes: int = 0,
    remat: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    for what, value, choices in (
      ("backbone", name, tuple(STAGE_BLOCKS)),
      ("context", context, CONTEXTS),
      ("stride_in", stride_in, STRIDES_IN),
      ("output_stride", output_stride, OUTPUT_STRIDES),
    ):
      check_choice(what, value, choices)
    options = dict(dtype=dtype, rngs=rngs)
    block: Callable = functools.partial(Bottleneck, stride_in=stride_in)
    if name in ("resnet18", "resnet34"):
      block = BasicBlock
    self.conv1 = conv(3, width, 7, stride=2, bias=False, **options)
    self.bn1 = Norm(norm, width, **options)
    in_channels, reached, dilation = width, 4, 1
    stages: list[nnx.List] = []
    channels: tuple[int, ...] = ()
    for stage, blocks in enumerate(STAGE_BLOCKS[name]):
      stage_stride = min(4 * 2**stage, output_stride)
      before, dilation = dilation, 4 * 2**stage // stage_stride
      kind = context if stage > 0 else "none"
      layers = []
      for i in range(blocks):
        layer = block(
          in_channels,
          width * 2**stage,
          stride=stage_stride // reached,
          dilations=(dilation if i else before, dilation),
          context=Context(kind, downsample=stage_stride == 8),
          norm=norm,
          masks_padding=masks_padding,
          options=options,
        )
        layers.append(layer)
        in_channels, reached = width * 2**stage * layer.expansion, stage_stride
      stages.append(nnx.List(layers))
      channels += (in_channels,)
    self.channels = channels
    self.coarsest_stride = output_stride
    self.masks_padding = masks_padding
    self.frozen = frozen
    self.remat = remat
    self.stages = nnx.List(stages)
    self.context = (
      NonLocal(self.channels[2], norm=norm, **options) if context == "non_local" else None
    )
    self.fc = nnx.Linear(in_channels, classes, rngs=rngs) if classes else None

  def __call__(
    self, image_BHWC: jax.Array, valid_BHW: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """Computes C2..C5 of normalised images.

    Args:
      image_BHWC: [B, H, W, 3] float, normalised, zero on padding.
      valid_BHW: [B, H, W] bool, the positions on the image.
      train: use and update batch statistics where the norm has any and is not frozen.

    Returns:
      Four levels of strides 4, 8, 16, 32, or the output stride where that is smaller, with
      `self.channels` channels.
    """
    policy = self.remat if train else "none"
    train_context, train = train, train and not self.frozen
    valid = downsample_valid(valid_BHW, 2)

    def stem(conv1, bn1, image_BHWC):
      with jax.named_scope("conv1"):
        y = nnx.relu(bn1(conv1(image_BHWC), valid_BHW=valid, train=train))
      return max_pool(masked(y, valid) if self.masks_padding else y)

    run_block = recomputed(lambda block, x: block(x, train=train), policy)
    run_context = recomputed(lambda context, x: context(x, train=train_context), policy)
    y = recomputed(stem, policy)(self.conv1, self.bn1, image_BHWC)
    x = FeatureMap(y, downsample_valid(valid, 2), 4)
    levels = []
    for index, stage in enumerate(self.stages):
      for i, block in enumerate(stage):
        if self.context is not None and index == 2 and i == len(stage) - 1:
          with jax.named_scope("context"):
            x = run_context(self.context, x)
        with jax.named_scope(f"stages.{index}"):
          x = run_block(block, x)
      levels.append(x)
    return tuple(levels)

  def classify(self, image_BHWC: jax.Array) -> jax.Array:
    """Returns the ImageNet logits, [B, classes], of normalised images without padding.

    Raises:
      ValueError: there is no classifier.
    """
    if self.fc is None:
      raise ValueError("this ResNet was built without a classifier (classes=0)")
    c5 = self(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))[-1]
    return self.fc(jnp.mean(c5.values_BHWC, axis=(1, 2)))
