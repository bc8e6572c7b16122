"""Whatever annotation files and label files hold, their readers raise UserError or nothing."""

import base64
import copy
import io
import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies as st
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from fpt_jax.data.datasets import image_folder
from fpt_jax.data.datasets.coco import CocoInstances
from fpt_jax.data.records import instances, label_map
from fpt_jax.errors import UserError
from tests.fuzz import fuzz

HEIGHT, WIDTH = 6, 9
CONTENT = {
  "images": [
    {"id": i, "file_name": "0.png", "height": HEIGHT, "width": WIDTH, "license": 1}
    for i in (1, 2, 3)
  ],
  "annotations": [
    {
      "id": 10 * i + j,
      "image_id": i,
      "category_id": 1,
      "bbox": [2, 1.5, 4.0, 3],
      "area": 12.0,
      "iscrowd": int(isinstance(segmentation, dict)),
      "segmentation": segmentation,
    }
    for i in (1, 2, 3)
    for j, segmentation in enumerate(
      (
        [[2, 1, 6, 1, 6, 4, 2, 4.5]],
        {"size": [HEIGHT, WIDTH], "counts": [13, 3, 3, 3, 3, 3, 26]},
        {"size": [HEIGHT, WIDTH], "counts": "=3300000a0"},
      )
    )
  ],
  "categories": [{"id": 1, "name": "ant", "supercategory": "animal"}, {"id": 90, "name": "bee"}],
}
# UTF-8 cannot encode half of a surrogate pair, but JSON can
TEXT = st.text(max_size=8) | st.sampled_from(["0", "1", "a\0.png", "\ud800", "../0.png", "=0a", ""])
NUMBERS = (
  st.integers(-3, 100)
  | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 10**4299])
  | st.floats()
  | st.sampled_from([0.0, 1.0, 0.5, 1e-300, 1e39, 1e308])
)
VALUES = st.recursive(
  st.none() | st.booleans() | NUMBERS | TEXT,
  lambda inner: st.lists(inner, max_size=7) | st.dictionaries(TEXT, inner, max_size=3),
  max_leaves=10,
)


def _places(value):
  """Yields the container and the key of each value inside lists and dicts."""
  keys = range(len(value)) if isinstance(value, list) else list(value)
  for key in keys:
    yield value, key
    if isinstance(value[key], list | dict):
      yield from _places(value[key])


@st.composite
def changed_contents(draw):
  """The content of a good file with one to three values replaced, deleted or repeated."""
  content = copy.deepcopy(CONTENT)
  for _ in range(draw(st.integers(1, 3))):
    places = list(_places(content))
    if not places:
      break
    container, key = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["replace", "replace", "delete", "repeat"]))
    if action == "replace":
      container[key] = draw(VALUES)
    elif action == "delete":
      del container[key]
    elif isinstance(container, list):
      container.append(copy.deepcopy(container[key]))
  return content


@st.composite
def changed_bytes(draw, good):
  """Bytes of a good file of which some are replaced, cut off or inserted."""
  changed = bytearray(good)
  for _ in range(draw(st.integers(1, 4))):
    start = draw(st.integers(0, len(changed)))
    stop = draw(st.integers(start, min(start + 8, len(changed))) | st.just(len(changed)))
    changed[start:stop] = draw(st.binary(max_size=8))
  return bytes(changed)


def _png(pixels):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fuzz")
  for split in ("train", "val"):
    for kind in ("images", "labels"):
      (folder / kind / split).mkdir(parents=True)
    (folder / "images" / split / "0.png").write_bytes(_png(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
  return folder


def _serialized(features, example):
  serializer = ExampleSerializer(features.get_serialized_info())
  return serializer.serialize_example(features.encode_example(example))


def _records_of(builder, where):
  """Returns the records that a builder makes, or None if it refuses its files; its message names `where`."""
  try:
    examples = [e for split in builder._split_generators(None).values() for _, e in split]
  except UserError as error:
    message = str(error)
    assert "\n" not in message and str(where) in message and len(message) < 1000
    message.encode()
    return None
  json.dumps(dict(builder.info.metadata))
  return [instances.parse(_serialized(instances.features(), example)) for example in examples]


def _read_annotations(folder, written, skip_bad):
  """Reads an annotation file as preparation does; returns its records, or None if it is refused."""
  file, images = folder / "a.json", folder / "images/train"
  file.write_bytes(written)
  builder = CocoInstances(
    data_dir=str(folder / "data"), annotations=str(file), images=str(images), skip_bad=skip_bad
  )
  return _records_of(builder, file)


def test_changed_annotations(folder):
  def check(drawn):
    content, skip_bad = drawn
    for record in _read_annotations(folder, json.dumps(content).encode(), skip_bad) or ():
      for annotation in record.annotations:
        decoded = instances.decode_annotation(annotation)
        assert 0 <= decoded["area"] < 1e39 and np.isfinite(decoded["bbox"]).all()
      x0_G, y0_G, x1_G, y1_G = record.boxes.T
      assert ((x0_G >= 0) & (x1_G >= x0_G) & (x1_G <= WIDTH)).all()
      assert ((y0_G >= 0) & (y1_G >= y0_G) & (y1_G <= HEIGHT)).all()

  fuzz(st.tuples(changed_contents(), st.booleans()), check)


def _check_annotation_bytes(folder, written):
  _read_annotations(folder, written, skip_bad=True)
  _read_annotations(folder, written, skip_bad=False)


def test_annotation_files_of_other_bytes(folder):
  strategy = changed_bytes(json.dumps(CONTENT).encode()) | st.binary()
  fuzz(strategy, lambda written: _check_annotation_bytes(folder, written))


@pytest.mark.parametrize(
  "written",
  [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"images": ' + b"[" * 900 + b"]" * 900 + b', "annotations": [], "categories": []}',
    json.dumps(CONTENT).replace('"bbox": [2', '"bbox": [' + "9" * 4400).encode(),
    json.dumps(CONTENT).replace('"id": 2', '"id": ' + "9" * 4300).encode(),
    json.dumps(CONTENT).replace('"id": 2', '"id": ' + "[" * 800 + "]" * 800).encode(),
    b"\xff\xfe" + json.dumps(CONTENT).encode("utf-16-le"),
  ],
  ids=range(7),
)
def test_annotation_files_that_are_nested_or_long(written, folder):
  _check_annotation_bytes(folder, written)


def test_the_unchanged_file_is_read(folder):
  for skip_bad in (False, True):
    records = _read_annotations(folder, json.dumps(CONTENT).encode(), skip_bad)
    # a byte order mark is not content
    assert _read_annotations(folder, b"\xef\xbb\xbf" + json.dumps(CONTENT).encode(), skip_bad)
    assert [record.crowd.tolist() for record in records] == [[False, True, True]] * 3


LABEL = _png(np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH), np.uint8))
_PALETTE = io.BytesIO()
PIL.Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)).convert("P").save(_PALETTE, "PNG")


