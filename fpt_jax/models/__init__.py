"""Models from configs."""

from flax import nnx
from ml_collections import FrozenConfigDict

from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.rcnn import RCNN

MODELS = {"rcnn": RCNN}

__all__ = ["FeaturePyramidTransformer", "build"]


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
