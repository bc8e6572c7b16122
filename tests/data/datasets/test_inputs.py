"""Prepared records are refused if the files or options that they were prepared from have changed."""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.data.datasets import inputs
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError
from tests.data_sets import config, label_config, write_coco

TRAIN = "source/annotations/instances_train2017.json"


def _write_folder(root):
  """Writes an image folder of two images per split, whose label files all have one size in bytes."""
  for split in ("train", "val"):
    for kind in ("images", "labels"):
      (root / kind / split).mkdir(parents=True)
    for i in range(2):
      PIL.Image.fromarray(np.full((6, 9, 3), 40 * i, np.uint8)).save(
        root / "images" / split / f"{i}.png"
      )
      _write_label(root / "labels" / split / f"{i}.png", i)
  return root


def _write_label(file, value):
  PIL.Image.fromarray(np.full((6, 9), value, np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path):
  source = _write_folder(tmp_path / "source")
  folder = label_config(
    "image_folder", tmp_path / "data", source=str(source), builder={"num_classes": 2}
  )
  data.prepare(folder)
  return folder


def assert_refused(config_data, *words):
  """Checks that every way to use the records ends in one line with these words."""
  split = "train"
  for use in (
    data.prepare,
    data.info,
    lambda d: data.num_images(d, split),
    lambda d: Reader(d, split),
    lambda d: data.examples(d, split),
  ):
    with pytest.raises(UserError) as raised:
      use(config_data)
    message = str(raised.value)
    assert "\n" not in message
    for word in ("data.data_dir: ", "delete this folder to prepare it again", *words):
      assert word in message


def _rewrite(file, change):
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


def test_edited_annotations(coco, tmp_path):
  assert data.info(coco).num_images["train"] == 4
  # one digit of a box: the file's size stays, and its date is set back, as archives do
  file = tmp_path / TRAIN
  before = file.stat()
  file.write_text(file.read_text().replace("[10.1, 4.0", "[10.1, 5.0", 1))
  assert file.stat().st_size == before.st_size
  os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert_refused(coco, "instances_train2017.json has changed")


def test_renamed_categories(coco, tmp_path):
  _rewrite(tmp_path / TRAIN, lambda c: c["categories"][0].update(name="horse"))
  assert_refused(coco, "instances_train2017.json has changed")


def test_edited_annotations_of_a_single_file(tmp_path):
  write_coco(tmp_path / "source")
  file = tmp_path / TRAIN
  coco = config(
    "coco", tmp_path / "data", annotations=str(file), images=str(tmp_path / "source/train2017")
  )
  data.prepare(coco)
  data.prepare(coco)
  _rewrite(file, lambda c: c["annotations"].pop())
  assert_refused(coco, "prepared from other inputs: ", f"{TRAIN} has changed; delete")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda f: f.unlink(), "rgb.jpg is missing"),
    (lambda f: f.write_bytes(f.read_bytes() + b"0"), "rgb.jpg has changed"),
    (lambda f: f.write_bytes(f.read_bytes()[:-9] + bytes(9)), "rgb.jpg has changed"),
  ],
)
def test_changed_images(coco, tmp_path, change, words):
  change(tmp_path / "source/val2017/rgb.jpg")
  assert_refused(coco, f"source/val2017/{words}")


def test_files_that_are_not_of_the_data_set_do_not_matter(coco, tmp_path):
  (tmp_path / "source/val2017/.DS_Store").write_text("")
  shutil.copy(tmp_path / "source/val2017/rgb.jpg", tmp_path / "source/val2017/new.jpg")
  (tmp_path / TRAIN).touch()
  os.utime(tmp_path / "source/val2017/rgb.jpg", (0, 0))
  assert data.info(coco).num_images == {"train": 4, "val": 4}


