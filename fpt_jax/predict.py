"""Image files in, overlays and JSON out."""

import json
import pathlib
import time

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from fpt_jax import checkpoints, visualize
from fpt_jax.errors import UserError
from fpt_jax.metrics import coco
from fpt_jax.restored import Restored

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_TELL_EVERY_SECONDS = 10


def predict(
  restored: Restored, paths: list[str], workdir: str, *, min_score: float, skip_bad: bool
) -> list[pathlib.Path]:
  """Detects in image files and draws what was found.

  Writes `predictions/<name>.png` for every image and `predictions/predictions.json`: COCO results with the
  `file_name` of each image in place of its id.

  Args:
    restored: the model.
    paths: image files and folders of them.
    workdir: the run's folder.
    min_score: of what is drawn; the JSON has every detection.
    skip_bad: name and count unreadable files instead of stopping.

  Returns:
    The pictures' paths.

  Raises:
    UserError: a path does not exist, a folder has no image, or a file is no whole image.
  """
  files = image_files(paths)
  out = pathlib.Path(str(checkpoints.folder(workdir) / "predictions"))
  out.mkdir(parents=True, exist_ok=True)
  names = dict(
    zip(restored.config.model.category_ids, restored.config.model.category_names, strict=False)
  )
  results, pictures, bad = [], [], 0
  begun = told = time.monotonic()
  for done, file in enumerate(files, 1):
    try:
      image = read_image(file)
    except UserError as error:
      if not skip_bad:
        raise
      bad += 1
      logging.warning("skipped: %s", error)
      continue
    found = restored.detect(image)
    results += [
      {"file_name": str(file)} | {k: v for k, v in result.items() if k != "image_id"}
      for result in coco.to_coco_results(0, **found)
    ]
    shown = found["scores"] >= min_score
    picture = visualize.draw_detections(
      image,
      found["boxes_xyxy"][shown],
      [names.get(int(i), str(i)) for i in found["category_ids"][shown]],
      found["scores"][shown],
      masks=None if found["rles"] is None else [found["rles"][i] for i in np.flatnonzero(shown)],
    )
    pictures.append(unused_name(out / f"{file.stem}.png", pictures))
    Image.fromarray(picture).save(pictures[-1])
    if time.monotonic() - told > _TELL_EVERY_SECONDS:
      told = time.monotonic()
      left = round((told - begun) / done * (len(files) - done))
      logging.info("%d of %d images, %d:%02d left", done, len(files), *divmod(left, 60))
  (out / "predictions.json").write_text(json.dumps(results))
  skipped = f", {bad} unreadable files skipped" if bad else ""
  logging.info("%d pictures and predictions.json in %s%s", len(pictures), out, skipped)
  return pictures


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
  if not files:
    raise UserError("--mode=predict needs --images=FILE_OR_FOLDER[,FILE_OR_FOLDER...]")
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
      f"{file} is no readable image ({' '.join(str(error).split())}); replace it, or pass over such "
      "files with --config.data.skip_bad"
    ) from error


def unused_name(path: pathlib.Path, taken: list[pathlib.Path]) -> pathlib.Path:
  """`path`, or path_2, path_3, ... where two folders hold images of one name."""
  candidate, number = path, 1
  while candidate in taken:
    number += 1
    candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
  return candidate
