"""Feature pyramids from the levels of a backbone.

All are modules with one signature, `Pyramid(in_channels, *, channels, norm, dtype, rngs)`:

- in_channels: channels of each level of the backbone, fine to coarse.
- channels: channels of every output level.
- norm: normalisation behind each convolution, see `layers.Norm`; with "none" a convolution has a bias.
- dtype: dtype of the computation; parameters are float32.
- rngs: source of the initial weights.

They are called as `(levels, *, train) -> levels`, where `train` uses and updates batch statistics, and
their attribute `channels` is the number of channels of each output level. The pyramids of detection have
one stride per level. Those of segmentation are computed from the last levels of a dilated backbone, and
all their levels have one size.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.pyramids.afnb import AsymmetricFusion
from fpt_jax.models.pyramids.aspp import AtrousSpatialPyramid
from fpt_jax.models.pyramids.bfi import BidirectionalFeatureInteraction
from fpt_jax.models.pyramids.bfp import BottomUpFeaturePyramid
from fpt_jax.models.pyramids.bpa import BottomUpPathAugmentation
from fpt_jax.models.pyramids.fpn import FeaturePyramidNetwork
from fpt_jax.models.pyramids.last_level import LastLevel
from fpt_jax.models.pyramids.ppm import PyramidPooling
from fpt_jax.models.pyramids.ufp import UnscathedFeaturePyramid

PYRAMIDS = {
  "bfp": BottomUpFeaturePyramid,
  "fpn": FeaturePyramidNetwork,
  "bpa": BottomUpPathAugmentation,
  "bfi": BidirectionalFeatureInteraction,
  "ufp": UnscathedFeaturePyramid,
  "ppm": PyramidPooling,
  "aspp": AtrousSpatialPyramid,
  "afnb": AsymmetricFusion,
  "none": LastLevel,
}
DETECTION_PYRAMIDS = ("bfp", "fpn", "bpa", "bfi")
SEGMENTATION_PYRAMIDS = ("ufp", "ppm", "aspp", "afnb", "none")


def build_pyramid(
  config, names: tuple[str, ...], in_channels: tuple[int, ...], *, rngs: nnx.Rngs
) -> nnx.Module:
  """Builds the pyramid that a config names.

  Args:
    config: `model` part of a config.
    names: names of the task's pyramids, `DETECTION_PYRAMIDS` or `SEGMENTATION_PYRAMIDS`.
    in_channels: channels of each level of the backbone, fine to coarse.
    rngs: source of the initial weights.

  Returns:
    A module (levels, *, train) -> levels, with `channels`, the channels of each level.

  Raises:
    ValueError: the pyramid is not one of `names`, or its options do not fit.
  """
  name = config.pyramid.name
  check_choice("pyramid", name, names)
  options: dict[str, Any] = {}
  if name == "ufp":
    options["kernels"] = tuple(config.pyramid.kernels)
  elif name in ("bfp", "fpn", "bpa"):
    options["init"] = config.pyramid.init
  elif name == "aspp":
    options["output_stride"] = config.backbone.output_stride
  return PYRAMIDS[name](
    in_channels,
    channels=config.pyramid.channels,
    norm=config.pyramid.norm if name in DETECTION_PYRAMIDS else config.norm,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
    **options,
  )
