"""Images as the backbone was trained on them.

Shapes: B batch, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp


def normalize(config, image_BHWC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """The images less their mean, over their standard deviation, zero on padding.

  Args:
    config: `pixel_mean` and `pixel_std` of RGB in 0..1, and `channel_order`, "rgb" or "bgr".
    image_BHWC: [B, H, W, 3] RGB in 0..255.
    valid_BHW: [B, H, W] bool.

  Returns:
    [B, H, W, 3] float32 in the config's channel order.

  Raises:
    ValueError: the config's channel order does not exist.
  """
  order = config.channel_order
  if order not in ("rgb", "bgr"):
    raise ValueError(f"channel_order={order!r} does not exist; choose rgb or bgr")
  mean_C = jnp.asarray(config.pixel_mean, jnp.float32)
  std_C = jnp.asarray(config.pixel_std, jnp.float32)
  normalized = (image_BHWC / 255.0 - mean_C[None, None, None]) / std_C[None, None, None]
  if order == "bgr":
    normalized = normalized[..., ::-1]
  return jnp.where(valid_BHW[..., None], normalized, 0)
