"""Bad label files, images and layouts are reported, never fixed."""

import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.errors import UserError
from fpt_jax.tasks.segmentation.batches import images
from tests.data.datasets.test_label_maps import LAYOUTS
from tests.data_sets import LABEL_HEIGHT as HEIGHT
from tests.data_sets import LABEL_WIDTH as WIDTH
from tests.data_sets import image_folder, label_config, png


@pytest.fixture
def folder(tmp_path):
  return image_folder(tmp_path)


@pytest.mark.parametrize(
  ("builder", "message"),
  [
    ({}, "num_classes=0 must be 1 to 254"),
    ({"num_classes": 255}, "num_classes=255 must be 1 to 254"),
    ({"num_classes": 2, "class_names": ("a", "b", "c")}, "num_classes=2 .* which is 3"),
    ({"num_classes": 3, "void": 2}, "data.builder.void=2 must be -1, or from 3 .* to 255"),
    ({"num_classes": 3, "color": 2}, "data.builder: .*color"),
    ({"num_classes": 3.0}, "data.builder.num_classes=3.0 must be an integer"),
    ({"num_classes": "3"}, "data.builder.num_classes='3' must be an integer"),
    ({"num_classes": 3, "void": True}, "data.builder.void=True must be an integer"),
    ({"class_names": "sky"}, "data.builder.class_names='sky' must be a list of names"),
    ({"class_names": ("bg", "water", "water")}, r"class_names\[2\]: 'water' is given twice"),
    ({"class_names": ("bg", "")}, r"class_names\[1\]: '' must be a string that is not empty"),
    ({"class_names": ("bg", 1)}, r"class_names\[1\]: 1 must be a string"),
    (
      {"class_names": ("bg", "\ud800")},
      r"class_names\[1\]: '\\ud800' has a character that is not text",
    ),
    ({"num_classes": 3, "splits": ("train", "minival")}, "images/minival: no such folder"),
    ({"num_classes": 3, "splits": ("train+val",)}, "'train.val' cannot name a split"),
  ],
)
def test_bad_arguments_raise(folder, builder, message):
  folder.builder = builder
  with pytest.raises(UserError, match=message) as error:
    data.prepare(folder)
  assert "\n" not in str(error.value)


def _jpeg_label():
  file = io.BytesIO()
  PIL.Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(file, "JPEG")
  return file.getvalue()


BAD = {
  "out of range": (png(np.full((HEIGHT, WIDTH), 3, np.uint8)), r"labels are out of range: \[3\]"),
  "void of other data sets": (
    png(np.full((HEIGHT, WIDTH), 255, np.uint8)),
    r"labels are out of range: \[255\]",
  ),
  "size": (png(np.zeros((WIDTH, HEIGHT), np.uint8)), "not of the size .*9x6 .* the image is 6x9"),
  "16 bit": (png(np.zeros((HEIGHT, WIDTH), np.uint16)), "unusable: 16 bits per pixel"),
  "color": (png(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), r"a colour PNG \(RGB\)"),
  "alpha": (png(np.zeros((HEIGHT, WIDTH, 2), np.uint8)), r"a colour PNG \(LA\)"),
  "truncated": (png(np.eye(HEIGHT, WIDTH, dtype=np.uint8))[:55], "unusable: "),
  "truncated end": (png(np.eye(HEIGHT, WIDTH, dtype=np.uint8))[:-9], "the file is truncated"),
  "empty": (b"", "unusable: undecodable"),
  "text": (b"not a PNG", "unusable: undecodable"),
  "missing": (None, "labels cannot be read: No such file"),
  "jpeg": (_jpeg_label(), "labels must be a PNG, this is JPEG"),
}


def _set_labels(folder, split, values):
  """Writes the same label file for each image of a split: a column of pixels for each value, or more."""
  label_HW = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
  for file in (pathlib.Path(folder.source) / "labels" / split).iterdir():
    file.write_bytes(png(label_HW))


