"""Backbones by name: an image in, the levels C2 to C5 out."""

from flax import nnx

from fpt_jax.models.backbones.efficientnet import EfficientNetLite0
from fpt_jax.models.backbones.resnet import STAGE_BLOCKS, ResNet, check_choice


def resnet(config, **options) -> ResNet:
  return ResNet(
    config.name,
    width=config.width,
    norm=config.norm,
    context=config.context,
    stride_in=config.stride_in,
    **options,
  )


def efficientnet_lite0(config, **options) -> EfficientNetLite0:
  if config.context != "none":
    raise ValueError(
      f"context {config.context!r} is for a ResNet, not for backbone {config.name!r}; set it to 'none'"
    )
  return EfficientNetLite0(norm=config.norm, **options)


BACKBONES = dict.fromkeys(STAGE_BLOCKS, resnet) | {"efficientnet_lite0": efficientnet_lite0}


def build_backbone(config, *, output_stride: int = 32, dtype, rngs: nnx.Rngs) -> nnx.Module:
  """The backbone that the `model.backbone` part of a config names.

  Args:
    config: that part.
    output_stride: of the last level, 32, 16 or 8.
    dtype: of the computation.
    rngs: for the initial weights.

  Returns:
    A module (image_BHWC, valid_BHW, train) -> Pyramid, with `channels`, those of each level.

  Raises:
    ValueError: it, or a part of it, does not exist.
  """
  check_choice("backbone", config.name, tuple(BACKBONES))
  return BACKBONES[config.name](config, output_stride=output_stride, dtype=dtype, rngs=rngs)
