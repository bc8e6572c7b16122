"""CVAT's shapes become polygons, boxes and masks."""

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

META = """<version>1.1</version>
<meta><task><name>t</name><labels>
<label><name>red car</name><color>#ff0000</color><type>any</type><attributes></attributes></label>
<label><name>blue</name></label><label><name>knee</name><parent>person</parent></label>
</labels></task><dumped>2026-01-01</dumped></meta>
"""
BOX = '<box label="blue" source="manual" occluded="1" xtl="10.5" ytl="5" xbr="30" ybr="20" z_order="0"></box>'
POLYGON = '<polygon label="red car" points="10.0,10.0;30.0,10.0;10.0,20.0" z_order="1"></polygon>'


def _image(name, *shapes, extra="", size=(HEIGHT, WIDTH)):
  lines = "\n".join(shapes)
  return f'<image id="7" name="{name}" width="{size[1]}" height="{size[0]}" {extra}>\n{lines}\n</image>\n'


def _xml(*images, meta=META):
  return (
    f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n{meta}{"".join(images)}</annotations>'
  )


def _source(root, *shapes):
  """An image with these shapes to train on, and one without objects to evaluate."""
  for split, inside in (("train", shapes), ("val", ())):
    write_image(root / split / "images/a b.jpg")
    write_text(root / split / "annotations.xml", _xml(_image("a b.jpg", *inside)))
  return root


def test_boxes_alone_are_boxes(tmp_path):
  tag = '<tag label="blue" source="manual"><attribute name="x">y</attribute></tag>'
  coco = settings("cvat", _source(tmp_path / "source", tag, BOX))
  data.prepare(coco)
  (example,) = data.examples(coco, "train")
  assert example["boxes_xyxy"].tolist() == [[10.5, 5, 30, 20]]
  assert data.info(coco).category_names == ("red car", "blue")
  with pytest.raises(UserError, match=r"boxes without masks; use configs/coco_box.py"):
    detection.adopt_classes(coco_mask.get_config(), data.info(coco))


def test_polygons_boxes_and_groups(tmp_path):
  group = '<polygon label="red car" points="{}" group_id="3"></polygon>'
  shapes = (
    POLYGON,
    group.format("40,0;44,0;44,4"),
    BOX,
    group.format("50,20;60,20;60,30"),
  )
  found = prepared("cvat", _source(tmp_path / "source", *shapes))
  assert names_of(found["val"]) == ["red car", "blue"] and not found["val"]["annotations"]
  assert objects_of(found["train"]) == [
    ("a b.jpg", "red car", [10, 10, 20, 10]),
    ("a b.jpg", "red car", [40, 0, 20, 30]),
    ("a b.jpg", "blue", [10.5, 5, 19.5, 15]),
  ]
  segmentations = [a["segmentation"] for a in found["train"]["annotations"]]
  assert segmentations[1] == [[40, 0, 44, 0, 44, 4], [50, 20, 60, 20, 60, 30]]
  assert segmentations[2] == [[10.5, 5, 30, 5, 30, 20, 10.5, 20]]


