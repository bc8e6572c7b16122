"""YOLO's text files are read as Ultralytics writes and reads them."""

import shutil

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.configs import coco_box, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.tasks import detection
from fpt_jax.tasks.detection.batches import train_batches
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

YAML = """
path: .
train: images/train
val: images/val
names:
  0: traffic light
  1: 7
"""


def _source(root):
  """Two images to train on, of which one has no label file, and one to evaluate, without objects."""
  for name in ("train/a b.jpg", "train/bare.jpg", "val/c.jpg"):
    write_image(root / "images" / name)
  write_text(root / "data.yaml", YAML)
  # the second box ends beyond the border by rounding
  write_text(root / "labels/train/a b.txt", "0 0.5 0.5 0.25 0.5\n\n1 0.9 0.25 0.21 0.5\n")
  write_text(root / "labels/val/c.txt", "")
  return root


def test_boxes(tmp_path):
  found = prepared("yolo", _source(tmp_path / "my data"))
  train, val = found["train"], found["val"]
  assert train["categories"] == [{"id": 0, "name": "traffic light"}, {"id": 1, "name": "7"}]
  assert [i["file_name"] for i in train["images"]] == ["a b.jpg", "bare.jpg"]
  assert [i["id"] for i in train["images"] + val["images"]] == [1, 2, 3]
  assert [a["id"] for a in train["annotations"]] == [1, 2] and not val["annotations"]
  (_, name0, box0), (_, name1, box1) = objects_of(train)
  assert (name0, name1) == ("traffic light", "7")
  np.testing.assert_allclose(box0, [30, 10, 20, 20], atol=1e-9)
  np.testing.assert_allclose(box1, [63.6, 0, 16.8, 20], atol=1e-9)


def test_boxes_at_the_border_are_clipped(tmp_path):
  coco = settings("yolo", _source(tmp_path / "source"))
  data.prepare(coco)
  (example, _) = data.examples(coco, "train")
  np.testing.assert_allclose(example["boxes_xyxy"], [[30, 10, 50, 30], [63.6, 0, 80, 20]])


def test_boxes_have_no_masks(tmp_path):
  coco = settings("yolo", _source(tmp_path / "source"))
  data.prepare(coco)
  detection.adopt_classes(coco_box.get_config(), data.info(coco))
  with pytest.raises(UserError, match=r"boxes without masks; use configs/coco_box.py or"):
    detection.adopt_classes(coco_mask.get_config(), data.info(coco))


def test_polygons(tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "labels/train/a b.txt", "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n")
  (annotation,) = prepared("yolo", root)["train"]["annotations"]
  assert annotation["segmentation"] == [[20, 10, 60, 10, 60, 30, 20, 30]]
  assert annotation["bbox"] == [20, 10, 40, 20] and annotation["area"] == 800


def test_a_batch_of_training_through_the_config(tmp_path):
  root = _source(tmp_path / "source")
  config = coco_box.get_config("small")
  config.data.update(dict(format="yolo", source=str(root), data_dir=str(tmp_path / "records")))
  config.data.update(dict(short_edge=40, long_edge=80, buckets=((40, 80),), flip=False))
  data.prepare(config.data)
  data.check_trainable(config.data)
  detection.adopt_classes(config, data.info(config.data))
  assert config.model.category_names == ("traffic light", "7")
  assert config.model.category_ids == (0, 1) and config.model.num_classes == 2
  with train_batches(config.data, batch_size=2, seed=0) as batches:
    batch = next(batches)
  assert batch["image_BHWC"].shape == (2, 40, 80, 3)
  assert sorted(batch["gt_valid_BG"].sum(1)) == [0, 2]
  row = batch["gt_valid_BG"].sum(1).argmax()
  np.testing.assert_allclose(
    sorted(batch["gt_boxes_BG4"][row, :2].tolist()),
    [[30, 10, 50, 30], [63.6, 0, 80, 20]],
    rtol=1e-6,
  )


def test_records_do_not_depend_on_where_or_when_they_are_made(tmp_path):
  root = _source(tmp_path / "source")
  write_image(root / "images/train/sub/z.jpg")
  write_text(root / "labels/train/sub/z.txt", "1 .5 .5 .1 .1")
  first = read("yolo", root)
  shutil.copytree(root, tmp_path / "copy")
  assert read("yolo", tmp_path / "copy") == first == read("yolo", root)
  assert [i["file_name"] for i in first["train"]["images"]] == ["a b.jpg", "bare.jpg", "sub/z.jpg"]


