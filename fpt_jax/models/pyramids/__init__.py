"""Feature pyramids from the levels of a backbone."""

from fpt_jax.models.pyramids.bfp import BottomUpFeaturePyramid
from fpt_jax.models.pyramids.fpn import FeaturePyramidNetwork

PYRAMIDS = {"bfp": BottomUpFeaturePyramid, "fpn": FeaturePyramidNetwork}