@pytest.mark.parametrize("skipped", [False, True])
def test_skip_bad(tmp_path, skipped):
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"), skip_bad=skipped)
  data.prepare(coco)
  coco.skip_bad = not skipped
  assert_refused(coco, f"data.skip_bad was {skipped}, now {not skipped}")


def test_a_skipped_image_that_is_there_now(tmp_path):
  write_coco(tmp_path / "source")
  image = tmp_path / "source/train2017/grey.jpg"
  image.rename(tmp_path / "grey.jpg")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"), skip_bad=True)
  data.prepare(coco)
  assert data.info(coco).num_images["train"] == 3
  (tmp_path / "grey.jpg").rename(image)
  assert_refused(coco, "train2017/grey.jpg is new")


def test_other_splits_of_coco(coco, tmp_path):
  val = ["annotations/instances_val2017.json", "val2017"]
  coco.builder = {"splits": {"val": val}}
  assert_refused(coco, "data.builder.splits was ['train', 'val'], now ['val']")
  # the same files by other names
  train = ["annotations/instances_train2017.json", str(tmp_path / "source/train2017")]
  coco.builder = {"splits": {"val": val, "train": train}}
  assert data.info(coco).num_images == {"train": 4, "val": 4}
  coco.builder = {"splits": {"val": val, "train": [train[0], "pictures"]}}
  assert_refused(coco, "source/pictures, which does not exist")
  coco.source = ""
  assert_refused(coco, "data.builder.splits was ")


@pytest.mark.parametrize(
  ("builder", "words"),
  [
    ({"num_classes": 3}, "data.builder.num_classes was 2, now 3"),
    ({"class_names": ("land", "sea")}, "data.builder.class_names was ['0', '1'], now ['land', 'sea']"),
    ({"class_names": ("1", "0")}, "data.builder.class_names was ['0', '1'], now ['1', '0']"),
    ({"num_classes": 2, "void": 7}, "data.builder.void was 255, now 7"),
    ({"num_classes": 2, "void": -1}, "data.builder.void was 255, now -1"),
    ({"num_classes": 2, "splits": ("train",)}, "data.builder.splits was ['train', 'val'], now ['train']"),
  ],
)  # fmt: skip
def test_options_of_an_image_folder(folder, builder, words):
  folder.builder = builder
  assert_refused(folder, words)
  folder.source = ""  # records that were prepared elsewhere
  assert_refused(folder, words)


def test_options_that_mean_the_same(folder):
  folder.builder = {"class_names": ["0", "1"], "void": 255, "splits": ["train", "val"]}
  assert data.info(folder).class_names == ("0", "1")


def test_edited_labels(folder, tmp_path):
  file = tmp_path / "source/labels/train/1.png"
  before = file.stat()
  _write_label(file, 255)
  assert file.stat().st_size == before.st_size  # only the content tells
  os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert_refused(folder, "source/labels/train/1.png has changed")


def test_added_and_removed_images(folder, tmp_path):
  for kind in ("images", "labels"):
    shutil.copy(tmp_path / f"source/{kind}/val/0.png", tmp_path / f"source/{kind}/val/7.png")
  (tmp_path / "source/images/train/1.png").unlink()
  assert_refused(folder, "images/train/1.png is missing", "images/val/7.png is new")


def test_many_changes_are_counted(folder, tmp_path):
  for split in ("train", "val"):
    for i in range(2):
      _write_label(tmp_path / f"source/labels/{split}/{i}.png", 255)
  assert_refused(folder, "labels/train/0.png and 1 more files have changed")


def test_fixed_layouts(tmp_path):
  source = tmp_path / "camvid"
  for part in ("images", "labels"):
    shutil.copytree(
      _write_folder(tmp_path / part) / part / "train",
      source / f"train{'annot' * (part == 'labels')}",
    )
  camvid = label_config(
    "camvid", tmp_path / "data", source=str(source), builder={"splits": ("train",)}
  )
  data.prepare(camvid)
  assert data.info(camvid).num_images == {"train": 2}
  _write_label(source / "trainannot/1.png", 5)
  assert_refused(camvid, "trainannot/1.png has changed")


