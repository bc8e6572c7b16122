"""The weights that a new training starts from: random ones, and those of another run or of a file."""

from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.errors import UserError
from fpt_jax.models.backbones.context_blocks import in_context_block
from fpt_jax.models.state import initial_arrays, within
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.best import best_step, parsed_step
from fpt_jax.run.config_file import read_config
from fpt_jax.tasks.task import check_config
from fpt_jax.weights.families import preprocessing
from fpt_jax.weights.imported import pretrained_shapes


def starting_arrays(
  config: ConfigDict, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Returns random weights, replaced by those of `config.init_from` where its arrays fit the model.

  Args:
    config: config of the run.
    shapes: shape, dtype and sharding of each array of the model by name.

  Raises:
    UserError: `config.init_from` does not have the step of `config.init_from_step`, or no array that fits, or
      its weights need other preprocessing.
  """
  arrays = initial_arrays(
    lambda: models.build(config, nnx.Rngs(config.seed)), sharding.shardings(shapes)
  )
  if not config.init_from:
    frozen_parts = [name for name in config.optim.frozen if within(name, "backbone")]
    if config.model.backbone.frozen or frozen_parts:
      logging.warning(
        "%s at random weights; set --config.init_from to pretrained ones",
        f"{frozen_parts[0]} is frozen" if frozen_parts else "the backbone is frozen",
      )
    return arrays
  other_config = read_config(config.init_from)
  check_config(other_config, training=False)
  check_preprocessing(config, other_config)
  other = checkpoints.manager(config.init_from, create=False)
  step = parsed_step(config.init_from_step)
  if step == "best":
    steps = other.all_steps()
    step = best_step(config.init_from, other_config, steps, flag="--config.init_from_step")
  step = checkpoints.choose_step(other, step)
  wanted = pretrained_shapes(config.init_from, shapes)
  loaded = checkpoints.restore_matching(other, step, wanted)
  other.close()
  fresh = sorted(set(arrays) - set(loaded))
  if fresh:
    logging.info(
      "%d arrays are not in %s and start from random values, %s first",
      *(len(fresh), config.init_from, fresh[0]),
    )
  missing = [n for n in fresh if within(n, "backbone") and not in_context_block(n)]
  if config.model.backbone.frozen and missing:
    logging.warning(
      "the backbone is frozen, and %d of its arrays are not in %s, %s first; import weights with this "
      "run's config, or train them with --config.model.backbone.frozen=False",
      *(len(missing), config.init_from, missing[0]),
    )
  return arrays | loaded


def check_preprocessing(config: ConfigDict, other: ConfigDict) -> None:
  """Checks that a run preprocesses images as its initial weights need it.

  Args:
    config: config of the run.
    other: config in the folder that `config.init_from` names.

  Raises:
    UserError: mean, standard deviation, channel order or strides differ.
  """
  theirs, ours = preprocessing(other.model), preprocessing(config.model)
  different = [
    field
    for field, value in ours.items()
    if (
      value != theirs[field]
      if isinstance(value, str)
      else not np.allclose(value, theirs[field], atol=1e-4)
    )
  ]
  if different:
    wanted, found, flags = (
      ", ".join(f"model.{field}={theirs[field]}" for field in different),
      ", ".join(str(ours[field]) for field in different),
      " ".join(f"'--config.model.{field}={theirs[field]}'" for field in different),
    )
    raise UserError(
      f"--config.init_from={config.init_from} has weights for {wanted}, and this run has {found}; set "
      f"{flags}"
    )
