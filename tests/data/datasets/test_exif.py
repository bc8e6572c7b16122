"""Annotations lie on their objects whatever the EXIF orientation of the images and label files."""

import json
import pathlib

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.batches import eval_batches, train_batches
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from fpt_jax.tasks.detection.ground_truth import images as images_with_objects
from fpt_jax.tasks.segmentation.batches import images as images_with_labels
from tests.data_sets import UPRIGHT, config, encode_tagged, label_config

HEIGHT, WIDTH = 40, 64
BOX = (8, 4, 24, 16)  # x, y, width, height of a white rectangle in a black image
INVERSE = {6: 8, 8: 6}  # the other orientations are their own


def _with_object(height=HEIGHT, width=WIDTH):
  """Returns a black image with the rectangle, uint8 [H, W, 3]."""
  pixels = np.zeros((height, width, 3), np.uint8)
  x, y, w, h = BOX
  pixels[y : y + h, x : x + w] = 255
  return pixels


def _stored(upright, orientation):
  """Returns the pixels that a camera with this orientation stores."""
  return np.ascontiguousarray(UPRIGHT[INVERSE.get(orientation, orientation)](upright))


def _coco(root: pathlib.Path, files: dict[str, bytes], size, **fields):
  """Writes images and an annotation file that says that the rectangle is in each; returns its config."""
  (root / "images").mkdir(parents=True)
  for name, content in files.items():
    (root / "images" / name).write_bytes(content)
  x, y, w, h = BOX
  polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
  content = {
    "images": [
      {"id": i, "file_name": name, "height": size[0], "width": size[1]}
      for i, name in enumerate(files)
    ],
    "annotations": [
      {"id": i, "image_id": i, "category_id": 1, "bbox": BOX, "segmentation": [polygon]}
      | {"area": w * h, "iscrowd": 0}
      for i in range(len(files))
    ],
    "categories": [{"id": 1, "name": "white"}],
  }
  (root / "a.json").write_text(json.dumps(content))
  paths = {"annotations": str(root / "a.json"), "images": str(root / "images")}
  sizes = {"short_edge": 40, "long_edge": 64, "buckets": ((40, 64), (64, 40))}
  return config("coco", root / "data", **paths | sizes | fields)


def _check_objects(image_HWC, boxes_xywh):
  assert len(boxes_xywh) == 1
  for x, y, w, h in np.asarray(boxes_xywh).round().astype(int):
    assert image_HWC[y : y + h, x : x + w].min() > 200
    outside = image_HWC.astype(int).copy()
    outside[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] = 0
    assert outside.max() < 60


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (HEIGHT, HEIGHT)])
def test_objects_of_upright_images(size, name, tmp_path):
  upright = _with_object(*size)
  options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}}[name]
  files = {f"{o}.x": encode_tagged(_stored(upright, o), o, name, **options) for o in UPRIGHT}
  coco = _coco(tmp_path, files, size)
  data.prepare(coco)
  seen = 0
  for split in ("train", "val"):
    truth = coco_ground_truth(coco, split)
    assert all((i["height"], i["width"]) == size for i in truth["images"])
    for _, image_HWC, annotations in images_with_objects(coco, split):
      assert image_HWC.shape == upright.shape
      np.testing.assert_allclose(image_HWC, upright, atol=60)
      _check_objects(image_HWC, [a["bbox"] for a in annotations])
      seen += 1
    assert (Reader(coco, split).sizes_N2 == size).all()
  assert seen == 8


def test_objects_in_batches_of_upright_images(tmp_path):
  size = HEIGHT, WIDTH
  upright = _with_object()
  files = {f"{o}.x": encode_tagged(_stored(upright, o), o, "PNG") for o in UPRIGHT}
  coco = _coco(tmp_path, files, size)
  data.prepare(coco)
  coco.short_edge, coco.buckets = size[0], (size,)
  with eval_batches(coco, "train", batch_size=1) as batches:
    for batch in batches:
      x0, y0, x1, y1 = batch["gt_boxes_BG4"][0, 0]
      _check_objects(batch["image_BHWC"][0], [(x0, y0, x1 - x0, y1 - y0)])
  with train_batches(coco, batch_size=4, seed=0) as batches:
    batch = next(batches)
    for image_HWC, boxes_G4 in zip(batch["image_BHWC"], batch["gt_boxes_BG4"], strict=True):
      x0, y0, x1, y1 = boxes_G4[0]
      _check_objects(image_HWC, [(x0, y0, x1 - x0, y1 - y0)])


