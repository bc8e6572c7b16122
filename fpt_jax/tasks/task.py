"""The interface of a task for training, evaluation and prediction, and the tasks by name.

A task is a package with the attributes and functions of `Task`. `TASKS` has it under the name
`config.model.name`, and `models.MODELS` has what builds the model under the same name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, get_args

import jax
import numpy as np
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax import configs
from fpt_jax.data import DatasetInfo
from fpt_jax.errors import UserError
from fpt_jax.models import remat
from fpt_jax.models.layers import DTYPES
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.ops import mos_attention
from fpt_jax.run import config_values, eval_sets, loggers
from fpt_jax.tasks import detection, segmentation
from fpt_jax.tasks.program import ImageProgram
from fpt_jax.tasks.queries import Queries

Found = dict[str, Any]
Evaluate = Callable[[ConfigDict, Arrays, epath.Path], dict[str, float]]


class Task(Protocol):
  """The functions of a task.

  Attributes:
    BATCH_KEYS: names of the arrays of a training batch that the model needs.
    MAIN_METRIC: name of the metric that every evaluation has.
    FROM_DATA: fields of `config.model` that a config may take from its data set. The first of them is
      empty until then.
    NOT_OF_THE_WEIGHTS: fields of `config.model`, or groups ending in ".", that may differ between two
      configs of the same weights.
    QUERIES: the functions for `--mode=explain`, or None if the task's models have no FPT.
  """

  BATCH_KEYS: tuple[str, ...]
  MAIN_METRIC: str
  FROM_DATA: tuple[str, ...]
  NOT_OF_THE_WEIGHTS: tuple[str, ...]
  QUERIES: Queries | None

  def check_config(self, config: ConfigDict) -> None:
    """Raises UserError if a field of the task has a value that is not possible."""

  def metric_names(self, config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of metrics that an evaluation may have; one that ends in "/" stands for a group."""

  def adopt_classes(self, config: ConfigDict, dataset: DatasetInfo) -> None:
    """Writes the classes of the data set into a config that does not name its classes.

    Raises:
      UserError: the data set does not fit the config.
    """

  def train_batches(
    self, config: ConfigDict, start_step: int
  ) -> AbstractContextManager[Iterator[dict[str, np.ndarray]]]:
    """Opens this host's training batches, beginning with those of `start_step`."""

  def check_evaluation(self, config: ConfigDict, dataset: DatasetInfo) -> None:
    """Checks, before work begins, that the model can be evaluated on a data set.

    Raises:
      UserError: the data set does not fit the config.
    """

  def evaluator(self, config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh) -> Evaluate:
    """Returns the function that evaluates a model; it compiles once per canvas.

    Returns:
      A function of a config, the model's arrays and a folder, that returns the metrics of the config's
      `data.eval_split` and writes the results into the folder. The config may have other `data` than that
      of the run.
    """

  def predictor(
    self, config: ConfigDict, structure: Skeleton, arrays: Arrays
  ) -> Callable[[np.ndarray], Found]:
    """Returns the function from an image, uint8 RGB [H, W, 3], to what the model finds in it."""

  def image_program(
    self, config: ConfigDict, structure: Skeleton, canvas: tuple[int, int] | None
  ) -> ImageProgram:
    """Returns the function from images of one size that `--mode=export` writes.

    Args:
      config: complete config.
      structure: skeleton of the model, built for the platform that the function will run on.
      canvas: (height, width) that images are laid on, pixels; None for what the config says.

    Raises:
      UserError: the config has test-time views that one program does not compute, or no canvas.
    """

  def to_result(self, found: Found, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
    """Converts what the predictor found to the form of `Restored.predict`."""

  def eval_images(self, config: ConfigDict) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Yields file name, image and ground truth of each image of `config.data.eval_split`."""

  def to_entries(self, config: ConfigDict, name: str, found: Found) -> list[dict[str, Any]]:
    """Converts what the predictor found to entries of `predictions.json`."""

  def write_prediction(
    self, config: ConfigDict, workdir: str, stem: str, name: str, found: Found
  ) -> None:
    """Writes files of a prediction other than its picture and its entries.

    Args:
      config: the run's config.
      workdir: the run's folder.
      stem: name of the picture without its ending.
      name: name of the image file.
      found: what the predictor found.
    """

  def draw_prediction(
    self, config: ConfigDict, image_HWC: np.ndarray, found: Found, truth: Any, min_score: float
  ) -> np.ndarray:
    """Draws what the predictor found, next to the ground truth unless that is None."""

  def draw_example(
    self, config: ConfigDict, batch: dict[str, np.ndarray], step: int, i: int
  ) -> np.ndarray:
    """Draws image `i` of the training batch of a step with its targets."""

  def canvas(self, config: ConfigDict) -> tuple[int, int]:
    """Returns (height, width) in pixels of the images that costs are counted for."""

  def batch_shapes(
    self, config: ConfigDict, images: int, canvas: tuple[int, int]
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each array of a training batch, by `BATCH_KEYS`."""

  def eval_program(
    self, config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh, images: int
  ) -> tuple[jax.stages.Wrapped, tuple, dict[str, Any]]:
    """Returns the jitted function that does the work of `evaluate` for a batch of one view.

    Args:
      config: complete config.
      structure: skeleton of the model.
      mesh: devices that share the batch.
      images: images of the batch.

    Returns:
      The jitted function; shapes of its arguments after the model's arrays; its static arguments by name.

    Raises:
      UserError: the config evaluates in several programs, or does not say on which canvases.
    """

  def forward(self, model: nnx.Module, image_BHWC: jax.Array, size_B2: jax.Array) -> Any:
    """Runs inference on a batch, as evaluation does without test-time views."""

  def cost_notes(self, config: ConfigDict) -> dict[str, str]:
    """Returns how often a module runs, for the modules that run once per region."""


TASKS: dict[str, Task] = {"rcnn": detection, "segmenter": segmentation}


def task_of(config: ConfigDict) -> Task:
  """Returns the task of the model that a config describes.

  Raises:
    UserError: the model does not exist.
  """
  name = config.model.name
  if name not in TASKS:
    raise UserError(f"config.model.name={name!r} does not exist; choose one of {', '.join(TASKS)}")
  return TASKS[name]


def check_types(config: ConfigDict) -> None:
  """Checks that a config, which may come from a damaged file, has all fields with the right types.

  Raises:
    UserError: a field is missing, or has a value of another type.
  """
  default = configs.DEFAULTS.get(config.model.name)
  if default is not None:
    config_values.check_types(config, default())


def check_config(config: ConfigDict, *, training: bool = True) -> None:
  """Checks the values of a config before any work begins.

  `config.model.dtype` gets its full name: "bf16" is accepted for "bfloat16".

  Args:
    config: complete config.
    training: whether to check the fields that only training reads.

  Raises:
    UserError: a value is not possible; the message has the field, its value, and what it must be.
  """
  task = task_of(config)
  check_types(config)
  rules = config_values.RULES | {
    "loggers": config_values.some_of(*loggers.LOGGERS),
    "model.dtype": config_values.one_of(*DTYPES),
    "model.remat": config_values.one_of(*remat.POLICIES),
    "model.remat_parts": config_values.some_of(*remat.PARTS),
    "model.fpt.implementation": config_values.one_of(*get_args(mos_attention.Implementation)),
  }
  config_values.check(config, rules | (config_values.TRAINING_RULES if training else {}))
  config.model.dtype = DTYPES[config.model.dtype]
  task.check_config(config)
  names = task.metric_names(config)
  eval_sets.check(config, names)
  sets = eval_sets.configs_of_sets(config)
  for name, of_set in sets.items():
    if name:
      with eval_sets.errors_of_set(name):
        check_config(of_set, training=False)
  if training:
    _check_best(config, names, tuple(sets))
    if config.init_from_step and not config.init_from:
      raise UserError(
        f"config.init_from_step={config.init_from_step!r} needs config.init_from, the folder of a run"
      )


def _check_best(config: ConfigDict, names: Sequence[str], sets: Sequence[str]) -> None:
  """Checks `checkpoint.best_metric` and the field that needs it, `eval.patience`."""
  best = config.checkpoint.best_metric
  possible = [eval_sets.in_set(of_set, name) for of_set in sets for name in names]
  known = any(best == name or (name.endswith("/") and best.startswith(name)) for name in possible)
  if best and not known:
    shown = ", ".join(f"{name}..." if name.endswith("/") else name for name in names)
    of_sets = ", ".join(f"{of_set}/..." for of_set in sets if of_set)
    raise UserError(
      f"config.checkpoint.best_metric={best!r} must be one of {shown}"
      + (f", or the same of a set, {of_sets}" if of_sets else "")
    )
  if config.eval.patience and not best:
    raise UserError(
      f"config.eval.patience={config.eval.patience} needs config.checkpoint.best_metric, such as {names[0]}"
    )
