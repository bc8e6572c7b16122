"""ResNet (He et al. 2016) with the stride in the 3x3 convolution, as torchvision has it.

Shapes: B batch, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, Pyramid, downsample_valid
from fpt_jax.models.layers import Norm, conv

STAGE_BLOCKS = {
  "resnet18": (2, 2, 2, 2),
  "resnet34": (3, 4, 6, 3),
  "resnet50": (3, 4, 6, 3),
  "resnet101": (3, 4, 23, 3),
}


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions around a shortcut."""

  expansion = 1

  def __init__(self, in_channels, width, *, stride, norm, dtype, rngs):
    self.conv1 = conv(in_channels, width, 3, stride=stride, bias=False, dtype=dtype, rngs=rngs)
    self.bn1 = Norm(norm, width, dtype=dtype, rngs=rngs)
    self.conv2 = conv(width, width, 3, bias=False, dtype=dtype, rngs=rngs)
    self.bn2 = Norm(norm, width, dtype=dtype, rngs=rngs)
    self.shortcut = Shortcut(in_channels, width, stride, norm=norm, dtype=dtype, rngs=rngs)
    self.stride = stride

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    valid = downsample_valid(x.valid_BHW, self.stride)
    y = self.bn1(self.conv1(x.values_BHWC), valid_BHW=valid, train=train)
    y = self.bn2(self.conv2(nnx.relu(y)), valid_BHW=valid, train=train)
    shortcut = self.shortcut(x.values_BHWC, valid_BHW=valid, train=train)
    return FeatureMap(nnx.relu(y + shortcut), valid, x.stride * self.stride)


class Bottleneck(nnx.Module):
  """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut; four times as wide outside."""

  expansion = 4

  def __init__(self, in_channels, width, *, stride, norm, dtype, rngs):
    out_channels = width * self.expansion
    self.conv1 = conv(in_channels, width, 1, bias=False, dtype=dtype, rngs=rngs)
    self.bn1 = Norm(norm, width, dtype=dtype, rngs=rngs)
    self.conv2 = conv(width, width, 3, stride=stride, bias=False, dtype=dtype, rngs=rngs)
    self.bn2 = Norm(norm, width, dtype=dtype, rngs=rngs)
    self.conv3 = conv(width, out_channels, 1, bias=False, dtype=dtype, rngs=rngs)
    self.bn3 = Norm(norm, out_channels, dtype=dtype, rngs=rngs)
    self.shortcut = Shortcut(in_channels, out_channels, stride, norm=norm, dtype=dtype, rngs=rngs)
    self.stride = stride

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    valid = downsample_valid(x.valid_BHW, self.stride)
    y = self.bn1(self.conv1(x.values_BHWC), valid_BHW=x.valid_BHW, train=train)
    y = self.bn2(self.conv2(nnx.relu(y)), valid_BHW=valid, train=train)
    y = self.bn3(self.conv3(nnx.relu(y)), valid_BHW=valid, train=train)
    shortcut = self.shortcut(x.values_BHWC, valid_BHW=valid, train=train)
    return FeatureMap(nnx.relu(y + shortcut), valid, x.stride * self.stride)


class Shortcut(nnx.Module):
  """The identity, or a strided 1x1 convolution where the shape changes."""

  def __init__(self, in_channels, out_channels, stride, *, norm, dtype, rngs):
    self.projects = stride != 1 or in_channels != out_channels
    if self.projects:
      self.conv = conv(
        in_channels, out_channels, 1, stride=stride, bias=False, dtype=dtype, rngs=rngs
      )
      self.bn = Norm(norm, out_channels, dtype=dtype, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array, *, valid_BHW: jax.Array, train: bool) -> jax.Array:
    if not self.projects:
      return x_BHWC
    return self.bn(self.conv(x_BHWC), valid_BHW=valid_BHW, train=train)


class ResNet(nnx.Module):
  """The features C2..C5 of an image, strides 4 to 32.

  Args:
    name: "resnet18", "resnet34", "resnet50" or "resnet101".
    width: channels of the stem and of the first stage's inner convolutions (64 in the paper).
    norm: see `layers.Norm`; "frozen_bn" for pretrained backbones.
    classes: also build the ImageNet classifier with this many classes; 0 for none.
    dtype: of the computation; parameters are float32.
    rngs: for the initial weights.
  """

  def __init__(
    self,
    name: str,
    *,
    width: int = 64,
    norm: str = "frozen_bn",
    classes: int = 0,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if name not in STAGE_BLOCKS:
      raise ValueError(f"backbone {name!r} does not exist; choose one of {', '.join(STAGE_BLOCKS)}")
    block = BasicBlock if name in ("resnet18", "resnet34") else Bottleneck
    self.conv1 = conv(3, width, 7, stride=2, bias=False, dtype=dtype, rngs=rngs)
    self.bn1 = Norm(norm, width, dtype=dtype, rngs=rngs)
    in_channels = width
    stages, self.channels = [], ()
    for stage, blocks in enumerate(STAGE_BLOCKS[name]):
      stage_width = width * 2**stage
      layers = []
      for i in range(blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        layers.append(
          block(in_channels, stage_width, stride=stride, norm=norm, dtype=dtype, rngs=rngs)
        )
        in_channels = stage_width * block.expansion
      stages.append(nnx.List(layers))
      self.channels += (in_channels,)
    self.stages = nnx.List(stages)
    self.fc = nnx.Linear(in_channels, classes, rngs=rngs) if classes else None

  def __call__(
    self, image_BHWC: jax.Array, valid_BHW: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """C2..C5 of normalised images.

    Args:
      image_BHWC: [B, H, W, 3] float, normalised, zero on padding.
      valid_BHW: [B, H, W] bool.
      train: use and update batch statistics where the norm has any.

    Returns:
      Four levels of strides 4, 8, 16, 32 and `self.channels` channels.
    """
    valid = downsample_valid(valid_BHW, 2)
    y = self.bn1(self.conv1(image_BHWC), valid_BHW=valid, train=train)
    y = nnx.max_pool(nnx.relu(y), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    x = FeatureMap(y, downsample_valid(valid, 2), 4)
    levels = []
    for stage in self.stages:
      for block in stage:
        x = block(x, train=train)
      levels.append(x)
    return tuple(levels)

  def classify(self, image_BHWC: jax.Array) -> jax.Array:
    """[B, classes] ImageNet logits of normalised images without padding."""
    if self.fc is None:
      raise ValueError("this ResNet was built without a classifier (classes=0)")
    c5 = self(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))[-1]
    return self.fc(jnp.mean(c5.values_BHWC, axis=(1, 2)))
