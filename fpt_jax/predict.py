"""Images in, overlays and JSON out."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from fpt_jax.errors import UserError
from fpt_jax.restored import Restored
from fpt_jax.run import checkpoints
from fpt_jax.run.metrics import Countdown
from fpt_jax.tasks import pictures, task_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SHEET_PICTURES = 12


class Subject(NamedTuple):
  """An image to look at.

  Attributes:
    name: of its file.
    image_HWC: uint8 RGB.
    truth: its ground truth as the task's `images` gives it, or None where there is none.
  """

  name: str
  image_HWC: np.ndarray
  truth: Any


def predict(
  restored: Restored, subjects: Iterator[Subject], total: int, workdir: str, *, min_score: float
) -> None:
  """Looks at images and draws what was found, beside the ground truth where there is one.

  Writes `predictions/<name>.png` for every image, the first of them together as
  `predictions/contact_sheet.png`, `predictions/predictions.json`: the task's `entries` of all, and
  what the task saves beside them, such as `predictions/<name>_labels.png`.

  Args:
    restored: the model.
    subjects: the images.
    total: how many there are, for the time left.
    workdir: the run's folder, on a disk.
    min_score: of a detection that is drawn; the JSON has every one.
  """
  out = pathlib.Path(str(checkpoints.folder(workdir) / "predictions"))
  out.mkdir(parents=True, exist_ok=True)
  config = restored.config
  task = task_of(config)
  results, taken, sheet, done = [], set(), [], 0
  countdown = Countdown("predict", total, every_seconds=10)
  for done, subject in enumerate(subjects, 1):
    found = restored.infer(subject.image_HWC)
    results += task.entries(config, subject.name, found)
    picture = task.draw(config, subject.image_HWC, found, subject.truth, min_score)
    path = unused_path(out, pathlib.Path(subject.name).stem, taken)
    Image.fromarray(picture).save(path)
    task.save(config, workdir, path.stem, subject.name, found)
    if len(sheet) < SHEET_PICTURES:
      sheet.append(picture)
    countdown.tell(done)
  (out / "predictions.json").write_text(json.dumps(results))
  if sheet:
    Image.fromarray(pictures.contact_sheet(sheet, columns=3)).save(out / "contact_sheet.png")
  logging.info("%d pictures, contact_sheet.png and predictions.json in %s", done, out)


def subjects_of_files(files: list[pathlib.Path], *, skip_bad: bool) -> Iterator[Subject]:
  """The images in files; unreadable ones raise UserError, or are named and counted in the log."""
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
  """The images of `config.data.eval_split` with their ground truth."""
  yield from map(Subject._make, task_of(config).images(config))


def image_files(paths: list[str]) -> list[pathlib.Path]:
  """The files among `paths` and the images in the folders among them, sorted folder by folder.

  Raises:
    UserError: a path does not exist, or a folder has no image.
  """
  files = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
      if not inside:
        raise UserError(f"--images: {path} has no image ({', '.join(SUFFIXES)})")
      files += inside
    elif path.is_file():
      files.append(path)
    else:
      raise UserError(f"--images: {path} does not exist")
  return files


def read_image(file: pathlib.Path) -> np.ndarray:
  """uint8 RGB [H, W, 3], upright as the camera's orientation tag says.

  Raises:
    UserError: the file is no whole image.
  """
  try:
    with Image.open(file) as image:
      return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(
      f"{file} is no readable image ({' '.join(str(error).split())}); replace it, or pass over "
      "such files with --config.data.skip_bad"
    ) from error


def unused_path(folder: pathlib.Path, stem: str, taken: set[str]) -> pathlib.Path:
  """folder/stem.png, or stem_2, stem_3, ... where images of several folders share a name.

  A name is taken together with that of its label map, and `contact_sheet` is from the start.
  """
  candidate, number = stem, 1
  while not taken.isdisjoint((candidate, f"{candidate}_labels")) or candidate == "contact_sheet":
    number += 1
    candidate = f"{stem}_{number}"
  taken.update((candidate, f"{candidate}_labels"))
  return folder / f"{candidate}.png"
