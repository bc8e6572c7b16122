"""A prepared split can be looked at as NumPy arrays, without TensorFlow in the caller's hands."""

import itertools
import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError
from tests.data_sets import (
  HEIGHT,
  WIDTH,
  config,
  errors_of_preparing,
  label_config,
  write_coco,
)


@pytest.fixture
def folder(tmp_path):
  for kind in ("images", "labels"):
    (tmp_path / "source" / kind / "val").mkdir(parents=True)
  image_HWC = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
  label_HW = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) % 3
  label_HW[0] = 255
  PIL.Image.fromarray(image_HWC).save(tmp_path / "source/images/val/street.png")
  PIL.Image.fromarray(label_HW).save(tmp_path / "source/labels/val/street.png")
  builder = {"num_classes": 3, "splits": ("val",)}
  folder = label_config(
    "image_folder", tmp_path / "data", source=str(tmp_path / "source"), builder=builder
  )
  data.prepare(folder)
  return folder, image_HWC, label_HW


def test_examples_of_instances(coco):
  found = list(data.examples(coco, "train"))
  assert [(e["image_id"], e["file_name"]) for e in found] == [
    (70, "rgb.jpg"),
    (5, "grey.jpg"),
    (6, "cmyk.jpg"),
    (9, "tall.png"),
  ]
  for example in found:
    assert set(example) == {
      *("image", "image_id", "file_name"),
      *("boxes_xyxy", "category_ids", "is_crowd", "masks"),
    }
    count = len(example["boxes_xyxy"])
    height, width, channels = example["image"].shape
    assert example["image"].dtype == np.uint8 and channels == 3
    assert type(example["image_id"]) is int and type(example["file_name"]) is str
    assert (example["boxes_xyxy"].dtype, example["boxes_xyxy"].shape) == (np.float32, (count, 4))
    assert (example["category_ids"].dtype, example["category_ids"].shape) == (np.int64, (count,))
    assert (example["is_crowd"].dtype, example["is_crowd"].shape) == (bool, (count,))
    assert (example["masks"].dtype, example["masks"].shape) == (bool, (count, height, width))
  rgb, grey, cmyk, tall = found
  path = pathlib.Path(coco.source) / "train2017/rgb.jpg"
  np.testing.assert_array_equal(rgb["image"], np.asarray(PIL.Image.open(path)))
  rgb["image"][0] = 0  # the caller's own
  assert len(cmyk["masks"]) == 0 and cmyk["image"].shape == (HEIGHT, WIDTH, 3)
  np.testing.assert_allclose(rgb["boxes_xyxy"], [[10.1, 4, 30.1, 12], [2, 0, 12, 20]], rtol=1e-6)
  assert rgb["category_ids"].tolist() == [90, 3] and rgb["is_crowd"].tolist() == [False, True]
  half, columns = np.zeros((2, HEIGHT, WIDTH), bool)
  half[4:12, 10:20] = True  # the polygon from x = 10.1 to 20.1
  columns[:, 2:12] = True
  np.testing.assert_array_equal(rgb["masks"], [half, columns])
  np.testing.assert_array_equal(grey["masks"], [columns])
  assert tall["image"].shape == (WIDTH, HEIGHT, 3) and tall["masks"][0, 30:, :].all()
  assert not tall["masks"][0, :30].any()


def test_examples_of_label_maps(folder):
  folder, image_HWC, label_HW = folder
  (example,) = data.examples(folder, "val")
  assert set(example) == {"image", "image_id", "file_name", "label_map"}
  assert (example["image_id"], example["file_name"]) == (1, "street.png")
  np.testing.assert_array_equal(example["image"], image_HWC)
  np.testing.assert_array_equal(example["label_map"], label_HW)
  assert example["image"].dtype == example["label_map"].dtype == np.uint8


def test_examples_of_generated_instances(shapes):
  for example in data.examples(shapes, "val"):
    assert example["image"].shape == (64, 64, 3)
    for box, mask_HW in zip(example["boxes_xyxy"], example["masks"], strict=True):
      rows, columns = np.nonzero(mask_HW)
      inside = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
      np.testing.assert_array_equal(box, inside)


