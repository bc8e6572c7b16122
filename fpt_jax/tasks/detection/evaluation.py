"""Evaluation of detection: pycocotools scores the detections in every image of a split.

Each host detects objects in its share of the images, and pastes and encodes their masks. The first host gets
all results, scores them, and sends the metrics to the others.

Shapes: B images of this host's part of a batch, D detections.
"""

import functools
import json
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from fpt_jax.data import DatasetInfo, canvases, info, num_images
from fpt_jax.errors import ResultsNotWrittenError, UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run import hosts, sharding, stop
from fpt_jax.run.folder import write_whole
from fpt_jax.run.progress import Progress
from fpt_jax.tasks.detection import analysis, batches, coco_ap, context_accuracy, views
from fpt_jax.tasks.detection.categories import (
  label_table,
  model_category_of,
  with_data_categories,
)
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from fpt_jax.tasks.detection.prediction import to_original_image

RESULTS_FILE = "coco_instances_results.json"


def check_evaluation(config: ConfigDict, dataset: DatasetInfo) -> None:
  """See `tasks.task.Task.check_evaluation`.

  Raises:
    UserError: the data set has a category that the model does not have, or does not have one that
      `config.eval.curves_of` names; or `config.eval.matcher` is not installed.
  """
  label_table(config, dataset)
  analysis.check_curves(config, dataset.category_names)
  coco_ap.MATCHERS[config.eval.matcher]()  # an error if it is not installed


def evaluator(
  config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh
) -> Callable[[ConfigDict, Arrays, epath.Path], dict[str, float]]:
  """See `tasks.task.Task.evaluator`: the function `evaluate`."""
  detect = views.detector(config, structure, sharding.over_batch(mesh))
  return functools.partial(evaluate, detect=detect, mesh=mesh)


