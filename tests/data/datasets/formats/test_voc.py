"""Boxes of PASCAL VOC are read from the development kit's layout and from folders of single files."""

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.batches import eval_batches
from fpt_jax.tasks.detection.coco_ap import evaluate
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
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

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def _object(name, box, extra=""):
  x0, y0, x1, y1 = box
  return (
    f"<object>\n<name>{name}</name>{extra}<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
    f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>\n"
  )


def _xml(*objects, size=SIZE):
  return f"<annotation>\n<filename>other.jpg</filename>{size}\n{''.join(objects)}</annotation>"


def _kit(root):
  """The development kit's layout: three images, one of them in both lists."""
  for name in ("a b", "c", "d"):
    write_image(root / "JPEGImages" / f"{name}.jpg")
    write_text(root / "Annotations" / f"{name}.xml", _xml(_object("dog", (11, 6, 30, 20))))
  write_text(root / "ImageSets/Main/train.txt", "d\na b\n")
  write_text(root / "ImageSets/Main/val.txt", "c\na b\n")
  return root


def test_the_kits_layout(tmp_path):
  root = _kit(tmp_path / "VOC2012")
  write_text(root / "Annotations/c.xml", _xml(_object("cat &amp; kitten", (1, 1, 80, 40))))
  found = prepared("voc", root)
  assert names_of(found["train"]) == ["cat & kitten", "dog"]
  # pixels are counted from 1, and both ends belong to the box
  assert objects_of(found["train"]) == [
    ("a b.jpg", "dog", [10, 5, 20, 15]),
    ("d.jpg", "dog", [10, 5, 20, 15]),
  ]
  assert objects_of(found["val"])[1] == ("c.jpg", "cat & kitten", [0, 0, 80, 40])
  assert [i["id"] for split in found.values() for i in split["images"]] == [1, 2, 3, 4]
  assert all("segmentation" not in a for a in read("voc", root)["train"]["annotations"])


def test_difficult_objects_are_crowds(tmp_path):
  root = _kit(tmp_path / "source")
  difficult = _object("dog", (1, 1, 8, 8), "<difficult>1</difficult><pose>Left</pose>")
  easy = _object("dog", (11, 6, 30, 20), "<difficult>0</difficult>")
  write_text(root / "Annotations/d.xml", _xml(difficult, easy))
  coco = settings("voc", root)
  data.prepare(coco)
  _, example = data.examples(coco, "train")
  assert example["is_crowd"].tolist() == [True, False]
  with eval_batches(coco, "train", batch_size=1) as batches:
    assert sorted(batch["gt_valid_BG"].sum() for batch in batches) == [1, 1]
  # a detection of the difficult object is not a false positive, although it has the highest score
  truth = coco_ground_truth(coco, "train")
  results = [
    {
      "image_id": a["image_id"],
      "category_id": 1,
      "bbox": a["bbox"],
      "score": 0.5 + a["iscrowd"] / 4,
    }
    for a in truth["annotations"]
  ]
  assert len(results) == 3 and evaluate(truth, results, ["bbox"])["bbox/AP"] == 100


def test_boxes_at_the_border_are_clipped(tmp_path):
  root = _kit(tmp_path / "source")
  # counted from 0, as other tools do, and with fractions
  write_text(root / "Annotations/d.xml", _xml(_object("dog", (0, 0, 80.4, 40.9))))
  coco = settings("voc", root)
  data.prepare(coco)
  _, example = data.examples(coco, "train")
  np.testing.assert_allclose(example["boxes_xyxy"], [[0, 0, 80, 40]])


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_the_image_has_the_size_that_is_not_given(size, tmp_path):
  root = _kit(tmp_path / "source")
  write_text(root / "Annotations/d.xml", _xml(_object("dog", (1, 1, 8, 8)), size=size))
  write_image(root / "JPEGImages/d.jpg", orientation=6)
  image = read("voc", root)["train"]["images"][1]
  assert (image["height"], image["width"]) == (WIDTH, HEIGHT)


def test_sizes_are_compared_with_the_upright_image(tmp_path):
  root = _kit(tmp_path / "source")
  write_image(root / "JPEGImages/d.jpg", orientation=6)
  with pytest.raises(
    UserError, match=r"d.xml: fields height and width fit data.exif='ignore' only"
  ):
    prepared("voc", root)
  assert prepared("voc", root, exif="ignore")["train"]["images"][1]["width"] == WIDTH


def test_folders_with_files_beside_the_images(tmp_path):
  """Roboflow's export."""
  root = tmp_path / "source"
  for split in ("train", "valid"):
    write_image(root / split / "a_jpg.rf.01.jpg")
    write_text(root / split / "a_jpg.rf.01.xml", _xml(_object(split, (11, 6, 30, 20))))
    write_image(root / split / "bare.jpg")
  write_text(root / "README.roboflow.txt", "text")
  found = read("voc", root)
  assert names_of(found["train"]) == names_of(found["val"]) == ["train", "valid"]
  assert [len(found[split]["images"]) for split in ("train", "val")] == [2, 2]
  assert objects_of(found["val"]) == [("a_jpg.rf.01.jpg", "valid", [10, 5, 20, 15])]


