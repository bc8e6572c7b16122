"""Feature pyramids from the levels of a backbone.

Those of detection, in `PYRAMIDS`, have a stride a level. Those of segmentation, in `PIXEL_PYRAMIDS`,
are made of a dilated backbone's last maps and have one size.
"""

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.heads.afnb import AsymmetricFusion
from fpt_jax.models.pyramids.aspp import AtrousSpatialPyramid
from fpt_jax.models.pyramids.bfi import BidirectionalFeatureInteraction
from fpt_jax.models.pyramids.bfp import BottomUpFeaturePyramid
from fpt_jax.models.pyramids.bpa import BottomUpPathAugmentation
from fpt_jax.models.pyramids.fpn import FeaturePyramidNetwork
from fpt_jax.models.pyramids.ppm import PyramidPooling
from fpt_jax.models.pyramids.ufp import UnscathedFeaturePyramid

PYRAMIDS = {
  "bfp": BottomUpFeaturePyramid,
  "fpn": FeaturePyramidNetwork,
  "bpa": BottomUpPathAugmentation,
  "bfi": BidirectionalFeatureInteraction,
}
PIXEL_PYRAMIDS = {
  "ufp": UnscathedFeaturePyramid,
  "ppm": PyramidPooling,
  "aspp": AtrousSpatialPyramid,
  "afnb": AsymmetricFusion,
}


def build_pixel_pyramid(config, in_channels, *, rngs: nnx.Rngs) -> nnx.Module | None:
  """The pyramid of segmentation that the `model` part of a config names.

  Args:
    config: that part.
    in_channels: of the backbone's levels.
    rngs: for the initial weights.

  Returns:
    A module (backbone's Pyramid, train) -> Pyramid, with `channels`, those of each level; None for
    "none".

  Raises:
    ValueError: it does not exist.
  """
  name = config.pyramid.name
  if name == "none":
    return None
  if name not in PIXEL_PYRAMIDS:
    choices = ", ".join((*PIXEL_PYRAMIDS, "none"))
    raise ValueError(f"pyramid {name!r} does not exist; choose one of {choices}")
  own = {
    "ufp": dict(kernels=tuple(config.pyramid.kernels)),
    "aspp": dict(output_stride=config.backbone.output_stride),
  }
  return PIXEL_PYRAMIDS[name](
    in_channels,
    channels=config.pyramid.channels,
    norm=config.norm,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
    **own.get(name, {}),
  )
