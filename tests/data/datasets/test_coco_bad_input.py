"""Bad input in COCO's format is reported with its file, record and field."""

import json
import os
import re

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from tests.data_sets import HEIGHT, WIDTH, config, write_coco


def _annotation(i=0, **fields):
  return lambda root, content: content["annotations"][i].update(fields)


def _image(i=0, **fields):
  return lambda root, content: content["images"][i].update(fields)


def _file(name, change):
  def write(root, content):
    path = root / "train2017" / name
    path.write_bytes(change(path.read_bytes()))

  return write


def _named_pipe(root, content):
  (root / "train2017" / "grey.jpg").unlink()
  os.mkfifo(root / "train2017" / "grey.jpg")


def _grey_of_16_bits(root, content):
  pixels = np.zeros((WIDTH, HEIGHT), np.uint16)
  PIL.Image.fromarray(pixels).save(root / "train2017" / "tall.png")


def _drop(kind, i, field):
  return lambda root, content: content[kind][i].pop(field)


RUNS = {"size": [HEIGHT, WIDTH], "counts": [40, 200, 559]}
# how the data are damaged, words of the message, and (images, annotations) that skip_bad leaves
BAD = {
  "missing image": (
    lambda root, content: (root / "train2017" / "grey.jpg").unlink(),
    ("image id 5", "train2017/grey.jpg", "cannot be read"),
    (3, 3),
  ),
  "truncated image": (
    _file("rgb.jpg", lambda b: b[: len(b) // 2]),
    ("image id 70", "rgb.jpg", "undecodable image"),
    (3, 2),
  ),
  "not an image": (
    _file("tall.png", lambda b: b"hello"),
    ("image id 9", "tall.png", "undecodable image"),
    (3, 3),
  ),
  "named pipe": (
    _named_pipe,
    ("image id 5", "train2017/grey.jpg", "not a regular file"),
    (3, 3),
  ),
  "grey of 16 bits": (
    _grey_of_16_bits,
    ("image id 9", "tall.png", "8 bits per channel are needed; convert the file"),
    (3, 3),
  ),
  "duplicate image id": (_image(1, id=70), ("image id 70", "field id", "twice"), (3, 3)),
  "image id of text": (_image(1, id="5"), ("image id 5", "field id", "integer"), (3, 3)),
  "parent folder": (
    _image(2, file_name="../val2017/cmyk.jpg"),
    ("image id 6", "file_name", "../val2017"),
    (3, 4),
  ),
  "absolute path": (
    _image(2, file_name="/etc/passwd"),
    ("image id 6", "file_name", "/etc/passwd"),
    (3, 4),
  ),
  "wrong size": (
    _image(1, height=21),
    ("image id 5", "height", "21x40", "20x40", "grey.jpg"),
    (3, 3),
  ),
  "no width": (_drop("images", 2, "width"), ("image id 6", "field width", "missing"), (3, 4)),
  "duplicate annotation id": (_annotation(1, id=1000000007), ("1000000007", "twice"), (4, 3)),
  "unknown image": (
    _annotation(2, image_id=12345),
    ("annotation id 3", "image_id", "12345"),
    (4, 3),
  ),
  "unhashable image": (
    _annotation(2, image_id=[5]),
    ("annotation id 3", "image_id", "[5]"),
    (4, 3),
  ),
  "unknown category": (
    _annotation(2, category_id=4),
    ("annotation id 3", "category_id", "4"),
    (4, 3),
  ),
  "two points": (
    _annotation(3, segmentation=[[0, 0, 5, 5]]),
    ("annotation id 4", "segmentation", "2 points"),
    (4, 3),
  ),
  "odd numbers": (
    _annotation(3, segmentation=[[0, 0, 5, 5, 1, 2, 3]]),
    ("annotation id 4", "segmentation", "3.5 points"),
    (4, 3),
  ),
  "no segmentation": (
    _drop("annotations", 3, "segmentation"),
    ("annotation id 4", "segmentation", "missing"),
    (4, 3),
  ),
  "runs of another size": (
    _annotation(1, segmentation={"size": [HEIGHT, 41], "counts": [40, 200, 580]}),
    ("annotation id 2", "segmentation.size", "[20, 41]", "[20, 40]"),
    (4, 3),
  ),
  "runs too short": (
    _annotation(1, segmentation=RUNS),
    ("annotation id 2", "segmentation.counts"),
    (4, 3),
  ),
  "compressed runs too long": (
    _annotation(2, segmentation={"size": [HEIGHT, WIDTH], "counts": "X1X6`a00"}),
    ("annotation id 3", "segmentation.counts"),
    (4, 3),
  ),
  "compressed runs too short": (
    _annotation(2, segmentation={"size": [HEIGHT, WIDTH], "counts": "X1X6"}),
    ("annotation id 3", "segmentation.counts", "add up to 240, not to 20 x 40 = 800 pixels"),
    (4, 3),
  ),
  "crowd of text": (_annotation(0, iscrowd="0"), ("1000000007", "iscrowd", "'0'"), (4, 3)),
  "flat polygon": (
    _annotation(3, segmentation=[0, 30, 20, 30, 20, 40, 0, 40]),
    ("annotation id 4", "one flat list", "[[x0, y0, x1, y1, ...]]"),
    (4, 3),
  ),
  "polygon in fractions": (
    _annotation(3, segmentation=[[0, 0.75, 1, 0.75, 1, 1, 0, 1]]),
    ("annotation id 4", "bbox", "0..1 and 0.75..1", "0..20 and 30..40"),
    (4, 3),
  ),
  "image id beyond 64 bits": (
    _image(1, id=10**20 + 1),
    ("image id 100000000000000000001", "field id", "64 bits"),
    (3, 3),
  ),
  "annotation id beyond 64 bits": (
    _annotation(2, id=2**63),
    ("annotation id 9223372036854775808", "field id", "64 bits"),
    (4, 3),
  ),
  "image id of a float": (
    _annotation(2, image_id=5.0),
    ("annotation id 3", "image_id", "an integer: 5.0"),
    (4, 3),
  ),
  "NUL in a name": (
    _image(2, file_name="a\0.jpg"),
    ("image id 6", "file_name", "'a\\x00.jpg'"),
    (3, 4),
  ),
  "surrogate in a name": (
    _image(2, file_name="a\ud800.jpg"),
    ("image id 6", "file_name", "'a\\ud800.jpg'"),
    (3, 4),
  ),
  "box outside": (
    _annotation(3, bbox=[0, 30, 22, 10]),
    ("annotation id 4", "bbox", "[0, 30, 22, 10]", "height 40, width 20"),
    (4, 3),
  ),
  "negative box": (_annotation(3, bbox=[9, 9, -2, 1]), ("annotation id 4", "bbox"), (4, 3)),
  "three numbers": (_annotation(3, bbox=[0, 1, 2]), ("annotation id 4", "bbox"), (4, 3)),
  "not a number": (
    _annotation(3, bbox=[0, 1, 2, float("nan")]),
    ("annotation id 4", "bbox", "nan"),
    (4, 3),
  ),
  "area of text": (_annotation(3, area="big"), ("annotation id 4", "area", "big"), (4, 3)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_or_is_skipped(case, tmp_path, caplog):
  damage, words, left = BAD[case]
  source = tmp_path / "source"
  content = write_coco(source)
  damage(source, content)
  annotation_file = source / "annotations/instances_train2017.json"
  annotation_file.write_text(json.dumps(content))
  coco = config("coco", tmp_path / "data", source=str(source))

  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  message = str(raised.value)
  assert "\n" not in message
  for word in (str(annotation_file), "skip_bad", *words):
    assert word in message
  assert not data.is_prepared(coco)
  assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]

  coco.skip_bad = True
  with caplog.at_level("WARNING"):
    data.prepare(coco)
  assert all(word in caplog.text for word in words)
  assert re.search("prepare train: 1 skipped", caplog.text)
  truth = coco_ground_truth(coco, "train")
  assert (len(truth["images"]), len(truth["annotations"])) == left


def _write_json(text):
  return lambda root: (root / "annotations/instances_val2017.json").write_text(text)


def _change_json(change):
  def write(root):
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return write


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda root: root.rename(root.parent / "elsewhere"), ("data.source", "no such folder")),
    (
      lambda root: (root / "annotations/instances_val2017.json").unlink(),
      ("instances_val2017.json", "no such file"),
    ),
    (lambda root: (root / "val2017").rename(root / "other"), ("val2017", "no such folder")),
    (_write_json('{"images": [],\n "annotations": [}'), ("val2017.json", "line 2, column 18")),
    (_write_json("[]"), ("val2017.json", "field images must be a list")),
    (_change_json(lambda c: c.pop("categories")), ("val2017.json", "field categories")),
    (_change_json(lambda c: [c[k].clear() for k in ("images", "annotations")]), ("no good image",)),
    (_change_json(lambda c: c["categories"].clear()), ("val2017.json", "categories is empty")),
    (
      _change_json(lambda c: c["categories"][1].update(id=90)),
      ("val2017.json", "categories[1]", "id 90", "twice"),
    ),
    (_change_json(lambda c: c["categories"][1].pop("name")), ("categories[1]", "field name")),
    (_change_json(lambda c: c["categories"][1].update(name="bee")), ("val2017.json", "differ")),
  ],
)
def test_a_bad_layout_raises_even_if_bad_records_are_skipped(damage, words, tmp_path):
  source = tmp_path / "source"
  write_coco(source)
  damage(source)
  coco = config("coco", tmp_path / "data", source=str(source), skip_bad=True)
  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  assert all(word in str(raised.value) for word in words)
  assert "\n" not in str(raised.value)
  assert not data.is_prepared(coco)


