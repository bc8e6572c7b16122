"""The 3x3 convolutions of box and mask heads on pooled regions.

Shapes: N regions, P side of the pooled square, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.layers import Norm, conv

# Batch statistics would be those of the regions that are computed together, which are few.
REGION_NORMS = ("none", "frozen_bn", "group_norm")


def region_convs(
  channels: int,
  hidden: int,
  layers: int,
  *,
  norm: str,
  dtype=jnp.float32,
  rngs: nnx.Rngs,
) -> tuple[nnx.List, nnx.List]:
  """Builds convolutions with a bias, or without one and with a normalisation behind each.

  Args:
    channels: channels of the input.
    hidden: channels of the output of each.
    layers: number of convolutions.
    norm: one of `REGION_NORMS`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Returns:
    The convolutions and the normalisations, for `apply_region_convs`.

  Raises:
    ValueError: the normalisation does not exist here.
  """
  check_choice("norm of a head", norm, REGION_NORMS)
  options = dict(dtype=dtype, rngs=rngs)
  convs = [
    conv(
      hidden if i else channels,
      hidden,
      3,
      bias=norm == "none",
      **options,
    )
    for i in range(layers)
  ]
  return nnx.List(convs), nnx.List([Norm(norm, hidden, **options) for _ in convs])


def apply_region_convs(convs: nnx.List, norms: nnx.List, x_NPPC: jax.Array) -> jax.Array:
  """[N, P, P, C]: the convolutions, each with its normalisation and a ReLU."""
  for convolution, norm in zip(convs, norms, strict=True):
    x_NPPC = nnx.relu(norm(convolution(x_NPPC)))
  return x_NPPC
