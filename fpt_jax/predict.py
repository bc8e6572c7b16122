"""Predictions for images: pictures and JSON."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from fpt_jax.restored import Restored
from fpt_jax.run.folder import run_folder
from fpt_jax.run.progress import Progress
from fpt_jax.tasks import pictures
from fpt_jax.tasks.subjects import Subject, unused_path
from fpt_jax.tasks.task import task_of

SHEET_PICTURES = 12
SHEET_COLUMNS = 3


def predict(
  restored: Restored, subjects: Iterator[Subject], total: int, workdir: str, *, min_score: float
) -> None:
  """Makes predictions for images and draws them, next to the ground truth where there is one.

  Writes `predictions/<name>.png` for every image, `predictions/contact_sheet.png` with the first of
  them, `predictions/predictions.json` with the task's entries for all of them, and the task's other
  files, such as `predictions/<name>_labels.png`.

  Args:
    restored: the model.
    subjects: the images.
    total: number of images, for the progress bar.
    workdir: folder of the run, on a disk.
    min_score: lowest score of a detection that is drawn; the JSON has every detection.
  """
  out = pathlib.Path(str(run_folder(workdir) / "predictions"))
  out.mkdir(parents=True, exist_ok=True)
  config = restored.config
  task = task_of(config)
  entries: list[dict[str, Any]] = []
  taken: set[str] = set()
  sheet: list[np.ndarray] = []
  done = 0
  with Progress("predict", total) as progress:
    for subject in subjects:
      found = restored.infer(subject.image_HWC)
      entries += task.to_entries(config, subject.name, found)
      picture = task.draw_prediction(config, subject.image_HWC, found, subject.truth, min_score)
      path = unused_path(out, pathlib.Path(subject.name).stem, taken)
      Image.fromarray(picture).save(path)
      task.write_prediction(config, workdir, path.stem, subject.name, found)
      if len(sheet) < SHEET_PICTURES:
        sheet.append(picture)
      done += 1
      progress.advance()
  (out / "predictions.json").write_text(json.dumps(entries))
  if sheet:
    overview = pictures.contact_sheet(sheet, SHEET_COLUMNS)
    Image.fromarray(overview).save(out / "contact_sheet.png")
  logging.info("%d pictures, contact_sheet.png and predictions.json in %s", done, out)
