"""A data set in COCO's format, converted to each other format, has the same objects again."""

import json

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.ops import masks
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from tests.data.datasets.formats.sets import objects_of, prepared, write_image, write_text
from tests.data_sets import config

NAMES = ("traffic light", "bus", "Zebra")
SIZES = {"a b.jpg": (40, 80), "c.jpg": (60, 50), "d.jpg": (32, 32)}
# file, class, polygons; whole numbers, since a box of PASCAL VOC has no others
OBJECTS = (
  ("a b.jpg", "bus", [[10, 5, 40, 5, 40, 30, 10, 30]]),
  ("a b.jpg", "Zebra", [[60, 20, 80, 20, 80, 40]]),
  ("a b.jpg", "bus", [[0, 0, 4, 0, 4, 9]]),
  ("c.jpg", "traffic light", [[20, 30, 25, 50, 15, 60, 5, 45]]),
)


def _box(polygons):
  x, y = np.reshape(polygons[0], (-1, 2)).T.tolist()
  return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _write_coco(root):
  images = [
    {"id": i, "file_name": name, "height": height, "width": width}
    for i, (name, (height, width)) in enumerate(SIZES.items(), 1)
  ]
  annotations = [
    {"id": i, "image_id": list(SIZES).index(file) + 1, "category_id": NAMES.index(name) + 1}
    | {"bbox": _box(polygons), "segmentation": polygons, "iscrowd": 0}
    for i, (file, name, polygons) in enumerate(OBJECTS, 1)
  ]
  categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
  content = {"images": images, "annotations": annotations, "categories": categories}
  write_text(root / "a.json", json.dumps(content))
  for name, size in SIZES.items():
    write_image(root / "images" / name, size)
  coco = config(
    "coco", root / "records", source=str(root), builder={"splits": {"train": ("a.json", "images")}}
  )
  data.prepare(coco)
  return coco_ground_truth(coco, "train")


def _of(file):
  return [(name, polygons) for image, name, polygons in OBJECTS if image == file]


def _images(root):
  """Writes the images of both splits, and returns the folders."""
  for split in ("train", "val"):
    for name, size in SIZES.items():
      write_image(root / split / name, size)
  return root / "train", root / "val"


def _write_yolo(root, *, boxes):
  for folder in _images(root / "images"):
    for file, (height, width) in SIZES.items():
      lines = []
      for name, (polygon,) in _of(file):
        if boxes:
          x, y, w, h = _box([polygon])
          values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        else:
          values = (np.reshape(polygon, (-1, 2)) / (width, height)).ravel().tolist()
        lines.append(" ".join([str(NAMES.index(name)), *(f"{v:.6f}" for v in values)]))
      path = root / "labels" / folder.name / file.replace("jpg", "txt")
      write_text(path, "\n".join(lines))
  write_text(root / "data.yaml", f"train: images/train\nval: images/val\nnames: {list(NAMES)}")


def _write_voc(root):
  for folder in _images(root):
    for file, (height, width) in SIZES.items():
      text = f"<annotation><size><width>{width}</width><height>{height}</height></size>"
      for name, polygons in _of(file):
        x, y, w, h = _box(polygons)
        sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
        text += f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
      write_text((folder / file).with_suffix(".xml"), f"{text}</annotation>")
  write_text(root / "labels.txt", "\n".join(NAMES))


def _write_labelme(root):
  for folder in _images(root):
    for file, (height, width) in SIZES.items():
      shapes = [
        {"label": name, "points": np.reshape(polygon, (-1, 2)).tolist(), "shape_type": "polygon"}
        for name, (polygon,) in _of(file)
      ]
      content = {"shapes": shapes, "imagePath": file, "imageHeight": height, "imageWidth": width}
      write_text((folder / file).with_suffix(".json"), json.dumps(content))
  write_text(root / "labels.txt", "\n".join(NAMES))


def _write_cvat(root, *, as_masks):
  labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
  for folder in _images(root):
    text = f"<annotations><meta><job><labels>{labels}</labels></job></meta>"
    for i, (file, (height, width)) in enumerate(SIZES.items()):
      text += f'<image id="{i}" name="{file}" width="{width}" height="{height}">'
      for name, polygons in _of(file):
        if as_masks:
          bits = masks.rasterize(polygons, height, width).ravel().astype(int)
          edges = np.flatnonzero(np.diff(bits, prepend=0))
          runs = np.diff([0, *edges, len(bits)]).tolist()
          text += f'<mask label="{name}" rle="{str(runs)[1:-1]}" left="0" top="0" '
          text += f'width="{width}" height="{height}"/>'
        else:
          points = ";".join(f"{x:.2f},{y:.2f}" for x, y in np.reshape(polygons[0], (-1, 2)))
          text += f'<polygon label="{name}" points="{points}"/>'
      text += "</image>"
    write_text(folder / "annotations.xml", f"{text}</annotations>")


# writer, whether it writes polygons, and by how many pixels boxes may differ
FORMATS = {
  "yolo boxes": ("yolo", lambda root: _write_yolo(root, boxes=True), False, 1e-3),
  "yolo polygons": ("yolo", lambda root: _write_yolo(root, boxes=False), True, 1e-3),
  "voc": ("voc", _write_voc, False, 0),
  "labelme": ("labelme", _write_labelme, True, 0),
  "cvat polygons": ("cvat", lambda root: _write_cvat(root, as_masks=False), True, 0),
  # the pixels of a polygon end before its corners
  "cvat masks": ("cvat", lambda root: _write_cvat(root, as_masks=True), False, 1.01),
}


@pytest.mark.parametrize("case", FORMATS)
def test_objects_come_back(case, tmp_path):
  fmt, write, has_polygons, tolerance = FORMATS[case]
  expected = _write_coco(tmp_path / "coco")
  write(tmp_path / "other")
  for content in prepared(fmt, tmp_path / "other").values():
    assert [c["name"] for c in content["categories"]] == list(NAMES)
    assert [i["file_name"] for i in content["images"]] == list(SIZES)
    for (file, name, box), (other_file, other_name, other_box) in zip(
      objects_of(content), objects_of(expected), strict=True
    ):
      assert (file, name) == (other_file, other_name)
      np.testing.assert_allclose(box, other_box, atol=tolerance)
    for a, b in zip(content["annotations"], expected["annotations"], strict=True):
      if has_polygons:
        np.testing.assert_allclose(a["segmentation"], b["segmentation"], atol=1e-3)
      if fmt == "cvat":
        assert a["area"] == b["area"]
