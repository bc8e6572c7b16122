"""Data sets of label maps are read as their files are; bad files are reported, never fixed."""

import collections
import io
import os
import pathlib
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.data.datasets import ade20k, camvid, cityscapes, lip, voc2012
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances, label_map
from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.tasks.segmentation.batches import images
from tests.data_sets import label_config

HEIGHT, WIDTH = 6, 9
LAYOUTS = {
  layout.LAYOUT.name: layout.LAYOUT for layout in (ade20k, camvid, cityscapes, lip, voc2012)
}
# data set: folder of the real files, split, its image and label files
REAL = {
  "voc2012": ("voc2012", "val", "JPEGImages/*.jpg", "SegmentationClass/*.png"),
  "camvid": ("camvid", "test", "test/*.jpg", "testannot/*.png"),
  "ade20k": ("ade20k_sample", "val", "images/validation/*", "annotations/validation/*"),
  "lip": ("lip_sample", "val", "val_images/*", "val_segmentations/*"),
  "cityscapes": (
    "cityscapes_tiny",
    "val",
    "leftImg8bit/val/*/*",
    "gtFine/val/*/*_labelIds.png",
  ),
}


def _map_of_ids(name):
  """The class of each number in the data set's label files, independent of the layouts."""
  if name == "cityscapes":
    evaluated = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    return {i: evaluated.index(i) if i in evaluated else 255 for i in range(34)}
  if name == "ade20k":
    return {i: i - 1 if i else 255 for i in range(151)}
  if name == "camvid":
    return {i: i for i in range(11)} | {11: 255}
  return {i: i for i in range(20)} if name == "lip" else {i: i for i in range(21)} | {255: 255}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_complete(name):
  layout = LAYOUTS[name]
  count = {"ade20k": 150, "camvid": 11, "cityscapes": 19, "lip": 20, "voc2012": 21}[name]
  assert len(layout.class_names) == len(set(layout.class_names)) == len(layout.palette) == count
  assert dict(layout.class_of_id) == _map_of_ids(name)
  assert sorted(set(layout.class_of_id.values()) - {255}) == list(range(count))
  for pair in layout.swaps:
    sides = [layout.class_names[i].split() for i in pair]
    assert [side[0] for side in sides] == ["left", "right"] and sides[0][1:] == sides[1][1:]
  assert len(layout.swaps) == sum(n.startswith("left") for n in layout.class_names)


@pytest.mark.parametrize("name", REAL)
def test_real_labels_are_read_unchanged(name, real_data, tmp_path):
  folder, split, image_files, label_files = REAL[name]
  root = real_data / folder
  config = label_config(name, tmp_path, source=str(root), builder={"splits": (split,)})
  data.prepare(config)

  before = collections.Counter()
  labels = {path.stem: path for path in root.glob(label_files)}
  found = list(images(config, split))
  reader = Reader(config, split)
  after = collections.Counter()
  for i, (file_name, image_HWC, label_HW) in enumerate(found):
    stem = file_name.rsplit(".", 1)[0].replace("_leftImg8bit", "_gtFine_labelIds")
    with PIL.Image.open(labels[stem]) as label:
      ids_HW = np.asarray(label)
    table = np.array([_map_of_ids(name).get(i, -1) for i in range(256)])
    assert label_HW.dtype == np.uint8 and label_HW.shape == ids_HW.shape == image_HWC.shape[:2]
    np.testing.assert_array_equal(label_HW, table[ids_HW])
    for id_, pixels in zip(*_histogram(ids_HW), strict=True):
      before[table[id_]] += pixels
    for class_, pixels in zip(*_histogram(label_HW), strict=True):
      after[class_] += pixels
    (path,) = [p for p in root.glob(image_files) if p.name == file_name]
    assert reader.read(i).image == path.read_bytes()
  assert before == after
  names = _voc_names(root, split) if name == "voc2012" else [p.name for p in root.glob(image_files)]
  assert sorted(file_name for file_name, _, _ in found) == sorted(names)


def _voc_names(root, split):
  text = (root / "ImageSets/Segmentation" / f"{split}.txt").read_text()
  return [f"{name}.jpg" for name in text.split()]


def _histogram(ids_HW):
  return (values.tolist() for values in np.unique(ids_HW, return_counts=True))


