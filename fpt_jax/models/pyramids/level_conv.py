"""The convolution of detection pyramids.

Shapes: B batch, H W rows and columns of the result, h w those of the input, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.layers import Norm, conv_arguments


class LevelConv(nnx.Conv):
  """A convolution with a bias, or without one and with a normalisation behind it.

  It derives from `nnx.Conv` so that its arrays have the same names with every normalisation.

  Args:
    in_channels, out_channels, kernel: see `layers.conv`.
    norm: normalisation, see `layers.Norm`; "none" for a bias.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
    options: other arguments of `layers.conv`.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
    **options,
  ):
    arguments = conv_arguments(in_channels, out_channels, kernel, bias=norm == "none", **options)
    super().__init__(**arguments, dtype=dtype, rngs=rngs)
    self.norm = Norm(norm, out_channels, dtype=dtype, rngs=rngs)

  def __call__(self, x_BhwC: jax.Array, valid_BHW: jax.Array, *, train: bool) -> jax.Array:
    """Convolves and normalises.

    Args:
      x_BhwC: [B, h, w, C] features.
      valid_BHW: [B, H, W] bool, the positions of the result that lie on the image.
      train: use and update batch statistics where the norm has any.

    Returns:
      [B, H, W, C].
    """
    return self.norm(super().__call__(x_BhwC), valid_BHW=valid_BHW, train=train)
