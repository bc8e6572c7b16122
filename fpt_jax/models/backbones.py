"""Backbones by name: an image in, the levels C2 to C5 out."""

from flax import nnx

from fpt_jax.models.resnet import STAGE_BLOCKS, ResNet


def resnet(config, **options) -> ResNet:
  return ResNet(config.name, width=config.width, norm=config.norm, **options)


BACKBONES = dict.fromkeys(STAGE_BLOCKS, resnet)


def build_backbone(config, *, dtype, rngs: nnx.Rngs) -> nnx.Module:
  """The backbone that the `model.backbone` part of a config names.

  Returns:
    A module (image_BHWC, valid_BHW, train) -> Pyramid, with `channels`, those of each level.

  Raises:
    ValueError: it does not exist.
  """
  if config.name not in BACKBONES:
    raise ValueError(
      f"backbone {config.name!r} does not exist; choose one of {', '.join(BACKBONES)}"
    )
  return BACKBONES[config.name](config, dtype=dtype, rngs=rngs)
