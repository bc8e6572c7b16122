"""EfficientNet-Lite0 (Tan & Le 2019, and its Lite release: ReLU6, no squeeze-and-excitation).

Padding is TensorFlow's "SAME", which the released weights were trained with: on maps of even size, a
strided convolution pads more at the bottom and the right.

Shapes: B batch, H W rows and columns, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones.resnet import OUTPUT_STRIDES
from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid, downsample_valid, masked
from fpt_jax.models.layers import Norm
from fpt_jax.models.remat import recomputed
from fpt_jax.ops.convolution import pointwise
from fpt_jax.ops.depthwise import depthwise

EPSILON = 1e-3  # of the normalisations, as in the release


class Stage(NamedTuple):
  """Consecutive blocks with the same options.

  Attributes:
    blocks: number of blocks.
    kernel: side of the depthwise kernel.
    stride: stride of the first block.
    expansion: inner channels of a block over its input channels.
    channels: output channels.
    level: whether the output of the last block is a level of the pyramid.
  """

  blocks: int
  kernel: int
  stride: int
  expansion: int
  channels: int
  level: bool


STAGES = (
  Stage(1, 3, 1, 1, 16, False),
  Stage(2, 3, 2, 6, 24, True),
  Stage(2, 5, 2, 6, 40, True),
  Stage(3, 3, 2, 6, 80, False),
  Stage(3, 5, 1, 6, 112, True),
  Stage(4, 5, 2, 6, 192, False),
  Stage(1, 3, 1, 6, 320, True),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280


def same_conv(in_channels, out_channels, kernel, *, stride=1, dilation=1, groups=1, options):
  """Builds a k x k convolution without a bias, padded as TensorFlow's "SAME"."""
  convolution = jax.lax.conv_general_dilated
  if kernel == 1:
    convolution = pointwise
  elif groups == in_channels == out_channels:
    convolution = depthwise
  return nnx.Conv(
    in_channels,
    out_channels,
    (kernel, kernel),
    strides=stride,
    padding="SAME",
    kernel_dilation=dilation,
    feature_group_count=groups,
    use_bias=False,
    conv_general_dilated=convolution,
    kernel_init=nnx.initializers.variance_scaling(2.0 * groups, "fan_out", "normal"),
    **options,
  )


class MBConv(nnx.Module):
  """An inverted residual block: 1x1 to more channels, depthwise k x k with the stride, 1x1 to fewer.

  The last convolution has no activation. The input is added where its shape is that of the output.

  Args:
    in_channels, out_channels: channels of the input and the output.
    kernel, expansion: see `Stage`.
    stride, dilation: stride and dilation of the depthwise convolution.
    norm: normalisation behind each convolution, see `layers.Norm`.
    masks_padding: whether the depthwise convolution sees zeros on padding.
    options: `dtype` and `rngs` of the layers.
  """

  def __init__(
    self,
    in_channels,
    out_channels,
    *,
    kernel,
    stride,
    dilation,
    expansion,
    norm,
    masks_padding=False,
    options,
  ):
    inner = in_channels * expansion
    self.expands = expansion != 1
    if self.expands:
      self.expand = same_conv(in_channels, inner, 1, options=options)
      self.expand_bn = Norm(norm, inner, epsilon=EPSILON, **options)
    self.depthwise = same_conv(
      inner, inner, kernel, stride=stride, dilation=dilation, groups=inner, options=options
    )
    self.depthwise_bn = Norm(norm, inner, epsilon=EPSILON, **options)
    self.project = same_conv(inner, out_channels, 1, options=options)
    self.project_bn = Norm(norm, out_channels, epsilon=EPSILON, **options)
    self.stride = stride
    self.masks_padding = masks_padding
    self.residual = stride == 1 and in_channels == out_channels

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    valid = downsample_valid(x.valid_BHW, self.stride)
    y = x.values_BHWC
    if self.expands:
      y = nnx.relu6(self.expand_bn(self.expand(y), valid_BHW=x.valid_BHW, train=train))
    if self.masks_padding:
      y = masked(y, x.valid_BHW)
    y = nnx.relu6(self.depthwise_bn(self.depthwise(y), valid_BHW=valid, train=train))
    y = self.project_bn(self.project(y), valid_BHW=valid, train=train)
    if self.residual:
      y = y + x.values_BHWC
    return FeatureMap(y, valid, x.stride * self.stride)


