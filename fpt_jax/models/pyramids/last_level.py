"""The pyramid of networks without one."""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import Pyramid


class LastLevel(nnx.Module):
  """The last level of the backbone, unchanged: the dilated baseline of segmentation.

  Arguments are those of all pyramids, see `fpt_jax.models.pyramids`; only `in_channels` is used.
  """

  def __init__(
    self, in_channels, *, channels: int = 256, norm: str = "none", dtype=jnp.float32, rngs: nnx.Rngs
  ):
    del channels, norm, dtype, rngs
    self.channels = tuple(in_channels[-1:])

  def __call__(self, levels: Pyramid, *, train: bool = False) -> Pyramid:
    return levels[-1:]
