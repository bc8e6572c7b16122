"""Backbones by name: networks from an image to the levels C2..C5."""

from flax import nnx

from fpt_jax.models.backbones.efficientnet import EfficientNetLite0
from fpt_jax.models.backbones.hrnet import FINEST_CHANNELS, HRNet
from fpt_jax.models.backbones.resnet import STAGE_BLOCKS, ResNet
from fpt_jax.models.backbones.wider_resnet import NAMES as WIDER_RESNETS
from fpt_jax.models.backbones.wider_resnet import WiderResNet
from fpt_jax.models.choices import check_choice


def resnet(config, **options) -> ResNet:
  """Builds the ResNet that a config names; options are other arguments of `ResNet`."""
  return ResNet(
    config.name,
    width=config.width,
    norm=config.norm,
    context=config.context,
    frozen=config.frozen,
    masks_padding=config.masks_padding,
    stride_in=config.stride_in,
    **options,
  )


def efficientnet_lite0(config, **options) -> EfficientNetLite0:
  """Builds EfficientNet-Lite0; options are other arguments of `EfficientNetLite0`."""
  refuse_context(config)
  return EfficientNetLite0(
    norm=config.norm, frozen=config.frozen, masks_padding=config.masks_padding, **options
  )


def hrnet_v2(config, **options) -> HRNet:
  """Builds the HRNet that a config names; options are other arguments of `HRNet`."""
  refuse_context(config)
  return HRNet(
    config.name,
    width=config.width,
    norm=config.norm,
    frozen=config.frozen,
    upsampling=config.upsampling,
    masks_padding=config.masks_padding,
    **options,
  )


def wider_resnet38(config, **options) -> WiderResNet:
  """Builds the WiderResNet that a config names; options are other arguments of `WiderResNet`."""
  refuse_context(config)
  return WiderResNet(
    config.name,
    width=config.width,
    norm=config.norm,
    frozen=config.frozen,
    masks_padding=config.masks_padding,
    **options,
  )


def refuse_context(config) -> None:
  """Raises ValueError if a config asks for context blocks in a backbone that is not a ResNet."""
  if config.context != "none":
    raise ValueError(
      f"backbone {config.name!r} has no context blocks; set context={config.context!r} to 'none', or choose "
      "a ResNet"
    )


BACKBONES = {
  **dict.fromkeys(STAGE_BLOCKS, resnet),
  "efficientnet_lite0": efficientnet_lite0,
  **dict.fromkeys(FINEST_CHANNELS, hrnet_v2),
  **dict.fromkeys(WIDER_RESNETS, wider_resnet38),
}


def build_backbone(
  config, *, output_stride: int = 32, remat: str = "none", dtype, rngs: nnx.Rngs
) -> nnx.Module:
  """Builds the backbone that a config names.

  Args:
    config: `model.backbone` part of a config.
    output_stride: stride of the last level, pixels: 32, 16 or 8, or 4 for an HRNet.
    remat: what the backward pass computes again in each residual block, see `models.remat`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Returns:
    A module (image_BHWC, valid_BHW, *, train) -> Pyramid, with `channels`, the channels of each level, and
    `coarsest_stride`, the largest stride in it, pixels.

  Raises:
    ValueError: the backbone or one of its options does not exist.
  """
  check_choice("backbone", config.name, tuple(BACKBONES))
  options = dict(output_stride=output_stride, remat=remat, dtype=dtype, rngs=rngs)
  return BACKBONES[config.name](config, **options)