def test_masks(tmp_path):
  inside = np.array([[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])  # runs go along the rows
  mask = '<mask label="blue" rle="1, 3, 2, 3, 3" left="20" top="30" width="3" height="4"></mask>'
  full = '<mask label="blue" rle="0, 4" left="0" top="0" width="2" height="2"></mask>'
  found = prepared("cvat", _source(tmp_path / "source", mask, full))["train"]["annotations"]
  expected = np.zeros((HEIGHT, WIDTH), bool)
  expected[30:34, 20:23] = inside
  drawn = [masks.rasterize(a["segmentation"], HEIGHT, WIDTH) for a in found]
  np.testing.assert_array_equal(drawn[0], expected)
  assert found[0]["bbox"] == [20, 30, 3, 3] and found[0]["area"] == 6
  assert drawn[1].sum() == 4 and drawn[1][:2, :2].all()


def test_rotated_boxes_and_ellipses(tmp_path):
  """Angles are clockwise on the screen, whose y axis points down."""
  box = '<box label="blue" xtl="20" ytl="10" xbr="40" ybr="20" rotation="30.0"></box>'
  ellipse = '<ellipse label="blue" cx="40" cy="20" rx="16" ry="6" rotation="30"></ellipse>'
  found = prepared("cvat", _source(tmp_path / "source", box, ellipse))["train"]["annotations"]
  cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
  corner = [30 + 10 * cos - 5 * sin, 15 + 10 * sin + 5 * cos]  # of the lower right
  np.testing.assert_allclose(found[0]["segmentation"][0][4:6], corner)
  rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
  x, y = columns - 40, rows - 20
  expected = ((x * cos + y * sin) / 16) ** 2 + ((y * cos - x * sin) / 6) ** 2 <= 1
  drawn = masks.rasterize(found[1]["segmentation"], HEIGHT, WIDTH)
  assert (drawn & expected).sum() / (drawn | expected).sum() > 0.95


def test_rotated_boxes_alone_are_boxes(tmp_path):
  box = '<box label="blue" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90"></box>'
  (found,) = read("cvat", _source(tmp_path / "source", box))["train"]["annotations"]
  np.testing.assert_allclose(found["bbox"], [25, 5, 10, 20])
  assert "segmentation" not in found


def test_subsets_of_a_project(tmp_path):
  root = tmp_path / "source"
  meta = META.replace("task>", "project>")
  names = {"Train": ("b.jpg", "a.jpg"), "Validation": ("sub/c.jpg",), "Test": ("d.jpg",)}
  images = [
    _image(name, BOX, extra=f'subset="{subset}" task_id="1"')
    for subset, inside in names.items()
    for name in inside
  ]
  for subset, inside in names.items():
    for name in inside:
      write_image(root / "images" / subset / name)
  write_text(root / "annotations.xml", _xml(*images, meta=meta))
  found = prepared("cvat", root)
  assert [i["file_name"] for i in found["train"]["images"]] == ["a.jpg", "b.jpg"]
  assert [i["file_name"] for i in found["val"]["images"]] == ["c.jpg"]


def test_one_task_is_divided(tmp_path):
  root = tmp_path / "source"
  for i in range(11):
    write_image(root / f"images/{i:02}.jpg")
  images = [_image(f"{i:02}.jpg", BOX) for i in reversed(range(11))]
  write_text(root / "annotations.xml", _xml(*images))
  found = read("cvat", root)
  assert [i["file_name"] for i in found["val"]["images"]] == ["00.jpg", "10.jpg"]
  assert len(found["train"]["annotations"]) == 9
  splits = {"mine": ("annotations.xml", "images")}
  assert len(read("cvat", root, splits=splits)["mine"]["images"]) == 11


def test_sizes_are_those_of_the_upright_image(tmp_path):
  root = _source(tmp_path / "source", POLYGON)
  write_image(root / "train/images/a b.jpg", (WIDTH, HEIGHT), orientation=8)
  image = prepared("cvat", root)["train"]["images"][0]
  assert (image["height"], image["width"]) == (HEIGHT, WIDTH)


def test_changes_are_noticed(tmp_path):
  root = _source(tmp_path / "source", POLYGON)
  coco = settings("cvat", root)
  data.prepare(coco)
  assert data.info(coco).num_images == {"train": 1, "val": 1}
  write_text(root / "val/annotations.xml", _xml(_image("a b.jpg", BOX)))
  with pytest.raises(UserError, match=r"val/annotations.xml has changed"):
    data.info(coco)


@pytest.mark.parametrize(
  ("shape", "words"),
  [
    ('<points label="blue" points="1,2"></points>', "shape has no area: element 'points'"),
    ('<polyline label="blue" points="1,2;3,4"></polyline>', "shape has no area"),
    ('<polygon points="1,2;3,4;5,6"></polygon>', "element polygon has no attribute label"),
    ('<polygon label="blue" points="1,2;3,4"></polygon>', "attribute points must have 3 or more"),
    ('<polygon label="blue" points="1,2;3,4;5"></polygon>', "attribute points must have 3 or more"),
    (
      '<polygon label="blue" points="1,2;3,4;5,x"></polygon>',
      "coordinate is not a finite number: 'x'",
    ),
    ('<polygon label="green" points="1,2;3,4;5,6"></polygon>', "class is not in the list: 'green'"),
    ('<box label="blue" xtl="9" ytl="1" xbr="8" ybr="3"></box>', "box has a negative side"),
    ('<box label="blue" xtl="9" ytl="1" xbr="inf" ybr="3"></box>', "xbr is not a finite number"),
    (
      '<mask label="blue" rle="1, 2" left="0" top="0" width="2" height="2"></mask>',
      "attribute rle must be run lengths of all pixels of the mask: '1, 2' of 2 x 2",
    ),
    (
      '<mask label="blue" rle="4" left="79" top="0" width="2" height="2"></mask>',
      "mask lies outside the image",
    ),
  ],
)
def test_bad_shapes_are_named(shape, words, tmp_path):
  root = _source(tmp_path / "source", POLYGON, shape)
  message = error_of("cvat", root)
  assert message.startswith("train/annotations.xml, line 10: ") and words in message
  assert len(read("cvat", root, skip_bad=True)["train"]["annotations"]) == 1


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("<annotations>", "train/annotations.xml: not valid XML: no element found: line 1"),
    ("<a></a>", "its outermost element is not annotations: 'a'; export as CVAT for images 1.1"),
    (_xml("<track></track>"), "line 8: tracks of a video are not read"),
    (_xml(_image("a b.jpg"), meta=""), "train/annotations.xml: element meta has no label"),
    (_xml(_image("../a b.jpg")), "line 8: attribute name points outside the image folder"),
    (_xml(_image("")), "line 8: element image has no attribute name"),
    (_xml(_image("a b.jpg", size=("x", 8))), "line 8: height is not a finite number: 'x'"),
    (_xml(), "split train has no image"),
    (
      _xml(_image("a b.jpg"), _image("a b.jpg")),
      "line 11: train/images/a b.jpg has another element",
    ),
  ],
)
def test_bad_files_are_named(text, words, tmp_path):
  root = _source(tmp_path / "source", POLYGON)
  write_text(root / "train/annotations.xml", text)
  assert words in error_of("cvat", root)


def test_missing_images_are_named(tmp_path):
  root = _source(tmp_path / "source", POLYGON)
  (root / "train/images/a b.jpg").unlink()
  with pytest.raises(UserError, match=r"images/a b.jpg .No such file"):
    prepared("cvat", root)