def test_a_copy_of_the_source_is_the_same(coco, folder, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(tmp_path / "source", copy, copy_function=shutil.copyfile)
  for config_data in (coco, folder):
    config_data.source = str(copy)
    data.prepare(config_data)
    assert data.num_images(config_data, "val") > 0
  _write_label(copy / "labels/val/1.png", 0)
  assert_refused(folder, "copy/labels/val/1.png has changed")


def test_a_source_that_is_not_there(coco, folder, tmp_path):
  (tmp_path / "source").rename(tmp_path / "moved")
  for config_data in (coco, folder):
    assert data.info(config_data).num_images["val"] > 0  # its own source is gone: records suffice
    config_data.source = str(tmp_path / "nowhere")
    words = f"prepared from {tmp_path}/source, not from data.source={tmp_path}/nowhere: "
    assert_refused(config_data, f"{words}{tmp_path}/nowhere does not exist")
    config_data.source = ""
    assert data.info(config_data).num_images["val"] > 0


def test_parts_of_the_source_that_are_not_there(coco, folder, tmp_path, caplog):
  inputs.warn_once.cache_clear()
  shutil.rmtree(tmp_path / "source/train2017")
  shutil.rmtree(tmp_path / "source/images/train")
  with caplog.at_level("WARNING"):
    for _ in range(2):
      for config_data in (coco, folder):
        assert data.info(config_data).num_images["train"] > 0
  assert caplog.text.count("train2017 does not exist any more; its records are used") == 1
  assert caplog.text.count("records of split train are used nevertheless") == 1
  # another source must be complete
  (tmp_path / "empty").mkdir()
  folder.source = str(tmp_path / "empty")
  with pytest.raises(UserError, match="empty/images/train: no such folder"):
    data.info(folder)


def test_records_of_an_earlier_version(folder, tmp_path, caplog):
  """They have no notes: what their metadata tell is compared, and the log warns once."""
  inputs.warn_once.cache_clear()
  (file,) = (tmp_path / "data").rglob("metadata.json")
  _rewrite(file, lambda metadata: metadata.pop("inputs"))
  with caplog.at_level("WARNING"):
    for _ in range(2):
      assert data.info(folder).num_images["val"] == 2
  assert caplog.text.count("was prepared by an earlier version") == 1
  folder.builder.num_classes = 3
  assert_refused(folder, "data.builder.class_names was ['0', '1'], now ['0', '1', '2']")
  folder.builder = {"num_classes": 2, "splits": ("val",)}
  assert_refused(folder, "data.builder.splits was ['train', 'val'], now ['val']")
  folder.builder = {"num_classes": 2}
  folder.source = str(tmp_path)
  assert_refused(folder, f"{tmp_path}/source, not from data.source={tmp_path}: its files cannot be")


def test_an_edit_during_a_training_does_not_stop_its_evaluation(coco, tmp_path):
  reader = Reader(coco, "train")
  _rewrite(tmp_path / TRAIN, lambda c: c["annotations"].pop())
  assert data.num_images(coco, "val") == 4
  reader.close()
  assert_refused(coco, "instances_train2017.json has changed")


def test_of_many_touched_images_a_sample_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, "_SAMPLE", 3)
  paths = {str(i): tmp_path / str(i) for i in range(10)}
  for path in paths.values():
    path.write_text("same")
  notes = {name: inputs.note(path) for name, path in paths.items()}
  read = []
  monkeypatch.setattr(inputs, "note", lambda path: read.append(path) or notes[path.name])
  assert inputs.changed_files(notes, paths, sample=True) == [] and not read
  for path in paths.values():
    os.utime(path, (0, 0))
  assert inputs.changed_files(notes, paths, sample=True) == [] and len(read) == 3
  assert inputs.changed_files(notes, paths) == [] and len(read) == 3 + 10
