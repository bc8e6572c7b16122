"""LabelMe's shapes become polygons, boxes and masks."""

import base64
import json

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.tasks import detection
from tests.data.datasets.formats.sets import (
  HEIGHT,
  WIDTH,
  error_of,
  names_of,
  objects_of,
  prepared,
  read,
  settings,
  write_image,
  write_text,
)
from tests.data_sets import png


def _shape(kind, points, label="red", **fields):
  return {
    "label": label,
    "points": points,
    "shape_type": kind,
    "group_id": None,
    "flags": {},
  } | fields


TRIANGLE = _shape("polygon", [[10, 10], [30, 10], [10, 20]])


def _file(*shapes, **fields):
  content = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": "..\\x.jpg"}
  return json.dumps(
    content | {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH} | fields
  )


def _source(root, *shapes, **fields):
  """An image with these shapes to train on, and one without objects to evaluate."""
  write_image(root / "train/a b.jpg")
  write_text(root / "train/a b.json", _file(*shapes, **fields))
  write_image(root / "val/a b.jpg")
  write_text(root / "val/a b.json", _file())
  return root


def test_polygons_and_groups(tmp_path):
  shapes = [
    TRIANGLE | {"group_id": 1},
    _shape("polygon", [[50, 20], [60, 20], [60, 30], [50, 30]], "dark blue"),
    _shape("polygon", [[40, 0], [44, 0], [44, 4]], group_id=1),
    _shape("polygon", [[0, 0], [4, 0], [4, 4]], "dark blue", group_id=1),  # another class
    _shape("polygon", [[0, 30], [4, 30], [4, 34]]),
  ]
  del shapes[4]["shape_type"]  # of old versions, which had polygons only
  found = prepared("labelme", _source(tmp_path / "source", *shapes))
  assert names_of(found["train"]) == ["dark blue", "red"] and not found["val"]["annotations"]
  assert objects_of(found["train"]) == [
    ("a b.jpg", "red", [10, 0, 34, 20]),
    ("a b.jpg", "dark blue", [50, 20, 10, 10]),
    ("a b.jpg", "dark blue", [0, 0, 4, 4]),
    ("a b.jpg", "red", [0, 30, 4, 4]),
  ]
  first = found["train"]["annotations"][0]
  assert first["segmentation"] == [[10, 10, 30, 10, 10, 20], [40, 0, 44, 0, 44, 4]]


def test_rectangles_alone_are_boxes(tmp_path):
  root = _source(tmp_path / "source", _shape("rectangle", [[30, 20], [10, 5]]))
  coco = settings("labelme", root)
  data.prepare(coco)
  (example,) = data.examples(coco, "train")
  assert example["boxes_xyxy"].tolist() == [[10, 5, 30, 20]]
  with pytest.raises(UserError, match=r"boxes without masks; use configs/coco_box.py"):
    detection.adopt_classes(coco_mask.get_config(), data.info(coco))


def test_rectangles_beside_other_shapes_are_masks(tmp_path):
  root = _source(tmp_path / "source", TRIANGLE, _shape("rectangle", [[30, 20], [10, 5]]))
  found = prepared("labelme", root)["train"]["annotations"]
  assert found[1]["segmentation"] == [[10, 5, 30, 5, 30, 20, 10, 20]] and found[1]["area"] == 300


def test_circles(tmp_path):
  root = _source(tmp_path / "source", _shape("circle", [[40, 20], [43, 24]]))
  (found,) = prepared("labelme", root)["train"]["annotations"]
  np.testing.assert_allclose(found["bbox"], [35, 15, 10, 10])
  rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
  expected = np.hypot(rows - 20, columns - 40) <= 5
  drawn = masks.rasterize(found["segmentation"], HEIGHT, WIDTH)
  assert (drawn & expected).sum() / (drawn | expected).sum() > 0.9


def test_masks(tmp_path):
  inside = np.array([[0, 1, 1], [1, 1, 0]], np.uint8)
  mask = base64.b64encode(png(inside)).decode()
  second = _shape("polygon", [[0, 0], [4, 0], [4, 4], [0, 4]], group_id=7)
  shape = _shape("mask", [[20, 30], [22, 31]], mask=mask, group_id=7)
  root = _source(tmp_path / "source", shape, second)
  (found,) = prepared("labelme", root)["train"]["annotations"]
  expected = np.zeros((HEIGHT, WIDTH), bool)
  expected[30:32, 20:23] = inside
  expected[:4, :4] = True
  np.testing.assert_array_equal(masks.rasterize(found["segmentation"], HEIGHT, WIDTH), expected)
  assert found["bbox"] == [0, 0, 23, 32] and found["area"] == 20