def test_voc_palette_equals_that_of_the_files(real_data):
  with PIL.Image.open(next((real_data / "voc2012/SegmentationClass").glob("*.png"))) as label:
    palette = np.reshape(label.getpalette()[: 3 * 21], (21, 3))
  np.testing.assert_array_equal(voc2012.LAYOUT.palette, palette)


def test_ade20k_names_equal_those_of_the_list(real_data):
  lines = (real_data / "ade20k_sample/objectInfo150.txt").read_text().splitlines()[1:]
  names = [line.split("\t")[4].split(",")[0].strip() for line in lines]
  assert list(ade20k.LAYOUT.class_names) == names


def test_the_real_grey_jpeg_becomes_rgb(real_data, tmp_path):
  config = label_config("lip", tmp_path, source=str(real_data / "lip_sample"))
  data.prepare(config)
  ((_, image_HWC, _),) = images(config, "val")
  assert image_HWC.ndim == 3 and (np.ptp(image_HWC, axis=-1) == 0).all()


def _png(array, mode=None):
  file = io.BytesIO()
  PIL.Image.fromarray(array, mode).save(file, "PNG")
  return file.getvalue()


def _grey_png(ids_HW, bits):
  """A grey PNG with `bits` bits per pixel, written as the PNG specification says."""
  height, width = ids_HW.shape
  rows = b""
  for row in ids_HW:
    unpacked = np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, 8 - bits :]
    rows += b"\0" + np.packbits(unpacked.reshape(-1)).tobytes()
  chunks = [
    (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
    (b"IDAT", zlib.compress(rows)),
    (b"IEND", b""),
  ]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in chunks
  )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_greys_of_few_bits_are_read_as_numbers(rng, bits):
  ids_HW = rng.integers(0, 2**bits, (5, 7), np.uint8)
  np.testing.assert_array_equal(label_map.decode_ids(_grey_png(ids_HW, bits)), ids_HW)


@pytest.mark.parametrize("colors", [2, 4, 16, 256])
def test_palettes_are_read_as_numbers(rng, colors):
  ids_HW = rng.integers(0, colors, (5, 7), np.uint8)
  image = PIL.Image.fromarray(ids_HW).convert("P")
  image.putdata(ids_HW.ravel().tolist())
  image.putpalette(rng.integers(0, 256, 3 * colors).tolist())
  file = io.BytesIO()
  image.save(file, "PNG")
  np.testing.assert_array_equal(label_map.decode_ids(file.getvalue()), ids_HW)


def test_label_maps_are_stored_losslessly(rng):
  label_HW = rng.integers(0, 256, (13, 8), np.uint8)
  png = encode_png(label_HW)
  np.testing.assert_array_equal(label_map.decode_ids(png), label_HW)


@pytest.fixture
def folder(tmp_path):
  """A user's data set: four images per split, three classes, void 9."""
  root = tmp_path / "source"
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    (root / "images" / split).mkdir(parents=True)
    (root / "labels" / split).mkdir(parents=True)
    for i, ending in enumerate((".jpg", ".png", ".JPEG", ".jpg")):
      image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
      PIL.Image.fromarray(image).save(root / "images" / split / f"{i}{ending}")
      label = rng.choice([0, 1, 2, 9], (HEIGHT, WIDTH)).astype(np.uint8)
      (root / "labels" / split / f"{i}.png").write_bytes(_png(label))
  (root / "images" / "train" / "notes.txt").write_text("not an image")
  (root / "images" / "train" / ".hidden.jpg").write_text("not an image")
  return label_config(
    "image_folder",
    tmp_path / "data",
    source=str(root),
    builder={"class_names": ("sky", "road", "car"), "void": 9},
  )


def test_folders_of_the_user(folder, caplog):
  data.prepare(folder)
  info = data.info(folder)
  assert info.class_names == ("sky", "road", "car") and info.num_classes == 3
  assert info.num_images == {"train": 4, "val": 4}
  assert info.category_names == () and info.swaps == ()
  assert info.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
  folder_of_images = pathlib.Path(folder.source) / "images" / "train"
  assert f"{folder_of_images}: 4 images; passed over: 1 .txt, 1 hidden" in caplog.messages
  found = list(images(folder, "train"))
  assert [name for name, _, _ in found] == ["0.jpg", "1.png", "2.JPEG", "3.jpg"]
  for i, (_, _, label_HW) in enumerate(found):
    with PIL.Image.open(pathlib.Path(folder.source) / f"labels/train/{i}.png") as label:
      ids_HW = np.asarray(label)
    np.testing.assert_array_equal(label_HW, np.where(ids_HW == 9, 255, ids_HW))
  ids = [Reader(folder, split).read(i).image_id for split in ("train", "val") for i in range(4)]
  assert ids == list(range(1, 9))