def test_changes_are_noticed(tmp_path):
  root = _source(tmp_path / "source")
  coco = settings("yolo", root)
  data.prepare(coco)
  assert data.info(coco).num_images == {"train": 2, "val": 1}
  digest = data.digest(coco)
  write_text(root / "labels/train/bare.txt", "0 0.5 0.5 0.1 0.1")
  with pytest.raises(UserError, match=r"bare.txt is new; delete this folder"):
    data.info(coco)
  (root / "labels/train/bare.txt").unlink()
  write_image(root / "images/val/d.jpg")
  with pytest.raises(UserError, match=r"d.jpg is new"):
    data.info(coco)
  (root / "images/val/d.jpg").unlink()
  assert data.digest(coco) == digest
  shutil.copytree(root, tmp_path / "copy")  # the same data set, but prepared again
  copy = settings("yolo", tmp_path / "copy")
  assert not data.is_prepared(copy)
  data.prepare(copy)
  assert data.digest(copy) == digest
  shutil.rmtree(root)  # the records suffice
  assert coco_ground_truth(coco, "train")["annotations"]


@pytest.mark.parametrize(
  ("orientation", "exif", "size"),
  [(6, "apply", (WIDTH, HEIGHT)), (6, "ignore", (HEIGHT, WIDTH)), (3, "apply", (HEIGHT, WIDTH))],
)
def test_fractions_are_of_the_upright_image(orientation, exif, size, tmp_path, caplog):
  root = _source(tmp_path / "source")
  write_image(root / "images/train/a b.jpg", orientation=orientation)
  write_text(root / "labels/train/a b.txt", "0 0.5 0.5 0.5 0.5\n")
  train = prepared("yolo", root, exif=exif)["train"]
  height, width = size
  assert (train["images"][0]["height"], train["images"][0]["width"]) == size
  assert train["annotations"][0]["bbox"] == [width / 4, height / 4, width / 2, height / 2]
  assert caplog.text.count("the sizes do not show whether") == 1


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("0 .5 .5 .5", ("wrong number of fields: 4;",)),
    ("0 .5 .5 .5 .5 .9", ("wrong number of fields: 6;",)),
    ("0 .5 .5 x .5", ("coordinate is not a finite number: 'x'",)),
    ("0 .5 nan .5 .5", ("coordinate is not a finite number: 'nan'",)),
    ("0 40 20 8 8", ("coordinate is outside 0..1: 40;",)),
    ("0 -.2 .5 .1 .1", ("coordinate is outside 0..1: -0.2;",)),
    ("2 .5 .5 .5 .5", ("class is not in the list: '2' is none of 0 to 1",)),
    ("-1 .5 .5 .5 .5", ("class is not in the list: '-1'",)),
    ("0.5 .5 .5 .5 .5", ("class is not in the list: '0.5'",)),
    ("cat .5 .5 .5 .5", ("class is not a finite number: 'cat'",)),
  ],
)
def test_bad_lines_are_named(line, words, tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "labels/train/a b.txt", f"0 0.5 0.5 0.25 0.5\n{line}\n")
  message = error_of("yolo", root)
  assert message.startswith("labels/train/a b.txt, line 2: ")
  assert all(word in message for word in words)
  assert len(read("yolo", root, skip_bad=True)["train"]["annotations"]) == 1


def test_a_box_far_outside_is_named_by_its_line(tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "labels/train/a b.txt", "\n0 0.9 0.5 0.5 0.5\n")
  with pytest.raises(UserError, match=r"a b.txt, line 2: field bbox lies outside the image"):
    prepared("yolo", root)


def test_boxes_among_polygons_are_named(tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "labels/train/a b.txt", "0 .1 .1 .2 .1 .2 .2\n0 .5 .5 .1 .1\n")
  with pytest.raises(UserError, match=r"a b.txt, line 2: field segmentation is missing"):
    prepared("yolo", root)


def _remove(name):
  return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (_remove("images/train/a b.jpg"), "labels/train/a b.txt: no image of this name"),
    (_remove("data.yaml"), "no file names the classes; add data.yaml with the field names, or cla"),
    (
      lambda root: write_text(root / "data.yaml", "names: [a"),
      "data.yaml: not a readable YAML file",
    ),
    (lambda root: write_text(root / "data.yaml", "names: [a, yes]"), "data.yaml[1]: True must be"),
    (
      lambda root: write_text(root / "data.yaml", "names: [a, a]"),
      "data.yaml[1]: 'a' is given twice",
    ),
    (
      lambda root: write_text(root / "data.yaml", "names: {1: a}"),
      "data.yaml: field names must have",
    ),
    (
      lambda root: write_text(root / "data.yaml", "names: [a]\ntrain: images/train"),
      "data.yaml: field val must be a folder or a list of images, not None",
    ),
    (
      lambda root: write_text(root / "data.yaml", "names: [a]\ntrain: images/x\nval: images/val"),
      "data.yaml: field train: images/x: no such file or folder",
    ),
    (
      lambda root: write_text(root / "data.yaml", YAML + "kpt_shape: [17, 3]"),
      "kpt_shape: its labels are keypoints",
    ),
    (lambda root: write_image(root / "images/val/c.png"), "images/val/c.png and c.jpg would have"),
    (lambda root: shutil.rmtree(root / "labels"), "split train has no label file for any of its 2"),
    (lambda root: shutil.rmtree(root / "images/val"), "images/val: no such file or folder"),
    (
      lambda root: (root / "labels/train/a b.txt").write_bytes(b"\xff\xfe"),
      "labels/train/a b.txt: not a readable text file",
    ),
    (
      lambda root: (root / "images/train/bare.jpg").write_text("text"),
      "images/train/bare.jpg: file is broken",
    ),
  ],
)
def test_what_is_missing_is_named(change, words, tmp_path):
  root = _source(tmp_path / "source")
  change(root)
  assert words in error_of("yolo", root)


