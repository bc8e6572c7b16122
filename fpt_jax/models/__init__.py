"""Models, and the function that builds one from a config.

Importing this package needs jax and flax only, so that `FeaturePyramidTransformer` can be used inside
any other model.
"""

from flax import nnx

from fpt_jax.errors import UserError
from fpt_jax.models.choices import check_choice
from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.gscnn import NAME as GSCNN
from fpt_jax.models.gscnn import GatedShapeCNN
from fpt_jax.models.heads.semantic import MIXERS
from fpt_jax.models.layers import DTYPES
from fpt_jax.models.rcnn import RCNN
from fpt_jax.models.segmenter import Segmenter
from fpt_jax.models.state import Skeleton, skeleton


def segmentation_network(config, *, rngs: nnx.Rngs) -> Segmenter | GatedShapeCNN:
  """Builds GSCNN if a config has its head, else a `Segmenter`; arguments as for both."""
  name = config.head.name
  check_choice("head", name, (*MIXERS, GSCNN))
  return (GatedShapeCNN if name == GSCNN else Segmenter)(config, rngs=rngs)


MODELS = {"rcnn": RCNN, "segmenter": segmentation_network}

__all__ = ["MODELS", "FeaturePyramidTransformer", "build", "structure_of"]


def build(config, rngs: nnx.Rngs) -> nnx.Module:
  """Builds the model that a config describes, with initial weights.

  Args:
    config: complete config, see `fpt_jax.configs`; only its `model` part is read.
    rngs: source of the initial weights.

  Returns:
    The model. Its `config` is a frozen copy of the `model` part, with the full name of the dtype.

  Raises:
    ValueError: a part that the config names does not exist, or does not fit another.
  """
  # Imported here because the rest of this package works without ml_collections.
  from ml_collections import ConfigDict, FrozenConfigDict

  check_choice("model", config.model.name, MODELS)
  check_choice("dtype", config.model.dtype, DTYPES)
  model = ConfigDict(config.model)
  model.dtype = DTYPES[model.dtype]
  return MODELS[model.name](FrozenConfigDict(model), rngs=rngs)


def structure_of(config) -> Skeleton:
  """Returns the structure of the model that a config describes, without its weights.

  Args:
    config: complete config, as for `build`.

  Raises:
    UserError: a part that the config names does not exist, or does not fit another.
  """
  try:
    return skeleton(lambda: build(config, nnx.Rngs(0)))
  except ValueError as error:
    raise UserError(f"--config: {error}") from error
