"""Data sets of label maps are read as their files are."""

import collections
import pathlib

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.data.datasets import ade20k, camvid, cityscapes, lip, voc2012
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances
from fpt_jax.tasks.segmentation.batches import images
from tests.data_sets import LABEL_HEIGHT as HEIGHT
from tests.data_sets import LABEL_WIDTH as WIDTH
from tests.data_sets import image_folder, label_config, png

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


@pytest.fixture
def folder(tmp_path):
  return image_folder(tmp_path)


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
  (root / "TrainVal_parsing_annotations/train_segmentations/7_1.png").write_bytes(png(label))
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
