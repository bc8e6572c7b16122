"""The convolution of detection pyramids.

Shapes: B batch, H W rows and columns of the result, h w those of the input, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.layers import Norm, conv_arguments

INITS = {
  "fan_in": nnx.initializers.lecun_normal(),
  "fan_out": nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
}


class LevelConv(nnx.Conv):
  """A convolution with a bias, or without one and with a normalisation behind it.

  It derives from `nnx.Conv` so that its arrays have the same names with every normalisation.

  Args:
    in_channels, out_channels, kernel: see `layers.conv`.
    norm: normalisation, see `layers.Norm`; "none" for a bias.
    init: distribution of the initial weights: "fan_in" keeps the variance of the features (variance
      1 / fan-in, as in FPN's implementations); "fan_out" is He's for a ReLU (2 / fan-out), which doubles the
      variance of a level with twice as many channels.
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
    init: str = "fan_in",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
    **options,
  ):
    check_choice("init", init, INITS)
    options |= dict(bias=norm == "none", kernel_init=INITS[init])
    arguments = conv_arguments(in_channels, out_channels, kernel, **options)
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
