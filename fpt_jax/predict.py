"""Predictions for images: pictures and JSON."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from fpt_jax.data.records.images import PREDICTION_ENDINGS, read_image
from fpt_jax.errors import UserError
from fpt_jax.restored import Restored
from fpt_jax.run.folder import run_folder
from fpt_jax.run.progress import Progress
from fpt_jax.tasks import pictures
from fpt_jax.tasks.task import task_of

SHEET_PICTURES = 12
SHEET_COLUMNS = 3


class Subject(NamedTuple):
  """An image to make a prediction for.

  Attributes:
    name: name of its file.
    image_HWC: uint8 RGB.
    truth: its ground truth as `Task.eval_images` yields it, or None.
  """

  name: str
  image_HWC: np.ndarray
  truth: Any


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


def subjects_of_files(files: list[pathlib.Path], *, skip_bad: bool) -> Iterator[Subject]:
  """Yields the images in files.

  Args:
    files: image files.
    skip_bad: whether to log and skip files that cannot be read.

  Raises:
    UserError: a file cannot be read, and `skip_bad` is False.
  """
  bad = 0
  for file in files:
    try:
      image = read_image(file)
    except UserError as error:
      if not skip_bad:
        raise
      bad += 1
      logging.warning("skipped: %s", error)
      continue
    yield Subject(str(file), image, None)
  if bad:
    logging.warning("%d of %d files skipped", bad, len(files))


def subjects_of_split(config: ConfigDict) -> Iterator[Subject]:
  """Yields the images of `config.data.eval_split` with their ground truth."""
  yield from map(Subject._make, task_of(config).eval_images(config))


def image_files(paths: list[str]) -> list[pathlib.Path]:
  """Returns the files among `paths`, and the images in the folders among them, sorted per folder.

  Raises:
    UserError: a path does not exist, or a folder has no images.
  """
  files = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PREDICTION_ENDINGS)
      if not inside:
        raise UserError(f"--images: {path} has no images ({', '.join(PREDICTION_ENDINGS)})")
      files += inside
    elif path.is_file():
      files.append(path)
    else:
      raise UserError(f"--images: {path} does not exist")
  return files


def unused_path(folder: pathlib.Path, stem: str, taken: set[str]) -> pathlib.Path:
  """Returns folder/stem.png, or stem_2, stem_3, ... if images of several folders share a name.

  Args:
    folder: folder of the pictures.
    stem: name of the image file without its ending.
    taken: names that are in use. The chosen name is added, together with that of its label map;
      `contact_sheet` is never chosen.
  """
  candidate, number = stem, 1
  while not taken.isdisjoint((candidate, f"{candidate}_labels")) or candidate == "contact_sheet":
    number += 1
    candidate = f"{stem}_{number}"
  taken.update((candidate, f"{candidate}_labels"))
  return folder / f"{candidate}.png"
