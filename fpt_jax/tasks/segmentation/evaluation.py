"""Evaluation of segmentation: mean IoU of the label maps of every image of a split.

Shapes: B images of a batch, H W rows and columns, T P true and predicted classes.
"""

import functools
import json
import math
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.data import VOID, DatasetInfo
from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import ResultsNotWrittenError, UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run import hosts, sharding, stop
from fpt_jax.run.folder import write_whole
from fpt_jax.run.progress import Progress
from fpt_jax.tasks import pictures
from fpt_jax.tasks.segmentation import batches, miou
from fpt_jax.tasks.segmentation.classes import class_table
from fpt_jax.tasks.segmentation.prediction import server_classes, submission_writer
from fpt_jax.tasks.segmentation.views import (
  labeller,
  rounding,
  scaled_canvas,
  scorer_at_one_scale,
)

CONFUSION_FILE = "confusion.json"


def check_evaluation(config: ConfigDict, dataset: DatasetInfo) -> None:
  """See `tasks.task.Task.check_evaluation`.

  Raises:
    UserError: the data set has a class that the model does not have, or, with `config.eval.submission`, no
      evaluation server.
  """
  class_table(config, dataset)
  if config.eval.submission:
    server_classes(config)


def evaluator(
  config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh
) -> Callable[[ConfigDict, Arrays, epath.Path], dict[str, float]]:
  """See `tasks.task.Task.evaluator`: the function `evaluate`."""
  label_batch = labeller(
    config,
    structure,
    place=functools.partial(sharding.to_devices, mesh=mesh),
    out_shardings=sharding.over_batch(mesh),
  )
  return functools.partial(evaluate, label_batch=label_batch)


def evaluate(
  config: ConfigDict,
  arrays: Arrays,
  folder: epath.Path,
  *,
  label_batch: Callable[..., jax.Array],
) -> dict[str, float]:
  """Evaluates a segmenter on `config.data.eval_split`, at the sizes of the image files.

  Writes `confusion.json` and a picture of it and, with `config.eval.submission`, the files for the data
  set's evaluation server into the folder `submission`.

  Args:
    config: config of the run, with the data to evaluate on.
    arrays: arrays of the model, on the devices.
    folder: folder of the results.
    label_batch: result of `views.labeller`.

  Returns:
    "mIoU", "mAcc", "aAcc" and "IoU/<class>", x100; the same on every host.

  Raises:
    UserError: the data do not fit the model, or the data set has no evaluation server.
    ResultsNotWrittenError: the results could not be written; the evaluation is complete.
  """
  split, model = config.data.eval_split, config.model
  to_class = class_table(config, data.info(config.data))
  write_submission = submission_writer(config, folder) if config.eval.submission else None
  not_written: UserError | None = None
  counts_TP = np.zeros((model.num_classes,) * 2, np.int64)
  total = data.num_images(config.data, split)
  eval_batches = batches.eval_batches(
    config.data,
    split,
    batch_size=config.eval.batch_size,
    remainder=rounding(config)["remainder"],
    **hosts.this_host(),
  )
  with eval_batches, Progress(f"evaluate {split}", total) as progress:
    for batch in eval_batches:
      truth_BHW = to_class[batch["original_label_BHW"]]
      predicted_BHW = sharding.local_part(
        label_batch(
          arrays,
          batch["image_BHWC"],
          batch["size_B2"],
          batch["original_size_B2"],
          truth_BHW.shape[1:],
        )
      )
      for i in np.flatnonzero(batch["valid_B"]):
        height, width = batch["original_size_B2"][i]
        predicted_HW = predicted_BHW[i, :height, :width]
        counts_TP += miou.confusion_matrix(
          truth_BHW[i, :height, :width], predicted_HW, model.num_classes, void=VOID
        )
        if write_submission and not not_written:
          try:
            write_submission(batch["file_name_B"][i].decode(), predicted_HW)
          except UserError as error:
            not_written = error  # the scores do not need the files
      progress.advance(int(batch["valid_B"].sum()) * jax.process_count())
      stop.check()
  counts_TP = hosts.from_all_hosts({"counts": counts_TP[None]})["counts"].sum(axis=0)
  metrics = score(config, counts_TP, total, folder)
  if not_written:
    raise ResultsNotWrittenError(not_written, metrics) from not_written
  return metrics


def eval_program(
  config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh, images: int
) -> tuple[jax.stages.Wrapped, tuple, dict]:
  """See `tasks.task.Task.eval_program`: the scores at the largest scale and canvas."""
  if not config.data.buckets:
    raise UserError(
      "config.data.buckets is empty: the canvases of an evaluation depend on the image files; set one, such "
      "as --config.data.buckets='((1024, 2048),)'"
    )
  if config.eval.window:
    raise UserError(
      "config.eval.window: the number of windows depends on the images; set '--config.eval.window=()' to "
      "compile an evaluation of whole images"
    )
  height, width = max(config.data.buckets, key=math.prod)
  canvas = scaled_canvas((height, width), max(config.eval.scales), **rounding(config))
  size_B2 = jax.ShapeDtypeStruct((images, 2), np.int32)
  inputs = (jax.ShapeDtypeStruct((images, *canvas, 3), np.float32), size_B2, size_B2)
  program = scorer_at_one_scale(config, structure, sharding.over_batch(mesh))
  return program, inputs, {"canvas": (height, width)}


def score(config: ConfigDict, counts_TP: np.ndarray, images: int, folder: epath.Path) -> dict:
  """Logs the table, writes the confusion matrix and its picture, and returns the metrics.

  Raises:
    ResultsNotWrittenError: a file could not be written.
  """
  names = config.model.class_names
  metrics = miou.scores(counts_TP, names)
  if jax.process_index() == 0:
    logging.info("%s, %d images:\n%s", config.data.eval_split, images, miou.format_table(metrics))
    path = folder / CONFUSION_FILE
    confusion = {"class_names": list(names), "counts": counts_TP.tolist()}
    try:
      write_whole(path, json.dumps(confusion))
      picture_HWC = pictures.draw_confusion(counts_TP, names, "pixels")
      write_whole(path.with_suffix(".png"), encode_png(picture_HWC))
    except UserError as error:
      raise ResultsNotWrittenError(error, metrics) from error
  return metrics