def _in_fractions(content):
  sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
  for annotation in content["annotations"]:
    w, h = sizes[annotation["image_id"]]
    annotation["bbox"] = [v / s for v, s in zip(annotation["bbox"], (w, h, w, h), strict=True)]


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (_in_fractions, ("4 of 4 annotations", "0..1", "write x, y, w, h in pixels")),
    (
      lambda c: [a.update(bbox=[0, 0, 99, 99]) for a in c["annotations"]],
      ("split val has no good annotation among 4",),
    ),
    (
      lambda c: c["categories"][1].update(name="zebra"),
      ("field name of categories[1]", "'zebra' is given twice"),
    ),
  ],
)
def test_data_without_anything_usable_are_never_prepared(change, words, tmp_path):
  source = tmp_path / "source"
  write_coco(source)
  _change_json(change)(source)
  coco = config("coco", tmp_path / "data", source=str(source), skip_bad=True)
  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  for word in ("instances_val2017.json", *words):
    assert word in str(raised.value)
  assert "\n" not in str(raised.value) and not data.is_prepared(coco)
  assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda c: c["annotations"].clear(), "no annotation but 0 crowds"),
    (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "no annotation but 4 crowds"),
    (
      lambda c: [a["bbox"].__setitem__(3, 0) for a in c["annotations"]],
      "no annotation but 1 crowds and 3 objects whose",
    ),
  ],
)
def test_a_split_without_objects_is_not_trained_on(change, words, tmp_path, caplog):
  source = tmp_path / "source"
  content = write_coco(source)
  change(content)
  (source / "annotations/instances_train2017.json").write_text(json.dumps(content))
  coco = config("coco", tmp_path / "data", source=str(source))
  with caplog.at_level("WARNING"):
    data.prepare(coco)
  assert f"prepare train: no object to train on or to find: {words}" in caplog.text
  assert "prepare val" not in caplog.text
  for split in ("train", "train[:2]"):
    coco.train_split = split
    with pytest.raises(UserError, match=r"data\.train_split='train.* has no object to train on"):
      data.check_trainable(coco)
  for split in ("val", "train+val"):
    coco.train_split = split
    data.check_trainable(coco)