class EfficientNetLite0(nnx.Module):
  """EfficientNet-Lite0 with levels of strides 4, 8, 16, 32 and 24, 40, 112, 320 channels.

  Args:
    norm: normalisation, see `layers.Norm`; "frozen_bn" for pretrained backbones.
    frozen: whether the network is frozen: it uses its running statistics in training too.
    output_stride: stride of the last level, pixels: 32, 16 or 8. Stages that would exceed it have
      dilations instead of strides, as in `ResNet`.
    masks_padding: as for `ResNet`.
    classes: number of classes of an ImageNet classifier to build as well; 0 for none.
    remat: what the backward pass computes again in each block, see `models.remat`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the output stride does not exist.
  """

  channels = tuple(stage.channels for stage in STAGES if stage.level)

  def __init__(
    self,
    *,
    norm: str = "frozen_bn",
    frozen: bool = False,
    output_stride: int = 32,
    masks_padding: bool = False,
    classes: int = 0,
    remat: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    options = dict(dtype=dtype, rngs=rngs)
    self.stem = same_conv(3, STEM_CHANNELS, 3, stride=2, options=options)
    self.stem_bn = Norm(norm, STEM_CHANNELS, epsilon=EPSILON, **options)
    in_channels, reached, dilation = STEM_CHANNELS, 2, 1
    blocks = []
    for stage in STAGES:
      for i in range(stage.blocks):
        stride, missing = stage.stride if i == 0 else 1, 1
        if reached * stride > output_stride:
          stride, missing = 1, stride
        reached *= stride
        block = MBConv(
          in_channels,
          stage.channels,
          kernel=stage.kernel,
          stride=stride,
          dilation=dilation,
          expansion=stage.expansion,
          norm=norm,
          masks_padding=masks_padding,
          options=options,
        )
        blocks.append(block)
        in_channels = stage.channels
        dilation *= missing  # for the blocks after this one, as in `ResNet`
    self.blocks = nnx.List(blocks)
    self.coarsest_stride = output_stride
    self.frozen = frozen
    self.remat = remat
    self.classes = classes
    if classes:
      self.head = same_conv(in_channels, HEAD_CHANNELS, 1, options=options)
      self.head_bn = Norm(norm, HEAD_CHANNELS, epsilon=EPSILON, **options)
      self.fc = nnx.Linear(HEAD_CHANNELS, classes, rngs=rngs)

  def __call__(
    self, image_BHWC: jax.Array, valid_BHW: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """Computes the features of normalised images.

    Args:
      image_BHWC: [B, H, W, 3] float, normalised, zero on padding.
      valid_BHW: [B, H, W] bool, the positions on the image.
      train: use and update batch statistics where the norm has any and is not frozen.

    Returns:
      Four levels of strides 4, 8, 16, 32, or the output stride where that is smaller, with
      `self.channels` channels.
    """
    policy = self.remat if train else "none"
    train = train and not self.frozen
    valid = downsample_valid(valid_BHW, 2)
    run_block = recomputed(lambda block, x: block(x, train=train), policy)
    y = nnx.relu6(self.stem_bn(self.stem(image_BHWC), valid_BHW=valid, train=train))
    x = FeatureMap(y, valid, 2)
    levels, blocks = [], iter(self.blocks)
    for stage in STAGES:
      for _ in range(stage.blocks):
        x = run_block(next(blocks), x)
      if stage.level:
        levels.append(x)
    return tuple(levels)

  def classify(self, image_BHWC: jax.Array) -> jax.Array:
    """Returns the ImageNet logits, [B, classes], of normalised images without padding.

    Raises:
      ValueError: there is no classifier.
    """
    if not self.classes:
      raise ValueError("this EfficientNet was built without a classifier (classes=0)")
    last = self(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))[-1]
    y_BHWC = nnx.relu6(self.head_bn(self.head(last.values_BHWC)))
    return self.fc(jnp.mean(y_BHWC, axis=(1, 2)))
