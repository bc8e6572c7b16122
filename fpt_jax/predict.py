"""Images in, overlays and JSON out."""

import json
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from fpt_jax import checkpoints, data, visualize
from fpt_jax.errors import UserError
from fpt_jax.metrics import coco
from fpt_jax.ops.masks import rasterize
from fpt_jax.restored import Restored

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SHEET_PICTURES = 12
_TELL_EVERY_SECONDS = 10


class Subject(NamedTuple):
  """An image to look at.

  Attributes:
    name: of its file.
    image_HWC: uint8 RGB.
    annotations: its ground truth in COCO's format, or None where there is none.
  """

  name: str
  image_HWC: np.ndarray
  annotations: list[dict] | None


def predict(
  restored: Restored, subjects: Iterator[Subject], total: int, workdir: str, *, min_score: float
) -> None:
  """Detects in images and draws what was found, beside the ground truth where there is one.

  Writes `predictions/<name>.png` for every image, the first of them together as
  `predictions/contact_sheet.png`, and `predictions/predictions.json`: COCO results with the `file_name`
  of each image in place of its id.

  Args:
    restored: the model.
    subjects: the images.
    total: how many there are, for the time left.
    workdir: the run's folder, on a disk.
    min_score: of what is drawn; the JSON has every detection.
  """
  out = pathlib.Path(str(checkpoints.folder(workdir) / "predictions"))
  out.mkdir(parents=True, exist_ok=True)
  model = restored.config.model
  names = dict(zip(model.category_ids, model.category_names, strict=False))
  results, taken, sheet = [], set(), []
  begun = told = time.monotonic()
  for done, subject in enumerate(subjects, 1):
    found = restored.detect(subject.image_HWC)
    results += [
      {"file_name": subject.name} | {k: v for k, v in result.items() if k != "image_id"}
      for result in coco.to_coco_results(0, **found)
    ]
    picture = draw(subject, found, names, min_score)
    path = unused_path(out, pathlib.Path(subject.name).stem, taken)
    Image.fromarray(picture).save(path)
    if len(sheet) < SHEET_PICTURES:
      sheet.append(picture)
    if time.monotonic() - told > _TELL_EVERY_SECONDS:
      told = time.monotonic()
      left = round((told - begun) / done * (total - done))
      logging.info("%d of %d images, %d:%02d left", done, total, *divmod(left, 60))
  (out / "predictions.json").write_text(json.dumps(results))
  if sheet:
    Image.fromarray(visualize.contact_sheet(sheet, columns=3)).save(out / "contact_sheet.png")
  logging.info("%d pictures, contact_sheet.png and predictions.json in %s", len(taken), out)


def draw(subject: Subject, found: dict, names: dict[int, str], min_score: float) -> np.ndarray:
  """The image with its detections; with ground truth, that on the left and the detections right."""
  shown = np.flatnonzero(found["scores"] >= min_score)
  detected = visualize.draw_detections(
    subject.image_HWC,
    found["boxes_xyxy"][shown],
    [names.get(int(i), str(i)) for i in found["category_ids"][shown]],
    found["scores"][shown],
    masks=None if found["rles"] is None else [found["rles"][i] for i in shown],
  )
  if subject.annotations is None:
    return detected
  xywh = np.array([a["bbox"] for a in subject.annotations], np.float64).reshape(-1, 4)
  size = subject.image_HWC.shape[:2]
  true = visualize.draw_detections(
    subject.image_HWC,
    np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
    [names.get(a["category_id"], str(a["category_id"])) for a in subject.annotations],
    masks=[rasterize(a["segmentation"], *size) for a in subject.annotations],
  )
  return visualize.contact_sheet([true, detected], columns=2, titles=["ground truth", "detected"])


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
  for name, image, annotations in data.images(config.data, config.data.eval_split):
    yield Subject(name, image, annotations)


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
  """folder/stem.png, or stem_2, stem_3, ... where images of several folders share a name."""
  candidate, number = stem, 1
  while candidate in taken:
    number += 1
    candidate = f"{stem}_{number}"
  taken.add(candidate)
  return folder / f"{candidate}.png"