def test_objects_of_stored_pixels(tmp_path):
  stored = _with_object()
  files = {f"{o}.x": encode_tagged(stored, o, n) for o in UPRIGHT for n in ("PNG",)}
  files["tiff.x"] = encode_tagged(stored, 6, "TIFF")
  coco = _coco(tmp_path, files, (HEIGHT, WIDTH), exif="ignore")
  data.prepare(coco)
  for split, count in (("train", 8), ("val", 1)):
    found = list(images_with_objects(coco, split))
    assert len(found) == count
    for _, image_HWC, annotations in found:
      np.testing.assert_array_equal(image_HWC, stored)
      _check_objects(image_HWC, [a["bbox"] for a in annotations])


@pytest.mark.parametrize(("exif", "other"), [("apply", "ignore"), ("ignore", "apply")])
def test_sizes_that_fit_the_other_value_only(exif, other, tmp_path, caplog):
  # the annotated size is that of the stored pixels, or that of the upright ones
  size = (HEIGHT, WIDTH) if exif == "apply" else (WIDTH, HEIGHT)
  plain = np.zeros((*size, 3), np.uint8)
  files = {"a.x": encode_tagged(_with_object(), 6, "PNG")}
  files |= {f"{i}.x": encode_tagged(plain, 1, "PNG") for i in range(11)}
  coco = _coco(tmp_path, files, size, exif=exif)
  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  message = str(raised.value)
  assert "image id 0: fields height and width fit data.exif=" in message
  kind = "stored" if exif == "apply" else "upright"
  assert "images/a.x has EXIF orientation 6; if all annotations are of the " + kind in message
  assert f"set data.exif='{other}'" in message and "\n" not in message
  coco.skip_bad = True
  data.prepare(coco)
  assert (
    f"prepare val: 1 skipped: image: fields height and width fit data.exif='{other}' only"
    in caplog.text
  )


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_what_the_sizes_do_not_show_is_logged_once(exif, tmp_path, caplog):
  files = {f"{o}.x": encode_tagged(_with_object(), o, "PNG") for o in (1, 2, 3, 4, 3)}
  files |= {"5.x": encode_tagged(_with_object(), 3, "PNG")}
  coco = _coco(tmp_path, files, (HEIGHT, WIDTH), exif=exif)
  data.prepare(coco)
  lines = [line for line in caplog.messages if "EXIF" in line]
  assert len(lines) == 1
  kind = "upright" if exif == "apply" else "stored"
  assert "has EXIF orientation 2, and the sizes do not show" in lines[0]
  assert f"the {kind} pixels are assumed for all such images (data.exif={exif!r};" in lines[0]


def test_images_without_an_orientation_are_not_logged(tmp_path, caplog):
  files = {f"{i}.x": encode_tagged(_with_object(), 1, "PNG") for i in range(3)}
  data.prepare(_coco(tmp_path, files, (HEIGHT, WIDTH)))
  assert "EXIF" not in caplog.text


def test_records_are_read_as_they_were_prepared(tmp_path):
  files = {f"{i}.x": encode_tagged(_with_object(), 3, "PNG") for i in range(3)}
  coco = _coco(tmp_path, files, (HEIGHT, WIDTH))
  data.prepare(coco)
  coco.exif = "ignore"
  for call in (lambda: data.prepare(coco), lambda: data.info(coco), lambda: Reader(coco, "val")):
    with pytest.raises(UserError, match=r"data\.exif was .*apply.*, now .*ignore"):
      call()
  coco.exif = "upright"
  with pytest.raises(UserError, match=r"data\.exif='upright' must be one of apply, ignore"):
    data.info(coco)


