"""Crops, copy-paste and colours: image, boxes and masks move together, as a pure function of the position."""

import json

import numpy as np
import PIL.Image
import pytest
import scipy
import tensorflow as tf
from pycocotools import mask as coco_mask

from fpt_jax import data
from fpt_jax.data import transforms
from fpt_jax.data.crops import Crop
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.tasks.detection import objects
from fpt_jax.tasks.detection.batches import train_batches
from tests.data_sets import config

COLORS = np.array(
  [[0, 0, 0], [250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20]]
)  # by label
SIZES = ((60, 90), (96, 64), (50, 50), (40, 120), (64, 64))


def shape(kind: int, height: int, width: int) -> np.ndarray:
  """The pixels of a rectangle, a triangle or an ellipse in one of the quarters of an image."""
  rows, columns = np.mgrid[:height, :width] + 0.5
  y, x = rows - height * (0.25 + 0.5 * (kind // 2)), columns - width * (0.25 + 0.5 * (kind % 2))
  y, x = y / (0.2 * height), x / (0.2 * width)
  return [
    (np.abs(y) < 1) & (np.abs(x) < 1),
    (y > -1) & (y < 1) & (np.abs(x) < (y + 1) / 2),
    y**2 + x**2 < 1,
    (np.abs(y) < 1) & (np.abs(x) < 1) & ((y > 0) | (x > 0)),
  ][kind]


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
  """Images whose objects have the colour of their class, all others grey; the last has none."""
  root = tmp_path_factory.mktemp("painted")
  content = {
    "images": [],
    "annotations": [],
    "categories": [{"id": k, "name": f"class {k}"} for k in range(1, 5)],
  }
  (root / "train2017").mkdir()
  (root / "annotations").mkdir()
  for image_id, (height, width) in enumerate(SIZES, start=1):
    pixels = np.full((height, width, 3), 128, np.uint8)
    name = f"{image_id}.png"
    content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    for kind in range(4 if image_id < len(SIZES) else 0):
      mask = shape(kind, height, width)
      pixels[mask] = COLORS[kind + 1]
      rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
      x, y, w, h = coco_mask.toBbox(rle).tolist()
      segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
      if kind == 0:
        segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
      content["annotations"].append(
        {
          "id": 10 * image_id + kind,
          "image_id": image_id,
          "category_id": kind + 1,
          "iscrowd": 0,
          "bbox": [x, y, w, h],
          "area": float(mask.sum()),
          "segmentation": segmentation,
        }
      )
    PIL.Image.fromarray(pixels).save(root / "train2017" / name)
  for split in ("train", "val"):
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
  (root / "val2017").symlink_to(root / "train2017")
  settings = config("coco", root / "data", source=str(root), max_instances=9)
  settings.update(short_edge=48, long_edge=96, buckets=((64, 96), (96, 64)))
  data.prepare(settings)
  return settings


def changed(settings, **fields):
  settings = settings.copy_and_resolve_references()
  settings.update(fields)
  return settings


def read(settings, count, **options):
  with train_batches(settings, batch_size=4, seed=3, **options) as batches:
    return [next(batches) for _ in range(count)]


CHAINS = {
  "crops": dict(crop=(64, 80), scale=(0.3, 2.0)),
  "paste": dict(copy_paste=1.0),
  "crops and paste": dict(crop=(64, 64), scale=(0.3, 2.0), copy_paste=0.8),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_painted_objects_are_under_their_boxes_and_masks(painted, chain):
  """An object's colour is where its mask is, up to a pixel, and nowhere else."""
  settings = changed(painted, **CHAINS[chain])
  seen = cut = 0
  for batch in read(settings, 12):
    for i in range(4):
      image_HWC, (height, width) = batch["image_BHWC"][i], batch["size_B2"][i]
      assert (image_HWC[height:] == 0).all() and (image_HWC[:, width:] == 0).all()
      valid_G = batch["gt_valid_BG"][i]
      boxes_G4, labels_G = batch["gt_boxes_BG4"][i][valid_G], batch["gt_labels_BG"][i][valid_G]
      assert (boxes_G4 >= 0).all() and (boxes_G4[:, 2:] <= [width, height]).all()
      assert (boxes_G4[:, 2:] > boxes_G4[:, :2]).all()
      bitmaps_Gmm = batch["gt_masks_BGmm"][i][valid_G].astype(np.float32)
      masks_GHW = masks.paste(bitmaps_Gmm, boxes_G4, *image_HWC.shape[:2], aligned=True) >= 0.5
      for label in range(1, 5):
        is_color_HW = np.abs(image_HWC - COLORS[label]).max(-1) < 4
        mine_GHW = masks_GHW[labels_G == label]
        around_HW = scipy.ndimage.binary_dilation(mine_GHW.any(0), np.ones((3, 3)), iterations=2)
        assert not (is_color_HW & ~around_HW).any()
        for mask_HW, box in zip(mine_GHW, boxes_G4[labels_G == label], strict=True):
          inner_HW = scipy.ndimage.binary_erosion(mask_HW, np.ones((3, 3)), iterations=2)
          assert is_color_HW[inner_HW].all()
          seen += inner_HW.any()
          rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
          if inner_HW.any() and label != 2:  # the tip of a triangle is narrower than a pixel
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, tight, atol=1.5)
          cut += (box == 0).any() or box[2] == width or box[3] == height
  assert seen > 40 and ("crops" not in chain or cut > 10)


def test_most_images_have_objects_of_two_images(painted):
  plain, pasted = (read(changed(painted, copy_paste=p, flip=False), 8) for p in (0.0, 1.0))
  more = sum((p["gt_valid_BG"].sum(1) > 4).sum() for p in pasted)
  assert 8 < more < 32 and all((p["gt_valid_BG"].sum(1) <= 4).all() for p in plain)
  half = read(changed(painted, copy_paste=0.5, flip=False), 8)
  without = [
    (h["image_BHWC"][i] == p["image_BHWC"][i]).all()
    for h, p in zip(half, plain, strict=True)
    for i in range(4)
  ]
  assert 8 < sum(without) < 28


@pytest.mark.parametrize(
  "fields",
  [
    dict(scale=(1.0, 1.0), copy_paste=0.0),
    dict(color_jitter=(0.0, 0.0, 0.0, 0.0)),
    dict(filter_empty=False),
  ],
)
def test_settings_that_change_nothing(painted, fields):
  for one, other in zip(read(painted, 3), read(changed(painted, **fields), 3), strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_a_crop_of_the_image_itself_changes_nothing_but_rounding(painted):
  """With the factor 1, the window is the whole image."""
  settings = changed(
    painted, train_split="train[:1]", short_edge=60, long_edge=90, buckets=((60, 90),)
  )
  plain, crop = (read(s, 2) for s in (settings, changed(settings, crop=(60, 90))))
  for one, other in zip(plain, crop, strict=True):
    for i in range(4):  # each draws its own mirror images
      boxes_G4 = one["gt_boxes_BG4"][i]
      candidates = [boxes_G4, np.where(one["gt_valid_BG"][i][:, None], boxes_G4, 0)]
      mirrored_G4 = np.stack(
        [90 - boxes_G4[:, 2], boxes_G4[:, 1], 90 - boxes_G4[:, 0], boxes_G4[:, 3]], -1
      )
      candidates.append(np.where(one["gt_valid_BG"][i][:, None], mirrored_G4, 0))
      assert any(np.array_equal(c, other["gt_boxes_BG4"][i]) for c in candidates)
    assert (one["size_B2"] == other["size_B2"]).all()
    np.testing.assert_allclose(
      one["image_BHWC"].mean((1, 2)), other["image_BHWC"].mean((1, 2)), atol=0.1
    )


def test_every_position_has_its_own_and_hosts_agree(painted):
  settings = changed(
    painted, crop=(64, 64), scale=(0.3, 2.0), copy_paste=0.8, color_jitter=(0.4, 0.4, 0.4, 0.1)
  )
  run = read(settings, 6)
  for one, other in zip(run[4:], read(settings, 2, start_step=4), strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  shares = [read(settings, 2, process_index=i, process_count=2) for i in range(2)]
  for step in range(2):
    for name in run[step]:
      joined = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(joined, run[step][name])


@pytest.mark.parametrize("chain", [*CHAINS, "whole"])
def test_images_as_bytes_are_rounded(painted, chain):
  settings = changed(painted, **CHAINS.get(chain, {}), color_jitter=(0.4, 0.4, 0.4, 0.1))
  for exact, stored in zip(
    read(settings, 2), read(changed(settings, image_dtype="uint8"), 2), strict=True
  ):
    assert stored["image_BHWC"].dtype == np.uint8
    rounded_BHWC = np.floor(exact.pop("image_BHWC") + 0.5)
    np.testing.assert_array_equal(stored.pop("image_BHWC"), rounded_BHWC)
    for name in exact:
      np.testing.assert_array_equal(stored[name], exact[name])


def test_images_without_objects_are_left_out(painted):
  with_empty, without = (
    np.concatenate([b["image_id_B"] for b in read(changed(painted, filter_empty=f), 6)])
    for f in (False, True)
  )
  assert set(with_empty) == {1, 2, 3, 4, 5} and set(without) == {1, 2, 3, 4}
  with pytest.raises(UserError, match="no image"):
    read(changed(painted, filter_empty=True, train_split="train[4:]"), 1)


def test_what_is_visible_of_a_cut_object():
  mask_hw = np.zeros((10, 10), bool)
  mask_hw[2:6, 3:9] = True
  box, bitmap_mm = objects.visible_part(mask_hw, np.array([3.0, 1.5, 8.5, 7.0]))
  np.testing.assert_array_equal(box, [3, 2, 8.5, 6])
  assert bitmap_mm.all()
  assert objects.visible_part(mask_hw & False, np.array([3, 2, 9, 6])) is None
  assert objects.visible_part(mask_hw, np.array([0.0, 0, 3, 2])) is None


def test_a_mirrored_polygon_in_a_window(painted):
  """Against the mask of the mirrored and enlarged image, pixel by pixel."""
  reader = data.Reader(painted, "train")
  record = reader.read(0)  # 60 x 90
  reader.close()
  crop = Crop((120, 180), (20, 95), (64, 64), True)
  found = objects.mask_in(record, 0, crop)
  large = shape(0, 60, 90)[:, ::-1].repeat(2, 0).repeat(2, 1)
  np.testing.assert_array_equal(found, large[20:84, 95:159])


def test_colors(rng):
  """Against the definitions of torchvision's functions on float images, in float64."""
  image = rng.integers(0, 256, (5, 6, 3)).astype(np.float64)
  gray = image @ np.array([0.2989, 0.587, 0.114])
  for i, expected in enumerate(
    (1.3 * image, 1.3 * image - 0.3 * gray.mean(), 1.3 * image - 0.3 * gray[..., None])
  ):
    ranges = [0.0] * 4
    ranges[i] = 0.5
    found = transforms.jitter_colors(
      tf.constant(image.astype(np.uint8)), tf.constant([1.3] * 4), ranges
    )
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.02)
  red = np.full((1, 1, 3), [200, 0, 0], np.uint8)
  green = transforms.jitter_colors(tf.constant(red), tf.constant([1, 1, 1, 1 / 3]), (0, 0, 0, 0.5))
  np.testing.assert_allclose(green[0, 0], [0, 200, 0], atol=0.01)
  colors = np.array([transforms.draw_colors(0, i, (0.4, 0.2, 0, 0.1)) for i in range(2000)])
  np.testing.assert_allclose(colors.min(0), [0.6, 0.8, 1, -0.1], atol=2e-3)
  np.testing.assert_allclose(colors.max(0), [1.4, 1.2, 1, 0.1], atol=2e-3)
  assert (colors[7] == transforms.draw_colors(0, 7, (0.4, 0.2, 0, 0.1))).all()
