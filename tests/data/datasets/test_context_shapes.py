"""Context Shapes are deterministic and well annotated, and their questions need the context they name.

Shapes: H W C image, F features, N crops, D patches of a crop.
"""

import collections

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fpt_jax import data
from fpt_jax.data.datasets import context_shapes
from fpt_jax.data.datasets.context_shapes import (
  CHECKED,
  CIRCLE,
  OF_CIRCLE,
  OF_SQUARE,
  SQUARE,
  STRIPED,
  draw_example,
)
from fpt_jax.data.records import instances
from fpt_jax.data.records.images import decode_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from tests.data_sets import config

TRAIN, TEST = 300, 150
CROP = 44  # 0.34 of the image's side


@pytest.fixture(scope="module")
def examples():
  return [draw_example(i, 128, 0) for i in range(1, TRAIN + TEST + 1)]


@pytest.fixture(scope="module")
def images(examples):
  return [decode_image(example["image"]).astype(np.float32) for example in examples]


def objects(example, *labels, crowds=False):
  """Returns the objects of these labels, with their annotations decoded."""
  return [
    o | {"annotation": instances.decode_annotation(o["annotation"])}
    for o in example["objects"]
    if o["label"] in (labels or range(1, 7)) and (crowds or not o["is_crowd"])
  ]


def beacon_of(example):
  (beacon,) = objects(example, CIRCLE, SQUARE)
  return beacon


def mask_of(o):
  return coco_mask.decode(o["annotation"]["segmentation"]).astype(bool)


def test_the_same_seed_gives_the_same_image(examples):
  again = draw_example(3, 128, 0)
  assert again["image"] == examples[2]["image"]
  assert again["objects"][0]["annotation"] == examples[2]["objects"][0]["annotation"]
  assert draw_example(3, 128, 1)["image"] != again["image"]
  assert draw_example(3, 128, 0, "shape")["image"] != draw_example(4, 128, 0, "shape")["image"]


def test_categories_and_questions(examples):
  for example in examples:
    beacon = beacon_of(example)
    large = np.ptp(beacon["bbox"][::2]) > 0.25 * 128
    satellites = objects(example, OF_CIRCLE, OF_SQUARE, crowds=True)
    assert {o["label"] for o in satellites} == {OF_CIRCLE + beacon["label"] - CIRCLE}
    for o in objects(example, crowds=True):
      if o["label"] in (CIRCLE, SQUARE) or o["is_crowd"]:
        expected = None
      elif o["label"] in (STRIPED, CHECKED):
        expected = "fine"
      else:
        expected = "coarse" if large else "same_level"
      assert o["annotation"].get("question") == expected
    assert 4 <= sum(not o["is_crowd"] for o in satellites) <= 6
    assert len(objects(example, STRIPED, CHECKED)) <= 2


def test_shares(examples):
  count = len(examples)
  beacons = [beacon_of(example) for example in examples]
  large = np.array([np.ptp(o["bbox"][::2]) > 0.25 * 128 for o in beacons])
  circle = np.array([o["label"] == CIRCLE for o in beacons])
  crowds = [sum(o["is_crowd"] for o in e["objects"]) for e in examples]
  with_triangle = [bool(objects(e, STRIPED, CHECKED)) for e in examples]
  sigma = np.sqrt(0.25 / count)
  assert abs(large.mean() - 0.5) < 3 * sigma and abs(circle.mean() - 0.5) < 3 * sigma
  assert abs((large == circle).mean() - 0.5) < 3 * sigma
  assert abs(np.mean(crowds) - 0.15) < 0.045 and max(crowds) == 1
  assert np.mean(with_triangle) > 0.5


def test_layouts_have_sizes_and_gaps(examples):
  for example in examples:
    bx0, by0, bx1, by1 = beacon_of(example)["bbox"]
    for o in objects(example, OF_CIRCLE, OF_SQUARE, crowds=True):
      x0, y0, x1, y1 = o["bbox"]
      longest = max(x1 - x0, y1 - y0)
      assert longest <= 27 if o["is_crowd"] else 9 <= longest <= 18
      # the visible pixels of a shape reach its box up to a pixel
      assert max(bx0 - x1, x0 - bx1, by0 - y1, y0 - by1) > 0.25 * 128 - 2


