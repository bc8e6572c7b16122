"""The evaluation of a run, in `--mode=eval` and in a training, on its main set and on `config.eval.sets`."""

from collections.abc import Callable

import jax
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.errors import ResultsNotWrittenError, UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run import hosts
from fpt_jax.run.eval_sets import configs_of_sets, errors_of_set, folder_of_set, in_set
from fpt_jax.tasks.task import Task, task_of


def prepare(config: ConfigDict, prepare_one: Callable[[ConfigDict], None] = data.prepare) -> None:
  """Prepares `config.data`, and the data of the sets that are from elsewhere.

  Args:
    config: a complete config.
    prepare_one: what prepares a data set, `data.prepare` or `data.prepare_for_all_hosts`.

  Raises:
    UserError: see `data.prepare`.
  """
  done: list[dict] = []
  for name, of_set in configs_of_sets(config).items():
    # sets often differ in their splits only
    records = of_set.data.to_dict() | {"eval_split": ""}
    if records not in done:
      done.append(records)
      with errors_of_set(name):
        prepare_one(of_set.data)


def evaluator(
  config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh, workdir: str
) -> Callable[[Arrays], dict[str, float]]:
  """Checks all sets, and returns the function that evaluates a model's arrays on them.

  Whatever the number of sets and of calls, it compiles once per canvas.

  Args:
    config: config of the run.
    structure: skeleton of the model.
    mesh: devices that share each batch, and have the arrays.
    workdir: folder of the run.

  Returns:
    A function from the model's arrays to the metrics of all sets: "bbox/AP" of `config.data.eval_split`,
    "NAME/bbox/AP" of a set of `config.eval.sets`. It writes the results of each set into the set's folder. It
    raises ResultsNotWrittenError, with the metrics of all sets, if results could not be written.

  Raises:
    UserError: the data of a set are not prepared, do not have the split, or do not fit the model.
  """
  task, sets = task_of(config), configs_of_sets(config)
  hosts.on_every_host(lambda: _check(task, sets))
  evaluate_set = task.evaluator(config, structure, mesh)

  def evaluate(arrays: Arrays) -> dict[str, float]:
    metrics: dict[str, float] = {}
    not_written: ResultsNotWrittenError | None = None
    for name, of_set in sets.items():
      if name:
        logging.info("evaluation set %s:", name)
      try:
        with errors_of_set(name):
          found = evaluate_set(of_set, arrays, folder_of_set(workdir, name))
      except ResultsNotWrittenError as error:
        found, not_written = error.metrics, not_written or error
      metrics |= {in_set(name, metric): value for metric, value in found.items()}
    if not_written:
      not_written.metrics = metrics
      raise not_written
    return metrics

  return evaluate


def _check(task: Task, sets: dict[str, ConfigDict]) -> None:
  for name, of_set in sets.items():
    with errors_of_set(name):
      dataset = data.info(of_set.data)  # which copies records from a bucket
      if name:
        task.adopt_classes(of_set, dataset)
      split = of_set.data.eval_split
      if not data.num_images(of_set.data, split):
        raise UserError(f"data.eval_split={split!r} has no images; choose another part")
      task.check_evaluation(of_set, dataset)