@pytest.mark.parametrize(
  ("classes", "train", "val", "words"),
  [
    (
      2,
      [0, 255],
      [0, 255],
      "of split train have no class but 0 ('0'); their other pixels, 50%, are void (255)",
    ),
    (1, [0, 255], [0, 255], "of split train have no class but 0 ('0')"),
    (2, [1, 255, 255], [0, 1], "of split train have no class but 1 ('1'); their other pixels, 67%"),
    (2, [0, 1], [0, 255, 255], "of split val have no class but 0 ('0'); their other pixels, 67%"),
    (
      5,
      [0, 255],
      [0, 0, 255],
      "of all splits have no class but 0 ('0'); their other pixels, 42%",
    ),
  ],
)
def test_masks_of_0_and_255_are_never_prepared(folder, classes, train, val, words):
  _set_labels(folder, "train", train)
  _set_labels(folder, "val", val)
  folder.builder = {"num_classes": classes}
  with pytest.raises(UserError) as raised:
    data.prepare(folder)
  message = str(raised.value)
  assert words in message
  number = {1: "0 and 1, with data.builder.num_classes=2", 2: "1 instead", 5: "1 instead"}[classes]
  number = "0 instead" if train[0] == 1 else number
  assert message.endswith(f"if they are a second class, write {number}")
  assert message.startswith(folder.source) and "\n" not in message
  assert not data.is_prepared(folder)


def test_masks_of_0_and_1_are_not_those_of_ade20k(tmp_path):
  """There, 0 is void and 1 the first class."""
  root = tmp_path / "ade"
  for kind, pixels in (("images", (HEIGHT, WIDTH, 3)), ("annotations", (HEIGHT, WIDTH))):
    (root / kind / "training").mkdir(parents=True)
    content = png(np.resize(np.array([0, 1], np.uint8), pixels))
    (root / kind / "training/0.png").write_bytes(content)
  config = label_config("ade20k", tmp_path / "d", source=str(root), builder={"splits": ("train",)})
  with pytest.raises(
    UserError, match=r"no class but 1 \('wall'\); their .*, 50%, are void \(0\) .* write 2 instead"
  ):
    data.prepare(config)


@pytest.mark.parametrize(
  ("train", "val", "warning", "error"),
  [
    ([255], [0, 1, 2], "prepare train: no pixel of the label files has a class", "0 of 3 classes"),
    (
      [0],
      [0, 1, 2],
      "prepare train: no label file has a pixel of 2 of 3 classes: 1, 2",
      "1 of 3 classes",
    ),
    (
      [0, 1],
      [0, 1, 255],
      "prepare train: no label file has a pixel of 1 of 3 classes: 2",
      "no label file has a pixel of 1 of 3 classes: 2; correct data.builder.num_classes",
    ),
    ([0, 1, 2], [255], "prepare val: no pixel of the label files has a class", None),
    ([0, 1], [2], "prepare train: no label file has a pixel of 1 of 3 classes: 2", None),
  ],
)
def test_label_files_without_a_class(folder, train, val, warning, error, caplog):
  _set_labels(folder, "train", train)
  _set_labels(folder, "val", val)
  folder.builder = {"num_classes": 3}
  with caplog.at_level("WARNING"):
    data.prepare(folder)
  assert warning in caplog.text
  if error is None:
    data.check_trainable(folder)
    return
  for split in ("train", "train[:2]"):
    folder.train_split = split
    with pytest.raises(UserError, match=error) as raised:
      data.check_trainable(folder)
    assert "prepare again, in another data.data_dir" in str(raised.value)


def test_complete_label_files_need_no_warning(folder, caplog):
  with caplog.at_level("WARNING", "absl"):
    data.prepare(folder)
  assert "class" not in caplog.text
  data.check_trainable(folder)


def test_file_names_that_are_not_utf8(folder):
  root = pathlib.Path(folder.source)
  for kind, ending in (("images", "jpg"), ("labels", "png")):
    (root / kind / f"train/0.{ending}").rename(root / kind / f"train/\udcff.{ending}")
  with pytest.raises(
    UserError, match=r"images/train: file name .* is not UTF-8: '\\udcff.jpg'"
  ) as raised:
    data.prepare(folder)
  str(raised.value).encode()


