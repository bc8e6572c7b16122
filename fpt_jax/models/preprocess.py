"""Normalisation of images, as the backbone was trained with it.

Shapes: B batch, H W rows and columns, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpt_jax.models.choices import check_choice

CHANNEL_ORDERS = ("rgb", "bgr")


class Preprocessing(NamedTuple):
  """Mean and standard deviation that pretrained weights expect, of RGB in 0..1."""

  pixel_mean: tuple[float, float, float]
  pixel_std: tuple[float, float, float]


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EFFICIENTNET_LITE = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)


def normalize(config, image_BHWC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """Subtracts the mean from images and divides them by the standard deviation.

  Args:
    config: `model` part of a config, with `pixel_mean` and `pixel_std` of RGB in 0..1, and
      `channel_order`, "rgb" or "bgr".
    image_BHWC: [B, H, W, 3] RGB images in 0..255.
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