def test_label_files_without_an_image_are_counted(folder, caplog):
  labels = pathlib.Path(folder.source) / "labels" / "train"
  for name in ("8.png", "7.png"):
    (labels / name).write_bytes(b"")
  data.prepare(folder)
  line = f"{labels}: 2 label files have no image, such as {labels / '7.png'}"
  assert [message for message in caplog.messages if "have no image" in message] == [line]


def test_classes_without_names_are_numbered(folder):
  folder.builder = {"num_classes": 10, "void": -1, "splits": None}
  data.prepare(folder)
  assert data.info(folder).class_names == tuple("0123456789")
  assert 9 in next(iter(images(folder, "train")))[2]  # a class, not void


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


BAD = {
  "out of range": (_png(np.full((HEIGHT, WIDTH), 3, np.uint8)), r"labels are out of range: \[3\]"),
  "void of other data sets": (
    _png(np.full((HEIGHT, WIDTH), 255, np.uint8)),
    r"labels are out of range: \[255\]",
  ),
  "size": (_png(np.zeros((WIDTH, HEIGHT), np.uint8)), "not of the size .*9x6 .* the image is 6x9"),
  "16 bit": (_png(np.zeros((HEIGHT, WIDTH), np.uint16)), "unusable: 16 bits per pixel"),
  "color": (_png(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), r"a colour PNG \(RGB\)"),
  "alpha": (_png(np.zeros((HEIGHT, WIDTH, 2), np.uint8)), r"a colour PNG \(LA\)"),
  "truncated": (_png(np.eye(HEIGHT, WIDTH, dtype=np.uint8))[:55], "unusable: "),
  "truncated end": (_png(np.eye(HEIGHT, WIDTH, dtype=np.uint8))[:-9], "the file is truncated"),
  "empty": (b"", "unusable: undecodable"),
  "text": (b"not a PNG", "unusable: undecodable"),
  "missing": (None, "labels cannot be read: No such file"),
}


def _jpeg_label():
  file = io.BytesIO()
  PIL.Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(file, "JPEG")
  return file.getvalue()


def _set_labels(folder, split, values):
  """Writes the same label file for each image of a split: a column of pixels for each value, or more."""
  label_HW = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
  for file in (pathlib.Path(folder.source) / "labels" / split).iterdir():
    file.write_bytes(_png(label_HW))


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
    png = _png(np.resize(np.array([0, 1], np.uint8), pixels))
    (root / kind / "training/0.png").write_bytes(png)
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


BAD["jpeg"] = (_jpeg_label(), "labels must be a PNG, this is JPEG")


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


def test_lip_is_found_in_the_folders_of_its_archives(tmp_path):
  root = tmp_path / "LIP"
  for folder in (
    "TrainVal_images/train_images",
    "TrainVal_parsing_annotations/train_segmentations",
  ):
    (root / folder).mkdir(parents=True)
  image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
  PIL.Image.fromarray(image).save(root / "TrainVal_images/train_images/7_1.jpg")
  label = np.full((HEIGHT, WIDTH), 19, np.uint8)
  (root / "TrainVal_parsing_annotations/train_segmentations/7_1.png").write_bytes(_png(label))
  config = label_config("lip", tmp_path / "d", source=str(root), builder={"splits": ("train",)})
  data.prepare(config)
  ((name, _, label_HW),) = images(config, "train")
  assert name == "7_1.jpg" and (label_HW == 19).all()


def test_context_shapes_have_label_maps(shapes):
  info = data.info(shapes)
  assert info.class_names == ("background", *info.category_names)
  assert len(info.palette) == info.num_classes == 7
  reader = Reader(shapes, "val")
  for i, (_, _, label_HW) in enumerate(images(shapes, "val")):
    record = reader.read(i)
    areas = collections.Counter()
    for label, annotation in zip(record.labels, record.annotations, strict=True):
      areas[int(label)] += int(instances.decode_annotation(annotation)["area"])
    classes, pixels = _histogram(label_HW)
    assert dict(zip(classes, pixels, strict=True)) == areas | {0: 64 * 64 - areas.total()}


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