def test_a_mask_with_a_polygon_far_away_is_refused(tmp_path):
  mask = base64.b64encode(png(np.ones((2, 3), np.uint8))).decode()
  shape = _shape("mask", [[20, 30], [22, 31]], mask=mask, group_id=7)
  far = _shape("polygon", [[0, 0], [1e9, 0], [0, 1e9]], group_id=7)
  message = error_of("labelme", _source(tmp_path / "source", shape, far))
  assert "shapes[0]: field segmentation has a polygon far outside the image" in message


def test_sizes_are_those_of_the_upright_image(tmp_path):
  root = _source(tmp_path / "source", TRIANGLE)
  write_image(root / "train/a b.jpg", (WIDTH, HEIGHT), orientation=6)
  image = prepared("labelme", root)["train"]["images"][0]
  assert (image["height"], image["width"]) == (HEIGHT, WIDTH)
  root = _source(tmp_path / "stored", TRIANGLE)
  write_image(root / "train/a b.jpg", orientation=6)
  with pytest.raises(UserError, match=r"a b.json: fields height and width fit data.exif='ignore'"):
    prepared("labelme", root)


def test_a_folder_without_splits_is_divided(tmp_path):
  root = tmp_path / "source"
  for i in range(3):
    write_image(root / f"{i}.jpg")
    write_text(root / f"{i}.json", _file(TRIANGLE))
  write_image(root / "bare.jpg")
  write_text(root / "labels.txt", "__ignore__\n_background_\nblue\nred\n")
  found = read("labelme", root)
  assert [i["file_name"] for i in found["train"]["images"]] == ["1.jpg", "2.jpg", "bare.jpg"]
  assert names_of(found["train"]) == ["blue", "red"]
  write_text(root / "labels.txt", "blue\n")
  assert "1.json: shapes[0]: class is not in the list: 'red'" in error_of("labelme", root)


@pytest.mark.parametrize(
  ("shape", "words"),
  [
    ("text", "shape is not an object: 'text'"),
    (TRIANGLE | {"label": ""}, "field label must be a name: ''"),
    (TRIANGLE | {"label": 3}, "field label must be a name: 3"),
    (TRIANGLE | {"group_id": [1]}, "field group_id must be a number: [1]"),
    (TRIANGLE | {"points": [[1, 2], [3]]}, "field points must be a list of x, y"),
    (TRIANGLE | {"points": [[1, 2], [3, 4]]}, "a polygon must have 3 points or more: 2 points"),
    (TRIANGLE | {"points": [[1, 2], [3, 4], [5, "x"]]}, "coordinate is not a finite number: 'x'"),
    (TRIANGLE | {"points": [[1, 2], [3, 4], [5, True]]}, "coordinate is not a finite number: True"),
    (_shape("rectangle", [[1, 2]]), "a rectangle must have 2 points: 1 points"),
    (_shape("point", [[1, 2]]), "shape has no area: shape_type 'point'"),
    (_shape("line", [[1, 2], [3, 4]]), "shape has no area: shape_type 'line'"),
    (_shape("mask", [[1, 2], [3, 4]], mask="%"), "field mask is not a PNG in base64"),
    (_shape("mask", [[1, 2], [3, 4]]), "field mask is not a PNG in base64"),
    (
      _shape(
        "mask", [[79, 2], [80, 4]], mask=base64.b64encode(png(np.ones((3, 2), np.uint8))).decode()
      ),
      "mask lies outside the image: 2 x 3 pixels at 79, 2 of 80 x 40",
    ),
  ],
)
def test_bad_shapes_are_named(shape, words, tmp_path):
  root = _source(tmp_path / "source", TRIANGLE, shape)
  message = error_of("labelme", root)
  assert message.startswith(f"train/a b.json: shapes[1]: {words}")
  assert len(read("labelme", root, skip_bad=True)["train"]["annotations"]) == 1


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("{", "train/a b.json: file is broken: its text, line 1, column 2: not valid JSON"),
    ("[]", "train/a b.json: field shapes must be a list"),
    (_file(imageHeight=None), "train/a b.json: imageHeight is not a finite number: None"),
    (_file(imageHeight=-40), "train/a b.json: height and width are not numbers of pixels: -40"),
  ],
)
def test_bad_files_are_named(text, words, tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "val/a b.json", _file(TRIANGLE))
  write_text(root / "train/a b.json", text)
  assert words in error_of("labelme", root)


def test_polygons_outside_are_named(tmp_path):
  root = _source(tmp_path / "source", TRIANGLE, _shape("polygon", [[70, 10], [90, 10], [70, 20]]))
  with pytest.raises(UserError, match=r"a b.json: shapes\[1\]: field bbox lies outside the image"):
    prepared("labelme", root)


def test_label_files_without_an_image_are_named(tmp_path):
  root = _source(tmp_path / "source", TRIANGLE)
  (root / "train/a b.jpg").rename(root / "train/b.jpg")
  assert "train/a b.json: no image of this name" in error_of("labelme", root)


def test_no_object_at_all_is_refused(tmp_path):
  assert "no label file has an object" in error_of("labelme", _source(tmp_path / "source"))