def test_boxes_without_masks_are_whole_boxes(tmp_path):
  source = tmp_path / "source"
  content = write_coco(source)

  for annotation in content["annotations"]:
    annotation.pop("segmentation")
    annotation.update(bbox=[2, 3, 5, 4], iscrowd=0)
  for split in ("train", "val"):
    (source / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
  coco = config("coco", tmp_path / "data", source=str(source))
  data.prepare(coco)
  mask_HW = next(data.examples(coco, "val"))["masks"][0]
  assert mask_HW[3:7, 2:7].all() and mask_HW.sum() == 20


def test_parts_of_a_split(coco):
  assert [e["image_id"] for e in data.examples(coco, "train[1:3]")] == [5, 6]


def test_examples_close_their_reader(coco, monkeypatch):
  closed = []
  close = Reader.close
  monkeypatch.setattr(Reader, "close", lambda self: (closed.append(self), close(self)))
  iterator = data.examples(coco, "train")
  assert len(list(itertools.islice(iterator, 2))) == 2 and not closed
  iterator.close()
  assert len(closed) == 1
  assert len(list(data.examples(coco, "train"))) == 4 and len(closed) == 2


def test_mistakes_are_reported_when_examples_are_asked_for(coco, tmp_path):
  with pytest.raises(
    UserError, match=r"split 'test' cannot be read .* choose one of \['train', 'val'\]"
  ):
    data.examples(coco, "test")
  coco.data_dir = str(tmp_path / "other")
  with pytest.raises(UserError, match=r"other.* is not prepared; run --mode=prepare"):
    data.examples(coco, "train")


def test_a_label_map_of_another_size_names_its_record(folder, monkeypatch):
  folder, _, _ = folder
  monkeypatch.setattr(
    "fpt_jax.data.records.label_map.decode_ids", lambda png: np.zeros((2, 2), np.uint8)
  )
  with pytest.raises(
    UserError, match=r"record 0 of split val in .*, street\.png: labels: .*\(2, 2\)"
  ):
    next(data.examples(folder, "val"))


def test_generated_images_have_no_source(shapes):
  other = shapes.copy_and_resolve_references()
  other.source = "/data/mine"
  with pytest.raises(UserError, match=r"data\.source=/data/mine: the images of .* are drawn"):
    data.info(other)


def test_two_preparations_at_a_time_and_what_a_killed_one_has_left(tmp_path, caplog):
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
  data.prepare(coco)
  (prepared,) = (tmp_path / "data").rglob("dataset_info.json")
  left = prepared.parent.parent / f"incomplete.ABCDEF_{prepared.parent.name}"
  prepared.parent.rename(left)
  assert not data.is_prepared(coco)
  caplog.set_level("INFO")
  assert not errors_of_preparing(coco, times=2)
  assert caplog.text.count("preparing coco in") == 1 and caplog.text.count("already prepared") == 1
  assert f"removed {left}, which a preparation that was killed has left" in caplog.text
  assert not left.exists() and data.is_prepared(coco)
  assert not list((tmp_path / "data").rglob("running.lock"))


@pytest.mark.parametrize(
  "change",
  [
    {},
    [],
    {"sizes": {"train": None}},
    {"inputs": "x"},
    {"sizes": 5},
    {"objects": {"test": 3}},
    {"category_names": 5},
    {"inputs": {"options": {}, "files": {}}},
  ],
)
def test_metadata_of_other_types_are_reported_in_one_line(change, tmp_path):
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
  data.prepare(coco)
  (file,) = (tmp_path / "data").rglob("metadata.json")
  content = json.loads(file.read_text())
  file.write_text(json.dumps((content | change) if change else change))
  coco.train_split = "train"
  for use in (data.prepare, data.info, data.check_trainable, data.digest):
    try:
      use(coco)
    except UserError as error:
      assert "\n" not in str(error) and str(tmp_path / "data") in str(error)
  with pytest.raises(UserError, match="prepare"):
    data.info(coco)
    data.check_trainable(coco)


@pytest.mark.parametrize("how", ["cut", "empty", "deleted", "other bytes"])
def test_damaged_records_are_reported_in_one_line(how, tmp_path):
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
  data.prepare(coco)
  shutil.copytree(tmp_path / "data", tmp_path / "good")
  files = [p.relative_to(tmp_path / "data") for p in (tmp_path / "data").rglob("*") if p.is_file()]
  assert len(files) == 5
  reported = set()
  for file in files:
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(tmp_path / "good", tmp_path / "data")
    target = tmp_path / "data" / file
    content = target.read_bytes()
    third = len(content) // 3
    damaged = {
      "cut": content[:third],
      "empty": b"",
      "other bytes": content[:third] + b"\xff\x00\x81" + content[third + 3 :],
    }
    if how == "deleted":
      target.unlink()
    else:
      target.write_bytes(damaged[how])
    try:
      read = [list(data.examples(coco, split)) for split in ("train", "val")]
    except UserError as error:
      assert "\n" not in str(error) and str(tmp_path / "data") in str(error)
      assert "prepare" in str(error)
      reported.add(file.name.partition(".")[0])
    else:
      assert [len(examples) for examples in read] == [4, 4]
  assert reported >= {"dataset_info", "metadata"}
  if how != "other bytes":  # the records may lie elsewhere in a file with padding
    assert len(reported) >= 4