@pytest.mark.parametrize("bad", BAD)
def test_bad_labels_raise_or_are_skipped(folder, bad, caplog):
  content, message = BAD[bad]
  label = pathlib.Path(folder.source) / "labels" / "train" / "2.png"
  if content is None:
    label.unlink()
  else:
    label.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    data.prepare(folder)
  assert str(label) in str(error.value) and "\n" not in str(error.value)
  assert "BytesIO" not in str(error.value)
  assert "data.skip_bad=True" in str(error.value)
  assert not data.is_prepared(folder)

  folder.skip_bad = True
  with caplog.at_level("WARNING"):
    data.prepare(folder)
  assert f"skipped: {label}: " in caplog.text and "prepare train: 1 skipped: lab" in caplog.text
  assert data.info(folder).num_images == {"train": 3, "val": 4}
  assert [name for name, _, _ in images(folder, "train")] == [
    "0.jpg",
    "1.png",
    "3.jpg",
  ]


def test_bad_images_raise(folder):
  image = pathlib.Path(folder.source) / "images" / "val" / "1.png"
  image.write_bytes(image.read_bytes()[:60])
  with pytest.raises(UserError, match=rf"{image}: image is broken: undecodable image"):
    data.prepare(folder)
  assert not data.is_prepared(folder)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_named_pipes_are_not_opened(kind, folder):
  file = pathlib.Path(folder.source) / kind / "val" / "1.png"
  file.unlink()
  os.mkfifo(file)
  with pytest.raises(UserError, match=rf"{file}: {kind[:5]}.* cannot be read: not a regular file"):
    data.prepare(folder)


def test_a_split_without_a_good_image_raises(folder):
  for label in (pathlib.Path(folder.source) / "labels" / "val").iterdir():
    label.write_bytes(b"")
  folder.skip_bad = True
  with pytest.raises(UserError, match="split val has no good image"):
    data.prepare(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_without_the_layout_raises(name, tmp_path):
  config = label_config(name, tmp_path / "data", source=str(tmp_path))
  with pytest.raises(UserError, match=r"no such f.*; see data.source, data.builder.splits"):
    data.prepare(config)


def test_a_source_is_needed(tmp_path):
  with pytest.raises(UserError, match=r"data.source is empty"):
    data.prepare(label_config("camvid", tmp_path))
  with pytest.raises(UserError, match=r"nowhere: no such folder"):
    data.prepare(label_config("camvid", tmp_path, source=str(tmp_path / "nowhere")))


def test_a_list_that_names_a_missing_image_raises(tmp_path):
  root = tmp_path / "VOC2012"
  for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
    (root / folder).mkdir(parents=True)
  (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n")
  config = label_config("voc2012", tmp_path / "d", source=str(root), builder={"splits": ("train",)})
  with pytest.raises(UserError, match=r"JPEGImages/2007_000032.jpg: image cannot be read"):
    data.prepare(config)
  for text, message in (
    (b"a\xff", "train.txt: not a readable text file"),
    (b"a\0", r"not UTF-8: 'a\\x00.jpg'"),
  ):
    (root / "ImageSets/Segmentation/train.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
      data.prepare(config)
  (root / "ImageSets/Segmentation/train.txt").write_text("")
  with pytest.raises(UserError, match="split train has no image"):
    data.prepare(config)


def test_instances_without_label_maps_raise(real_coco):
  with pytest.raises(UserError, match=r"data.name='coco' has no label maps"):
    next(images(real_coco, "val"))


@pytest.mark.parametrize("splits", ["train", (1, 2)])
def test_splits_must_be_names(splits, tmp_path):
  config = label_config(
    "camvid", tmp_path / "data", source=str(tmp_path), builder={"splits": splits}
  )
  with pytest.raises(UserError, match=r"data\.builder\.splits=.* must be names"):
    data.prepare(config)
