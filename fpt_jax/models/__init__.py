"""Models from configs."""

from flax import nnx
from ml_collections import FrozenConfigDict

from fpt_jax.errors import UserError
from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.rcnn import RCNN
from fpt_jax.models.segmenter import Segmenter
from fpt_jax.models.state import Skeleton, skeleton

MODELS = {"rcnn": RCNN, "segmenter": Segmenter}

__all__ = ["FeaturePyramidTransformer", "build", "structure_of"]


def build(config, rngs: nnx.Rngs) -> nnx.Module:
  """The model a config describes, with initial weights.

  Args:
    config: a whole config, see `configs/common.py`; only its `model` part is read.
    rngs: for the initial weights.

  Raises:
    ValueError: a part the config names does not exist.
  """
  if config.model.name not in MODELS:
    raise ValueError(
      f"model {config.model.name!r} does not exist; choose one of {', '.join(MODELS)}"
    )
  return MODELS[config.model.name](FrozenConfigDict(config.model), rngs=rngs)


def structure_of(config) -> Skeleton:
  """The skeleton of the model a config describes.

  Raises:
    UserError: a part the config names does not exist, or does not fit another.
  """
  try:
    return skeleton(lambda: build(config, nnx.Rngs(0)))
  except ValueError as error:
    raise UserError(f"--config: {error}") from error