def test_a_folder_without_splits_is_divided(tmp_path):
  root = tmp_path / "source"
  for i in range(11):
    write_image(root / "images" / f"{i:02}.png")
    write_text(root / "Annotations" / f"{i:02}.xml", _xml(_object("dog", (11, 6, 30, 20))))
  found = read("voc", root)
  assert [i["file_name"] for i in found["val"]["images"]] == ["00.png", "10.png"]
  assert len(found["train"]["images"]) == 9


def test_splits_of_the_user(tmp_path):
  root = _kit(tmp_path / "source")
  write_text(root / "ImageSets/Main/trainval.txt", "a b\nc\nd\n")
  splits = {
    "train": ("Annotations", "ImageSets/Main/trainval.txt"),
    "whole": ("Annotations", "JPEGImages"),
  }
  found = prepared("voc", root, builder={"splits": splits})
  assert {split: len(content["images"]) for split, content in found.items()} == {
    "train": 3,
    "whole": 3,
  }


def test_the_list_of_names(tmp_path):
  root = _kit(tmp_path / "source")
  write_text(root / "labels.txt", "zebra\ndog\n")
  assert names_of(read("voc", root)["val"]) == ["zebra", "dog"]
  write_text(root / "Annotations/d.xml", _xml(_object("Dog", (1, 1, 8, 8))))
  message = error_of("voc", root)
  assert message == (
    "Annotations/d.xml, line 3: class is not in the list: 'Dog' is none of the 2 classes of labels.txt; "
    "fix it, or leave such records out with data.skip_bad=True"
  )


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("<annotation><object>", "d.xml: not valid XML: no element found: line 1, column 20"),
    ("", "d.xml: not valid XML: no element found"),
    ("<a></a>", "d.xml, line 1: its outermost element is not annotation: 'a'"),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "d.xml: entities are not read"),
    (_xml("<object></object>"), "d.xml, line 3: element object has no name"),
    (_xml(_object(" ", (1, 1, 8, 8))), "d.xml, line 3: element name is empty"),
    (_xml("<object><name>a</name></object>"), "d.xml, line 3: element object has no bndbox"),
    (_xml(_object("a", (9, 1, 8, 8))), "d.xml, line 3: box has a negative side"),
    (_xml(_object("a", (1, 1, "x", 8))), "d.xml, line 4: xmax is not a finite number: 'x'"),
    (_xml(_object("a", (1, 1, "", 8))), "d.xml, line 4: xmax is not a finite number: ''"),
    (_xml(size="<size><width>8</width></size>"), "d.xml, line 2: element size has no height"),
    (_xml(size=SIZE.replace("40", "x")), "d.xml, line 2: height is not a finite number: 'x'"),
    (
      _xml(size=SIZE.replace("40", "4.5")),
      "d.xml, line 2: height and width are not numbers of pixels: 4.5",
    ),
    (_xml(size=SIZE.replace("40", "4e9")), "d.xml, line 2: image is too large: 4e+09 x 80 pixels"),
  ],
)
def test_bad_files_are_named(text, words, tmp_path):
  root = _kit(tmp_path / "source")
  write_text(root / "Annotations/d.xml", text)
  assert words in error_of("voc", root)
  assert len(read("voc", root, skip_bad=True)["train"]["annotations"]) == 1


def test_boxes_outside_are_named_by_their_line(tmp_path):
  root = _kit(tmp_path / "source")
  write_text(root / "Annotations/d.xml", _xml(_object("dog", (1, 1, 90, 8))))
  with pytest.raises(UserError, match=r"d.xml, line 3: field bbox lies outside the image"):
    prepared("voc", root)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("ImageSets/Main/val.txt", "ImageSets/Main/val.txt: no such file"),
    ("JPEGImages/d.jpg", "ImageSets/Main/train.txt: no image 'd' in JPEGImages"),
  ],
)
def test_what_is_missing_is_named(name, words, tmp_path):
  root = _kit(tmp_path / "source")
  (root / name).unlink()
  assert words in error_of("voc", root).replace(str(root) + "/", "")


def test_label_files_without_an_image_are_named(tmp_path):
  root = tmp_path / "source"
  for split in ("train", "val"):
    write_image(root / split / "a.jpg")
    write_text(root / split / "a.xml", _xml(_object("dog", (1, 1, 8, 8))))
  write_text(root / "val/b.xml", _xml())
  assert "val/b.xml: no image of this name: add the image" in error_of("voc", root)
  assert len(read("voc", root, skip_bad=True)["val"]["images"]) == 1
  (root / "val/a.jpg").rename(root / "train/b.jpg")
  assert "val: no image in it" in error_of("voc", root)


def test_train_without_val_is_refused(tmp_path):
  write_image(tmp_path / "source/train/a.jpg")
  assert "folder train, but none of val, valid, validation" in error_of("voc", tmp_path / "source")