def test_bad_files_are_left_out(tmp_path, caplog):
  root = _source(tmp_path / "source")
  (root / "images/train/bare.jpg").write_text("text")
  write_text(root / "labels/train/alone.txt", "0 .5 .5 .5 .5")
  coco = settings("yolo", root, skip_bad=True)
  data.prepare(coco)
  assert data.info(coco).num_images == {"train": 1, "val": 1}
  assert "prepare train: 1 skipped: image: file is broken" in caplog.text
  assert "prepare train: 1 skipped: label file: no image of this name" in caplog.text
  data.info(coco)  # what was left out has not changed


def test_roboflow_names_folders_beside_the_file(tmp_path):
  root = tmp_path / "source"
  for split in ("train", "valid", "test"):
    write_image(root / split / "images/a_jpg.rf.0a1b.jpg")
    write_text(root / split / "labels/a_jpg.rf.0a1b.txt", "0 .5 .5 .5 .5")
  text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['a b']"
  write_text(root / "data.yaml", text)
  found = read("yolo", root)
  for split in ("train", "val"):
    assert objects_of(found[split]) == [("a_jpg.rf.0a1b.jpg", "a b", [20, 10, 40, 20])]
  found = read("yolo", root, splits={"test": ("test/labels", "test/images")})
  assert list(found) == ["test"] and names_of(found["test"]) == ["a b"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_folder_without_splits_is_divided(beside, tmp_path):
  """As labelImg and Label Studio write: classes.txt, and labels beside images or in a folder."""
  root = tmp_path / "images"  # this name is not that of the image folder
  folders = (root, root) if beside else (root / "images", root / "labels")
  for i in range(21):
    write_image(folders[0] / f"{i:02}.jpg")
    write_text(folders[1] / f"{i:02}.txt", "1 .5 .5 .5 .5")
  write_text((folders[1] if beside else root) / "classes.txt", "a\nb c\n")
  found = read("yolo", root)
  assert [i["file_name"] for i in found["val"]["images"]] == ["00.jpg", "10.jpg", "20.jpg"]
  assert len(found["train"]["images"]) == 18
  ids = [i["id"] for split in found.values() for i in split["images"]]
  assert ids == list(range(1, 22))
  assert {name for _, name, _ in objects_of(found["train"])} == {"b c"}


def test_darknets_layout(tmp_path):
  """As CVAT exports YOLO 1.1."""
  root = tmp_path / "source"
  for i in range(2):
    write_image(root / f"obj_train_data/{i}.jpg")
    write_text(root / f"obj_train_data/{i}.txt", "0 .5 .5 .5 .5")
  write_text(root / "obj.names", "traffic light\n")
  write_text(root / "obj.data", "classes = 1\ntrain = data/train.txt\n")
  write_text(root / "train.txt", "data/obj_train_data/0.jpg\ndata/obj_train_data/1.jpg\n")
  found = read("yolo", root)
  assert [objects_of(found[s])[0][:2] for s in ("val", "train")] == [
    ("0.jpg", "traffic light"),
    ("1.jpg", "traffic light"),
  ]


def test_data_yaml_of_another_machine(tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "data.yaml", YAML.replace("path: .", "path: /nowhere/datasets"))
  assert len(read("yolo", root)["train"]["images"]) == 2
  (root / "data.yaml").rename(root / "my.yaml")
  assert len(read("yolo", root)["train"]["images"]) == 2
  write_text(root / "other.yml", "names: [a]")
  assert "several YAML files, my.yaml and other.yml among them" in error_of("yolo", root)


def test_lists_of_images(tmp_path):
  root = _source(tmp_path / "source")
  write_text(root / "data.yaml", "train: [a.txt, images/val]\nval: b.txt\nnames: [x, y]")
  write_text(root / "a.txt", "./images/train/a b.jpg\n")
  write_text(root / "b.txt", "images/train/bare.jpg\nimages/train/a b.jpg\n")
  found = read("yolo", root)
  assert [i["file_name"] for i in found["train"]["images"]] == ["train/a b.jpg", "val/c.jpg"]
  assert [i["file_name"] for i in found["val"]["images"]] == ["a b.jpg", "bare.jpg"]
