"""Roboflow's export in COCO's format: train/_annotations.coco.json, and a category for the project."""

import json

import pytest

from fpt_jax import data
from fpt_jax.errors import UserError
from tests.data.datasets.formats.sets import (
  HEIGHT,
  WIDTH,
  names_of,
  objects_of,
  prepared,
  settings,
  write_image,
  write_text,
)


def _source(root, category_id=1, **fields):
  categories = [
    {"id": 0, "name": "cards", "supercategory": "none"},
    {"id": 1, "name": "cards", "supercategory": "cards"},
  ]
  annotation = {"id": 0, "image_id": 0, "category_id": category_id, "bbox": [10, 5, 20, 15]}
  annotation |= {"area": 300, "segmentation": [], "iscrowd": 0} | fields
  image = {"id": 0, "file_name": "a_jpg.rf.01.jpg", "height": HEIGHT, "width": WIDTH}
  content = {"info": {}, "categories": categories, "images": [image], "annotations": [annotation]}
  for split in ("train", "valid"):
    write_image(root / split / "a_jpg.rf.01.jpg")
    write_text(root / split / "_annotations.coco.json", json.dumps(content))
  return root


def test_the_category_of_the_project_is_left_out(tmp_path):
  root = _source(tmp_path / "source")
  found = prepared("roboflow", root)
  assert found["train"]["categories"] == [{"id": 1, "name": "cards"}]
  assert objects_of(found["val"]) == [("a_jpg.rf.01.jpg", "cards", [10, 5, 20, 15])]
  assert not data.info(settings("roboflow", root)).has_masks


def test_a_category_with_objects_is_kept(tmp_path):
  root = _source(tmp_path / "source", category_id=0)
  with pytest.raises(UserError, match="'cards' is given twice"):
    prepared("roboflow", root)
  for split in ("train", "valid"):
    path = root / split / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["categories"][1]["name"] = "ace"
    path.write_text(json.dumps(content))
  assert names_of(prepared("roboflow", root)["train"]) == ["cards", "ace"]


def test_what_is_missing_is_named(tmp_path):
  root = _source(tmp_path / "source")
  (root / "valid/_annotations.coco.json").unlink()
  with pytest.raises(
    UserError, match=r"valid/_annotations.coco.json: no such file; see data.source"
  ):
    prepared("roboflow", root)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (
      {"format": "csv"},
      "data.format='csv' must be one of coco, roboflow, yolo, voc, labelme, cvat",
    ),
    ({"source": ""}, "data.source is empty; set it"),
    (
      {"source": "", "annotations": "a", "images": "b"},
      "data.annotations is for data.format='coco'",
    ),
    ({"name": "camvid"}, "data.format='yolo' is for data.name='coco', not for 'camvid'"),
    ({"builder": {"splits": {"all": ("a", "b")}}}, "'all' cannot name a split"),
    ({"builder": {"splits": {"a": "b"}}}, "must have an annotation file and an image folder"),
    ({"builder": {"splits": {"a": ("b", "c")}}}, "c: no such folder; see data.source"),
  ],
)
def test_fields_that_do_not_go_together(fields, words, tmp_path):
  write_text(tmp_path / "source/data.yaml", "names: [a]")
  coco = settings("yolo", tmp_path / "source")
  coco.update(fields)
  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  assert words in str(raised.value)
