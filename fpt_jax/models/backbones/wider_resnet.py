"""WiderResNet-38 (Wu et al. 2016): few residual blocks with many channels, optionally dilated.

Wu et al., Wider or Deeper: Revisiting the ResNet Model for Visual Recognition (arXiv 1611.10080). B2
to B7 are its residual stages.

Shapes: B batch, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid, downsample_valid, masked
from fpt_jax.models.layers import Norm, conv, dropout
from fpt_jax.models.remat import recomputed
from fpt_jax.ops.pooling import max_pool

NAMES = ("wider_resnet38",)
# Of the stages B2 to B7: number of blocks, channels of a block's convolutions as multiples of those of the
# stem, rate of the dropout before the last of them, and stride without dilation, pixels.
BLOCKS = (3, 3, 6, 3, 1, 1)
WIDTHS = ((2, 2), (4, 4), (8, 8), (8, 16), (8, 16, 32), (16, 32, 64))
DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
STRIDES = (2, 4, 8, 16, 32, 32)
POOLED = 2  # stages that begin with a maximum in place of a stride
OUTPUT_STRIDES = (32, 16, 8)


class PreActivationBlock(nnx.Module):
  """Two 3x3 convolutions, or a bottleneck of three, behind their normalisations and ReLUs.

  He et al., Identity Mappings in Deep Residual Networks (arXiv 1603.05027), fig. 4e. Where the
  shape changes, the shortcut is a 1x1 convolution of the normalised input.

  Args:
    in_channels: channels of the input.
    widths: channels of each convolution: two of 3x3, or 1x1, 3x3 and 1x1.
    stride: stride of the first convolution.
    dilation: dilation of the 3x3 convolutions.
    dropout: rate of dropout before the last convolution.
    norm: normalisation, see `layers.Norm`.
    masks_padding: whether the convolutions see zeros on padding.
    options: `dtype` and `rngs` of the layers.
  """

  def __init__(
    self,
    in_channels,
    widths,
    *,
    stride,
    dilation,
    dropout,
    norm,
    masks_padding=False,
    options,
  ):
    kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
    inputs = (in_channels, *widths[:-1])
    self.norms = nnx.List([Norm(norm, channels, **options) for channels in inputs])
    self.convs = nnx.List(
      [
        conv(
          *(inputs[i], widths[i], kernel),
          stride=1 if i else stride,
          dilation=dilation if kernel == 3 else 1,
          bias=False,
          **options,
        )
        for i, kernel in enumerate(kernels)
      ]
    )
    self.shortcut = (
      conv(in_channels, widths[-1], 1, stride=stride, bias=False, **options)
      if stride != 1 or in_channels != widths[-1]
      else None
    )
    self.stride = stride
    self.dropout = dropout
    self.masks_padding = masks_padding

  def __call__(self, x: FeatureMap, *, train: bool, key: jax.Array | None = None) -> FeatureMap:
    """Applies the block; `key` is a PRNG key for dropout, None for no dropout."""
    valid = downsample_valid(x.valid_BHW, self.stride)
    y = x.values_BHWC
    shortcut = y
    for i, (norm, convolution) in enumerate(zip(self.norms, self.convs, strict=True)):
      seen = valid if i else x.valid_BHW
      y = nnx.relu(norm(y, valid_BHW=seen, train=train))
      if self.masks_padding:
        y = masked(y, seen)
      if i == 0 and self.shortcut is not None:
        shortcut = self.shortcut(y)
      if i == len(self.convs) - 1:
        y = dropout(y, key, self.dropout, of="values")
      y = convolution(y)
    return FeatureMap(y + shortcut, valid, x.stride * self.stride)


class WiderResNet(nnx.Module):
  """A WiderResNet with the outputs of B3, B4, B5 and B7 as the levels C2..C5.

  The levels are sums of residual blocks: the normalisation behind the last one belongs to the classifier.

  Args:
    name: "wider_resnet38".
    width: channels of the stem, 64 in the paper. All others change by the same factor.
    norm: normalisation, see `layers.Norm`; "frozen_bn" for pretrained backbones.
    frozen: whether the network is frozen: it uses its running statistics in training too, and drops nothing.
    output_stride: stride of the last level, pixels: 32, 16 or 8. Stages that would exceed it have dilations
      2 and 4 instead of strides.
    masks_padding: whether convolutions and maxima do not see what is on padding, see `ResNet`.
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
    frozen: bool = False,
    output_stride: int = 32,
    masks_padding: bool = False,
    remat: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("backbone", name, NAMES)
    check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    options = dict(dtype=dtype, rngs=rngs)
    self.conv1 = conv(3, width, 3, bias=False, **options)
    in_channels, reached = width, 1
    stages: list[nnx.List] = []
    channels = [width]
    for i, blocks in enumerate(BLOCKS):
      stride = min(STRIDES[i], output_stride)
      widths = tuple(width * multiple for multiple in WIDTHS[i])
      layers = []
      for j in range(blocks):
        layer = PreActivationBlock(
          in_channels,
          widths,
          stride=1 if i < POOLED or j else stride // reached,
          dilation=STRIDES[i] // stride,
          dropout=DROPOUT[i],
          norm=norm,
          masks_padding=masks_padding,
          options=options,
        )
        layers.append(layer)
        in_channels = widths[-1]
      reached = stride
      stages.append(nnx.List(layers))
      channels.append(in_channels)
    self.stages = nnx.List(stages)
    self.stage_channels = tuple(channels)
    self.channels = tuple(channels[i] for i in (2, 3, 4, 6))
    self.coarsest_stride = output_stride
    self.masks_padding = masks_padding
    self.frozen = frozen
    self.remat = remat

  def __call__(
    self, image_BHWC: jax.Array, valid_BHW: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """Computes C2..C5 of normalised images, without dropout; see `every_stage`.

    Returns:
      Four levels of strides 4, 8, 16, 32, or the output stride where that is smaller, with
      `self.channels` channels.
    """
    stages = self.every_stage(image_BHWC, valid_BHW, train=train)
    return stages[2], stages[3], stages[4], stages[6]

  def every_stage(
    self,
    image_BHWC: jax.Array,
    valid_BHW: jax.Array,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> Pyramid:
    """Computes the outputs of the stem, B1, and of the stages B2 to B7.

    Args:
      image_BHWC: [B, H, W, 3] float, normalised, zero on padding.
      valid_BHW: [B, H, W] bool, the positions on the image.
      train: use and update batch statistics where the norm has any and is not frozen.
      key: PRNG key for the dropout in B6 and B7; None for no dropout.

    Returns:
      Seven maps of strides 1, 2, 4, 8, 16, 32 and 32, or the output stride where that is smaller, with
      `self.stage_channels` channels.
    """
    policy = self.remat if train else "none"
    train = train and not self.frozen
    with jax.named_scope("conv1"):
      stem_BHWC = recomputed(lambda conv1, x: conv1(x), policy)(self.conv1, image_BHWC)
    run_block = recomputed(lambda block, x, key: block(x, train=train, key=key), policy)
    x = FeatureMap(stem_BHWC, valid_BHW, 1)
    maps = [x]
    for i, stage in enumerate(self.stages):
      if i < POOLED:
        x = pooled(x, masks_padding=self.masks_padding)
      for j, block in enumerate(stage):
        drops = DROPOUT[i] and train and key is not None
        block_key = jax.random.fold_in(jax.random.fold_in(key, i), j) if drops else None
        with jax.named_scope(f"stages.{i}"):
          x = run_block(block, x, block_key)
      maps.append(x)
    return tuple(maps)


def pooled(x: FeatureMap, *, masks_padding: bool) -> FeatureMap:
  """[B, ceil(H / 2), ceil(W / 2), C]: 3x3 maxima with stride 2, of the positions on the image or of all."""
  valid = downsample_valid(x.valid_BHW, 2)
  if not masks_padding:
    return FeatureMap(max_pool(x.values_BHWC), valid, x.stride * 2)
  lowest = jnp.finfo(x.values_BHWC.dtype).min
  y = max_pool(jnp.where(x.valid_BHW[..., None], x.values_BHWC, lowest))
  return FeatureMap(masked(y, valid), valid, x.stride * 2)
