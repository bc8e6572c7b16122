"""Normalisation of images, as the backbone was trained with it.

Shapes: B batch, H W rows and columns, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpt_jax.models.choices import check_choice

CHANNEL_ORDERS = ("rgb", "bgr")


class Preprocessing(NamedTuple):
  """What pretrained weights expect.

  Attributes:
    pixel_mean, pixel_std: mean and standard deviation of RGB in 0..1.
    stride_in: convolution of a bottleneck with the stride, see `backbones.resnet.ResNet`.
    channel_order: order of the channels in the file of weights. The importer converts "bgr" to "rgb".
  """

  pixel_mean: tuple[float, float, float]
  pixel_std: tuple[float, float, float]
  stride_in: str = "3x3"
  channel_order: str = "rgb"


def _caffe(red: float, green: float, blue: float) -> Preprocessing:
  """Returns the preprocessing of weights for BGR in 0..255, minus a mean that is given as RGB in 0..255."""
  return Preprocessing((red / 255, green / 255, blue / 255), (1 / 255,) * 3, "1x1", "bgr")


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EFFICIENTNET_LITE = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)
# Detectron's and detectron2's configs have different means for the same ImageNet weights of MSRA.
DETECTRON = _caffe(122.7717, 115.9465, 102.9801)
DETECTRON2 = _caffe(123.675, 116.28, 103.53)
# of a ResNet's weights by the library that they come from
RESNET_WEIGHTS = {"torchvision": IMAGENET, "detectron": DETECTRON, "detectron2": DETECTRON2}


def normalize(config, image_BHWC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """Subtracts the mean from images and divides them by the standard deviation.

  Args:
    config: `model` part of a config, with `pixel_mean` and `pixel_std` of RGB in 0..1, and
      `channel_order`, "rgb" or "bgr".
    image_BHWC: [B, H, W, 3] RGB images in 0..255, float32 or uint8.
    valid_BHW: [B, H, W] bool, the positions on the image.

  Returns:
    [B, H, W, 3] float32 in the config's channel order; zero on padding.

  Raises:
    ValueError: the config's channel order does not exist.
  """
  check_choice("channel_order", config.channel_order, CHANNEL_ORDERS)
  mean_C = jnp.asarray(config.pixel_mean, jnp.float32)
  std_C = jnp.asarray(config.pixel_std, jnp.float32)
  normalized = (image_BHWC / 255.0 - mean_C[None, None, None]) / std_C[None, None, None]
  if config.channel_order == "bgr":
    normalized = normalized[..., ::-1]
  return jnp.where(valid_BHW[..., None], normalized, 0)
