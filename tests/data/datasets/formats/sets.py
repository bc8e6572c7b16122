"""What the tests of all formats share: images, reading a source, and a data set to convert."""

import pathlib

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.data.datasets.checks import ExifChoice
from fpt_jax.data.datasets.formats import FORMATS, convert
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from tests.data_sets import config, encode_tagged

HEIGHT, WIDTH = 40, 80


def write_image(path, size=(HEIGHT, WIDTH), orientation=1):
  """Writes a black JPEG with these stored pixels and this EXIF orientation."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encode_tagged(np.zeros((*size, 3), np.uint8), orientation, "JPEG"))


def write_text(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def read(fmt, root, *, splits=None, skip_bad=False, exif="apply"):
  """Returns the dictionaries of COCO's format of each split, before they are checked."""
  found = convert(FORMATS[fmt], root, splits, exif=ExifChoice(exif), skip_bad=skip_bad)
  return {split: part.content for split, part in found.items()}


def error_of(fmt, root, **options):
  """Returns the message of the error that reading raises; it must be one line."""
  with pytest.raises(UserError) as raised:
    read(fmt, root, **options)
  message = str(raised.value)
  assert "\n" not in message
  return message.replace(f"{root}/", "")


def settings(fmt, root: pathlib.Path, **fields):
  """Returns the `data` of a config that reads a source."""
  return config("coco", root.parent / "records", source=str(root), format=fmt, **fields)


def prepared(fmt, root: pathlib.Path, **fields):
  """Prepares a source, and returns the annotations in the records of each split."""
  coco = settings(fmt, root, **fields)
  data.prepare(coco)
  return {split: coco_ground_truth(coco, split) for split in data.info(coco).num_images}


def names_of(content):
  return [category["name"] for category in content["categories"]]


def objects_of(content):
  """Returns (file name, class, box) of each annotation."""
  files = {image["id"]: image["file_name"] for image in content["images"]}
  names = {category["id"]: category["name"] for category in content["categories"]}
  return [
    (files[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in content["annotations"]
  ]