def test_categories_without_objects_are_named(tmp_path, caplog):
  source = tmp_path / "source"
  content = write_coco(source)
  content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 90]
  (source / "annotations/instances_train2017.json").write_text(json.dumps(content))
  with caplog.at_level("WARNING"):
    data.prepare(config("coco", tmp_path / "data", source=str(source)))
  assert "prepare train: no object of 1 of 2 categories: ant" in caplog.text
  assert "prepare val" not in caplog.text


def test_many_skipped_are_named_ten_times_and_counted(tmp_path, caplog):
  source = tmp_path / "source"
  content = write_coco(source)
  good = content["annotations"][0]
  content["annotations"] += [good | {"id": 100 + i, "category_id": 7} for i in range(25)]
  (source / "annotations/instances_train2017.json").write_text(json.dumps(content))
  with caplog.at_level("WARNING"):
    data.prepare(config("coco", tmp_path / "data", source=str(source), skip_bad=True))
  assert len(re.findall("skipped: .*category_id must be", caplog.text)) == 10 + 1
  assert "prepare train: 25 skipped: annotation: field category_id" in caplog.text


@pytest.mark.parametrize(
  "splits", [("train", "val"), {"train": "a.json"}, {"train": ("a.json",)}, {"train": ("", "b")}]
)
def test_splits_of_another_form(splits, tmp_path):
  data_config = config("coco", tmp_path / "data", source=str(tmp_path))
  data_config.builder = {"splits": splits}
  with pytest.raises(UserError, match=r"data\.builder\.splits=.* must have an annotation file and"):
    data.prepare(data_config)