def test_records_of_versions_that_ignored_exif_are_refused(tmp_path):
  files = {f"{i}.x": encode_tagged(_with_object(), 6, "PNG") for i in range(3)}
  coco = _coco(tmp_path, files, (HEIGHT, WIDTH), exif="ignore")
  data.prepare(coco)
  (metadata,) = (tmp_path / "data").rglob("metadata.json")
  content = json.loads(metadata.read_text())
  del content["inputs"]
  metadata.write_text(json.dumps(content))
  coco.exif = "apply"
  with pytest.raises(UserError, match=r"size is \(64, 40\), not \(40, 64\).*--mode=prepare"):
    list(images_with_objects(coco, "val"))
  coco.exif = "ignore"
  assert len(list(images_with_objects(coco, "val"))) == 1


def _folder(root: pathlib.Path, pairs: dict[str, tuple[bytes, bytes]], **fields):
  """Writes a data set of image and label files, the same in both splits; returns its config."""
  for split in ("train", "val"):
    for kind in ("images", "labels"):
      (root / kind / split).mkdir(parents=True)
    for name, (image, label) in pairs.items():
      (root / "images" / split / name).write_bytes(image)
      (root / "labels" / split / f"{pathlib.Path(name).stem}.png").write_bytes(label)
  return label_config(
    "image_folder", root / "data", source=str(root), builder={"num_classes": 2}, **fields
  )


def _label(pixels):
  return (pixels[..., 0] // 255).astype(np.uint8)


@pytest.mark.parametrize("labels", ["upright", "tagged"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (HEIGHT, HEIGHT)])
def test_label_maps_of_upright_images(size, labels, tmp_path, caplog):
  upright = _with_object(*size)
  pairs = {}
  for o in UPRIGHT:
    stored = _stored(upright, o)
    label = (upright, 1) if labels == "upright" else (stored, o)
    pairs[f"{o}.png"] = (
      encode_tagged(stored, o, "PNG"),
      encode_tagged(_label(label[0]), label[1], "PNG"),
    )
  folder = _folder(tmp_path, pairs)
  data.prepare(folder)
  found = list(images_with_labels(folder, "train"))
  assert len(found) == 8
  for _, image_HWC, label_HW in found:
    np.testing.assert_array_equal(image_HWC, upright)
    np.testing.assert_array_equal(label_HW, _label(upright))
  # equal orientations of image and labels leave no doubt
  assert caplog.text.count("the sizes do not show") == (labels == "upright")


def test_label_maps_of_stored_pixels(tmp_path, caplog):
  stored = _with_object()
  pairs = {
    f"{o}.png": (encode_tagged(stored, o, "PNG"), encode_tagged(_label(stored), 1, "PNG"))
    for o in UPRIGHT
  }
  folder = _folder(tmp_path, pairs, exif="ignore")
  data.prepare(folder)
  for _, image_HWC, label_HW in images_with_labels(folder, "val"):
    np.testing.assert_array_equal(image_HWC, stored)
    np.testing.assert_array_equal(label_HW, _label(stored))
  assert caplog.text.count("the sizes do not show") == 1


@pytest.mark.parametrize("tagged", ["images", "labels"])
@pytest.mark.parametrize(("exif", "other"), [("apply", "ignore"), ("ignore", "apply")])
def test_label_maps_that_fit_the_other_value_only(exif, other, tagged, tmp_path):
  image, label = _with_object(), _label(_with_object())
  if exif == "ignore":
    image = _stored(image, 6)
  if tagged == "images":
    pair = encode_tagged(image, 6, "PNG"), encode_tagged(label, 1, "PNG")
  else:
    untagged = _with_object()
    pair = encode_tagged(untagged, 1, "PNG"), encode_tagged(_label(image), 6, "PNG")
  folder = _folder(tmp_path, {"a.png": pair}, exif=exif)
  with pytest.raises(UserError) as raised:
    data.prepare(folder)
  message = str(raised.value)
  assert f"labels have the size of their image with data.exif='{other}' only" in message
  assert f"{tagged}/train/a.png has EXIF orientation 6" in message and "\n" not in message
  folder.exif = other
  data.prepare(folder)
  ((_, image_HWC, label_HW),) = images_with_labels(folder, "train")
  np.testing.assert_array_equal(_label(image_HWC), label_HW)
