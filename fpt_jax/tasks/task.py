"""What training, evaluation and prediction ask of a task, as functions of the same names.

A task is a module with
  BATCH_KEYS: the arrays of a training batch that go to the devices.
  MAIN_METRIC: the figure by which an evaluation is known.
  settle(config, dataset): takes the data set's classes into a config that names none.
  train_batches(config, start_step): a context that gives an iterator over training batches.
  evaluate(config, structure, arrays, mesh, workdir): the figures of `config.data.eval_split`.
  predictor(config, structure, arrays): a function from an image to what is found in it.
  result(found, image): that, as `Restored.predict` gives it.
  images(config): the images of `config.data.eval_split` with their ground truth.
  entries(config, name, found): that, as `predictions.json` holds it.
  save(config, workdir, stem, name, found): what else of it belongs on the disk.
  draw(config, image, found, truth, min_score): that, as a picture.
  draw_example(config, batch, step, i): image i of a training batch, as a picture.
"""

from types import ModuleType

from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.tasks import detection, segmentation

TASKS = {"rcnn": detection, "segmenter": segmentation}


def task_of(config: ConfigDict) -> ModuleType:
  """The task of the model that a config describes.

  Raises:
    UserError: there is no such model.
  """
  name = config.model.name
  if name not in TASKS:
    raise UserError(f"--config: model {name!r} does not exist; choose one of {', '.join(TASKS)}")
  return TASKS[name]