@pytest.mark.parametrize("beacons", context_shapes.BEACONS)
@pytest.mark.parametrize("image_id", [1, 2, 6, 10, 34])
def test_the_kind_changes_nothing_but_the_beacon(beacons, image_id):
  circle, square = (draw_example(image_id, 128, 0, beacons, kind) for kind in (CIRCLE, SQUARE))
  x0, y0, x1, y1 = beacon_of(square)["bbox"].astype(int)
  # JPEG compresses 16 x 16 pixels together, and enlarging its colours reads one pixel more
  low_x, low_y = (max(v // 16 * 16 - 2, 0) for v in (x0, y0))
  high_x, high_y = (-(-v // 16) * 16 + 2 for v in (x1, y1))
  one, other = (decode_image(e["image"]).astype(int) for e in (circle, square))
  assert np.abs(one - other)[low_y:high_y, low_x:high_x].max() > 50
  one[low_y:high_y, low_x:high_x] = other[low_y:high_y, low_x:high_x] = 0
  np.testing.assert_array_equal(one, other)
  changed = {CIRCLE: SQUARE, OF_CIRCLE: OF_SQUARE}
  for a, b in zip(circle["objects"], square["objects"], strict=True):
    assert changed.get(a["label"], a["label"]) == b["label"]
    if a["label"] == OF_CIRCLE:
      assert a["annotation"] == b["annotation"]


def test_masks_are_the_visible_pixels(examples):
  for example in examples[:100]:
    union_HW = np.zeros((128, 128), int)
    for o in objects(example, crowds=True):
      mask_HW = mask_of(o)
      union_HW += mask_HW
      rows, columns = np.nonzero(mask_HW)
      box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
      np.testing.assert_array_equal(o["bbox"], box)
      assert o["annotation"]["area"] == o["area"] == mask_HW.sum() > 50
      bitmap_mm = instances.unpack_bitmaps([o["bitmap"]])[0]
      assert bitmap_mm.any()
    assert union_HW.max() == 1


def test_masts_are_thin(examples):
  widths = []
  for example in examples:
    for o in objects(example, STRIPED, CHECKED):
      top = int(o["bbox"][1])
      widths += mask_of(o)[top + 1 : top + 5].sum(axis=1).tolist()
  assert np.median(widths) in (2, 3) and max(widths) <= 4


# --- what a classifier can know


def crop_features(image_HWC, box):
  """Returns means of 4 x 4 pixels and histograms of colours of a crop around a box, float [F]."""
  x, y = ((box[:2] + box[2:]) / 2).astype(int)
  half = CROP // 2
  padded_HWC = np.pad(image_HWC, ((half, half), (half, half), (0, 0)), mode="reflect")
  crop_HWC = padded_HWC[y : y + CROP, x : x + CROP]
  means = crop_HWC.reshape(CROP // 4, 4, CROP // 4, 4, 3).mean((1, 3))
  bins = [np.histogram(crop_HWC[..., c], 16, (0, 256))[0] for c in range(3)]
  return np.concatenate([means.ravel(), *bins, crop_HWC.mean((0, 1)), crop_HWC.std((0, 1))])


def accuracy(features_of, examples, images):
  """Trains ridge regression on crops of the first images; returns its accuracy on the others.

  Crops of an image vote for one answer: they have the same background, so that their errors would not
  be independent.
  """
  crops = [features_of(*pair) for pair in zip(examples, images, strict=True)]
  kinds = np.array([1.0 if beacon_of(e)["label"] == CIRCLE else -1.0 for e in examples])
  train_NF = np.concatenate(crops[:TRAIN])
  target_N = np.repeat(kinds[:TRAIN], [len(c) for c in crops[:TRAIN]])
  mean_F, std_F = train_NF.mean(0), train_NF.std(0) + 1e-3
  x_NF = (train_NF - mean_F) / std_F
  weights_F = np.linalg.solve(x_NF.T @ x_NF + 300 * np.eye(x_NF.shape[1]), x_NF.T @ target_N)
  votes = [(((c - mean_F) / std_F) @ weights_F).mean() for c in crops[TRAIN:]]
  return np.mean(np.sign(votes) == kinds[TRAIN:])


def test_surroundings_of_satellites_tell_nothing(examples, images):
  def around_satellites(example, image_HWC):
    satellites = objects(example, OF_CIRCLE, OF_SQUARE)
    return np.stack([crop_features(image_HWC, o["bbox"]) for o in satellites])

  def around_changed_satellites(example, image_HWC):
    """Crops of images in which satellites of circles are a little brighter."""
    brighter_HW = sum(12 * mask_of(o) for o in objects(example, OF_CIRCLE, OF_SQUARE))
    if beacon_of(example)["label"] == CIRCLE:
      image_HWC = image_HWC + brighter_HW[..., None]
    return around_satellites(example, image_HWC)

  def around_beacon(example, image_HWC):
    return crop_features(image_HWC, beacon_of(example)["bbox"])[None]

  chance = 3 * np.sqrt(0.25 / TEST)
  assert abs(accuracy(around_satellites, examples, images) - 0.5) < chance
  assert accuracy(around_changed_satellites, examples, images) > 0.5 + chance
  assert accuracy(around_beacon, examples, images) > 0.95


def test_one_patch_of_a_large_beacon_misleads(examples, images, rng):
  patches, wholes = [], []
  for example, image_HWC in zip(examples, images, strict=True):
    beacon = beacon_of(example)
    if np.ptp(beacon["bbox"][::2]) < 0.25 * 128:
      continue
    sign = 1 if beacon["label"] == CIRCLE else -1
    redness_HW = sign * (image_HWC[..., 0] - image_HWC[..., 2])
    mask_HW = mask_of(beacon)
    wholes.append(redness_HW[mask_HW].mean() > 0)
    covered_HW = np.lib.stride_tricks.sliding_window_view(mask_HW, (4, 4)).all((2, 3))
    y, x = rng.choice(np.argwhere(covered_HW))
    patches.append(redness_HW[y : y + 4, x : x + 4].mean() > 0)
  assert np.mean(wholes) == 1
  assert 0.7 < np.mean(patches) < 0.88


def test_only_the_outline_tells_beacons_without_their_color():
  right = []
  for i in range(1, 121):
    example = draw_example(i, 64, 0, "shape")
    beacon, image_HWC = beacon_of(example), decode_image(example["image"]).astype(np.float32)
    redness = (image_HWC[..., 0] - image_HWC[..., 2])[mask_of(beacon)].mean()
    right.append((redness > 0) == (beacon["label"] == CIRCLE))
    filled = beacon["area"] / np.prod(beacon["bbox"][2:] - beacon["bbox"][:2])
    assert filled > 0.86 or beacon["label"] == CIRCLE
  assert abs(np.mean(right) - 0.5) < 3 * np.sqrt(0.25 / 120)


def test_only_the_texture_tells_triangles(examples, images):
  colors, isotropy, labels = [], [], []
  for example, image_HWC in zip(examples, images, strict=True):
    for o in objects(example, STRIPED, CHECKED):
      mask_HW = mask_of(o)
      colors.append(image_HWC[mask_HW].mean(0))
      gray_HW = image_HWC.mean(-1)
      dy_HW, dx_HW = np.gradient(gray_HW)
      d_N2 = np.stack([dx_HW[mask_HW], dy_HW[mask_HW]], axis=1)
      small, large = np.linalg.eigvalsh(d_N2.T @ d_N2)
      isotropy.append(small / large)
      labels.append(o["label"])
  checked_N = np.array(labels) == CHECKED
  assert 0.4 < checked_N.mean() < 0.6
  assert np.mean((np.array(isotropy) > 0.55) == checked_N) > 0.98
  half = len(labels) // 2
  x_NF = np.concatenate([np.array(colors), np.ones((len(colors), 1))], axis=1)
  target_N = np.where(checked_N, 1.0, -1.0)
  weights_F = np.linalg.lstsq(x_NF[:half], target_N[:half])[0]
  guessed_N = np.sign(x_NF[half:] @ weights_F)
  chance = 3 * np.sqrt(0.25 / (len(labels) - half))
  assert abs(np.mean(guessed_N == target_N[half:]) - 0.5) < chance


# --- the prepared data


@pytest.mark.parametrize("size", [64, 160])
def test_other_sizes(size):
  for i in range(1, 21):
    for o in objects(draw_example(i, size, 0), crowds=True):
      x0, y0, x1, y1 = o["bbox"]
      assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size and o["area"] > 0.05 * (x1 - x0)


def test_prepared_splits(shapes):
  info = data.info(shapes)
  assert info.num_images == {"train": 23, "val": 5}
  assert info.category_names[4] == "satellite of circle" and info.category_ids == tuple(range(1, 7))
  truth = coco_ground_truth(shapes, "train+val")
  assert [image["id"] for image in truth["images"]] == list(range(1, 29))
  assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])
  asked = collections.Counter(a.get("question") for a in truth["annotations"])
  assert set(asked) == {None, "same_level", "coarse", "fine"}


@pytest.mark.parametrize("changed", [{"train_size": 24}, {"beacons": "shape"}])
def test_each_variant_has_a_folder(shapes, changed):
  other = shapes.copy_and_resolve_references()
  with other.builder.unlocked():
    other.builder.update(changed)
  assert data.is_prepared(shapes) and not data.is_prepared(other)


@pytest.mark.parametrize(
  ("builder", "message"),
  [
    ({"image_size": 32}, "image_size=32"),
    ({"val_size": 0}, "val_size=0"),
    ({"beacons": "colour"}, r"beacons='colour' must be one of \('color', 'shape'\)"),
  ],
)
def test_bad_options_raise(builder, message, tmp_path):
  with pytest.raises(UserError, match=message):
    data.prepare(config("context_shapes", tmp_path, builder=builder))