def evaluate(
  config: ConfigDict,
  arrays: Arrays,
  folder: epath.Path,
  *,
  detect: views.Detect,
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """Evaluates a detector on `config.data.eval_split` with pycocotools.

  Writes `coco_instances_results.json`, with the category ids of the data set, and the files of
  `analysis.analyse`. Its categories are matched with the model's by name.

  Args:
    config: config of the run, with the data to evaluate on.
    arrays: arrays of the model, on `mesh`.
    folder: folder of the results.
    detect: result of `views.detector`.
    mesh: devices that share each batch.

  Returns:
    "bbox/AP", "segm/AR@100", ..., x100, see `coco_ap.metrics_of`; "bbox/dAP-Cls", ..., see `tide.errors`;
    with annotations that ask questions also "context/accuracy", ..., see `context_accuracy.evaluate`. Masks
    are scored if the model and the annotations have them. The metrics are the same on every host.

  Raises:
    UserError: the data set has a category that the model does not have, or a record cannot be read.
    ResultsNotWrittenError: the results could not be written after the evaluation.
  """
  model_categories = model_category_of(config, info(config.data))
  category_of_model = {ours: theirs for theirs, ours in model_categories.items()}
  split = config.data.eval_split
  # read before the images are evaluated, so that a bad record is not found after them
  ground_truth = hosts.on_first_host(lambda: coco_ground_truth(config.data, split))
  by_batch: list[list[dict]] = []
  unscored = 0
  eval_batches = batches.eval_batches(
    config.data,
    split,
    batch_size=config.eval.batch_size,
    short_edges=views.short_edges(config),
    **hosts.this_host(),
  )
  total = num_images(config.data, split)
  with eval_batches, Progress(f"evaluate {split}", total) as progress:
    for batch in eval_batches:
      first = {k: batch[k] for k in ("image_BHWC", "size_B2")}
      seen = [sharding.to_devices(v, mesh) for v in (first, *batch.get("other_views", ()))]
      detections = {k: sharding.local_part(v) for k, v in detect(arrays, seen).items()}
      results: list[dict] = []
      for i in np.flatnonzero(batch["valid_B"]):
        found = to_original_image(
          {name: values[i] for name, values in detections.items()},
          batch["size_B2"][i],
          batch["original_size_B2"][i],
          config.model,
        )
        scored = with_data_categories(found, category_of_model)
        unscored += len(found["scores"]) - len(scored["scores"])
        results += coco_ap.to_coco_results(batch["image_id_B"][i], **scored)
      by_batch.append(results)
      progress.advance(int(batch["valid_B"].sum()) * jax.process_count())
      stop.check()
  of_hosts = hosts.gather({"by_batch": by_batch, "unscored": unscored})
  if unscored := sum(host["unscored"] for host in of_hosts):
    logging.info("%d detections are of categories that the data set does not have", unscored)
  # as one host would have found them
  of_batches = zip(*(host["by_batch"] for host in of_hosts), strict=True)
  in_order = [result for parts in of_batches for part in parts for result in part]
  has_masks = info(config.data).has_masks
  return score(config, ground_truth, in_order, folder, has_masks=has_masks)


def eval_program(
  config: ConfigDict, structure: Skeleton, mesh: jax.sharding.Mesh, images: int
) -> tuple[jax.stages.Wrapped, tuple, dict]:
  """See `tasks.task.Task.eval_program`: the function that detects in one view."""
  short_edges = views.short_edges(config)
  if len(short_edges) > 1 or config.eval.flip:
    raise UserError(
      "config.eval.short_edges and config.eval.flip evaluate in several programs; leave one size and "
      "no mirror images to compile that of one view"
    )
  canvas = batches.largest_canvas(canvases.at_short_edge(config.data, short_edges[0]))
  view = {
    "image_BHWC": jax.ShapeDtypeStruct((images, *canvas, 3), np.float32),
    "size_B2": jax.ShapeDtypeStruct((images, 2), np.int32),
  }
  return views.detector_in_one_view(structure, sharding.over_batch(mesh)), (view,), {}


def score(
  config: ConfigDict,
  ground_truth: dict | None,
  results: list[dict],
  folder: epath.Path,
  *,
  has_masks: bool = True,
) -> dict[str, float]:
  """Logs the metrics, writes the results and their analysis, and returns the metrics, on every host.

  Args:
    config: config of the run.
    ground_truth: see `ground_truth.coco_ground_truth`; only the first host needs it.
    results: detections in all images, in the form of `coco_ap.to_coco_results`.
    folder: folder of the files.
    has_masks: whether the annotations have masks; if not, only boxes are scored.

  Raises:
    ResultsNotWrittenError: a file could not be written; on the first host only.
  """
  files: dict[str, str | bytes] = {RESULTS_FILE: json.dumps(results)}
  iou_types = ("bbox", "segm") if config.model.mask_head.enabled and has_masks else ("bbox",)
  if config.model.mask_head.enabled and not has_masks:
    logging.info("masks are not scored: the annotations of the data set are boxes without masks")

  def measure() -> dict[str, float]:
    assert ground_truth is not None
    evaluations = coco_ap.evaluations(ground_truth, results, iou_types, config.eval.matcher)
    metrics = coco_ap.metrics_of(evaluations)
    analysed = analysis.analyse(config, evaluations)
    files.update(analysed.files)
    context = context_accuracy.evaluate(ground_truth, results)
    logging.info(
      "%s: %d detections in %d images\n%s",
      *(config.data.eval_split, len(results), len(ground_truth["images"])),
      coco_ap.format_table(metrics),
    )
    logging.info("%s", analysed.text)
    if context:
      logging.info("%s", context_accuracy.format_line(context))
    return metrics | analysed.metrics | context

  metrics = hosts.from_first_host(measure)
  if jax.process_index() == 0:
    try:
      for name, content in files.items():
        write_whole(folder / name, content)
    except UserError as error:
      raise ResultsNotWrittenError(error, metrics) from error
  return metrics
