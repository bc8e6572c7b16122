"""The ground truth of prepared records in COCO's format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ml_collections
import numpy as np

from fpt_jax.data.prepared import info
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances
from fpt_jax.tasks.detection.examples import read


def coco_ground_truth(data: ml_collections.ConfigDict, split: str) -> dict:
  """Rebuilds the annotation file of a split from its records, without decoding images.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax.

  Returns:
    COCO's `images`, `annotations` (segmentation, area, iscrowd, bbox as x, y, w, h, category_id as
    in the data set's file, and any further fields of the record) and `categories`.

  Raises:
    UserError: the data are not prepared, or a record cannot be read.
  """
  dataset = info(data)
  truth = {"images": [], "annotations": [], "categories": []}
  for category_id, name in zip(dataset.category_ids, dataset.category_names, strict=True):
    truth["categories"].append({"id": category_id, "name": name})
  with contextlib.closing(Reader(data, split)) as reader:
    for index in range(len(reader)):
      record = read(reader, index)
      height, width = record.size
      truth["images"].append(
        {"id": record.image_id, "file_name": record.file_name, "height": height, "width": width}
      )
      truth["annotations"] += _annotations(record, dataset.category_ids)
  return truth


def images(
  data: ml_collections.ConfigDict, split: str
) -> Iterator[tuple[str, np.ndarray, list[dict]]]:
  """Reads the images of a split at the size of their files.

  Args:
    data: the config's `data`.
    split: split in TFDS syntax.

  Yields:
    File name, uint8 RGB [H, W, 3], and the image's annotations as in `coco_ground_truth`.

  Raises:
    UserError: the data are not prepared, or a record or its image cannot be read.
  """
  category_ids = info(data).category_ids
  with contextlib.closing(Reader(data, split)) as reader:
    for index in range(len(reader)):
      record = read(reader, index)
      image_HWC = reader.decode(index, record)
      yield record.file_name, image_HWC, _annotations(record, category_ids)


def _annotations(record: instances.Record, category_ids: tuple[int, ...]) -> list[dict]:
  """Returns the record's objects in the format of COCO's annotation file."""
  return [
    instances.decode_annotation(annotation)
    | {
      "id": int(record.annotation_ids[i]),
      "image_id": record.image_id,
      "category_id": category_ids[record.labels[i] - 1],
      "iscrowd": int(record.crowd[i]),
    }
    for i, annotation in enumerate(record.annotations)
  ]