def test_label_files_of_other_bytes(folder):
  def check(drawn):
    written, skip_bad = drawn
    (folder / "labels/train/0.png").write_bytes(written)
    (folder / "labels/val/0.png").write_bytes(LABEL)
    builder = image_folder.builder(
      num_classes=3, data_dir=str(folder / "data"), source=str(folder), skip_bad=skip_bad
    )
    try:
      for examples in builder._split_generators(None).values():
        for _, example in examples:
          record = label_map.parse(_serialized(label_map.features(), example))
          assert set(np.unique(label_map.decode_ids(record.label))) <= {0, 1, 2, 255}
    except UserError as error:
      message = str(error)
      assert "\n" not in message and str(folder) in message and len(message) < 1000
      assert "BytesIO" not in message

  files = changed_bytes(LABEL) | changed_bytes(_PALETTE.getvalue()) | st.binary()
  fuzz(st.tuples(files, st.booleans()), check)


_MASK = base64.b64encode(_png(np.eye(2, 3, dtype=np.uint8))).decode()
# file of the objects of an image in each format, and its content
LABEL_FILES = {
  "yolo": ("labels/train/0.txt", "0 0.5 0.5 0.25 0.5\n1 0.9 0.25 0.2 0.5\n"),
  "yolo polygons": ("labels/train/0.txt", "0 .1 .1 .5 .1 .5 .5\n1 0 0 1 0 1 1 0 1\n"),
  "yolo names": ("data.yaml", "train: images/train\nval: images/val\nnames: {0: ant, 1: 'b c'}\n"),
  "voc": (
    "labels/train/0.xml",
    "<annotation><size><width>9</width><height>6</height></size><object><name>ant</name>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>"
    "</object></annotation>",
  ),
  "labelme": (
    "labels/train/0.json",
    json.dumps(
      {
        "shapes": [
          {
            "label": "ant",
            "shape_type": "polygon",
            "points": [[1, 1], [4, 1], [4, 4]],
            "group_id": 1,
          },
          {
            "label": "ant",
            "shape_type": "mask",
            "points": [[5, 2], [7, 3]],
            "mask": _MASK,
            "group_id": 1,
          },
          {"label": "bee", "shape_type": "circle", "points": [[3, 3], [4, 3]]},
          {"label": "bee", "shape_type": "rectangle", "points": [[3, 3], [4, 5]]},
        ],
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
      }
    ),
  ),
  "cvat": (
    "a.xml",
    "<annotations><meta><task><labels><label><name>ant</name></label></labels></task></meta>"
    '<image id="0" name="0.png" width="9" height="6"><box label="ant" xtl="1" ytl="2" xbr="3" ybr="4" '
    'rotation="9"/><polygon label="ant" points="1,1;4,1;4,4" group_id="1"/><mask label="ant" rle="1, 3, 2" '
    'left="5" top="2" width="3" height="2" group_id="1"/><ellipse label="ant" cx="4" cy="3" rx="2" ry="2"/>'
    "</image></annotations>",
  ),
}


def _read_format(folder, case, written, skip_bad):
  """Reads a source with this label file; returns its records, or None if it is refused."""
  for name, content in (LABEL_FILES["yolo"], LABEL_FILES["yolo names"]):
    (folder / name).write_text(content)
  (folder / LABEL_FILES[case][0]).write_bytes(written)
  labels = "a.xml" if case == "cvat" else "labels/train"
  splits = None if case == "yolo names" else {"train": (labels, "images/train")}
  builder = CocoInstances(
    data_dir=str(folder / "data"),
    source=str(folder),
    splits=splits,
    skip_bad=skip_bad,
    format=case.split()[0],
  )
  return _records_of(builder, folder)


@pytest.mark.parametrize("case", LABEL_FILES)
def test_label_files_of_other_formats(case, folder):
  good = LABEL_FILES[case][1].encode()
  (folder / "labels/val/0.txt").write_text("")
  assert _read_format(folder, case, good, skip_bad=False)[0].labels.size > 0

  def check(drawn):
    for record in _read_format(folder, case, *drawn) or ():
      x0_G, y0_G, x1_G, y1_G = record.boxes.T
      assert ((x0_G >= 0) & (x1_G >= x0_G) & (x1_G <= WIDTH)).all()
      assert ((y0_G >= 0) & (y1_G >= y0_G) & (y1_G <= HEIGHT)).all()

  fuzz(st.tuples(changed_bytes(good) | st.binary(), st.booleans()), check)
