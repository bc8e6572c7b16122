"""Feature Pyramid Transformer (Zhang et al. 2020): three transformers and their wiring."""

from fpt_jax.models.fpt.feature_pyramid_transformer import (
  LITERAL,
  FeaturePyramidTransformer,
  build_fpt,
)
from fpt_jax.models.fpt.grounding_transformer import GroundingTransformer
from fpt_jax.models.fpt.rendering_transformer import RenderingTransformer
from fpt_jax.models.fpt.self_transformer import SelfTransformer

__all__ = [
  "LITERAL",
  "FeaturePyramidTransformer",
  "GroundingTransformer",
  "RenderingTransformer",
  "SelfTransformer",
  "build_fpt",
]
