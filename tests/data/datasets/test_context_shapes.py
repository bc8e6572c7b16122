"""Context Shapes are deterministic and well annotated; only beacons determine the satellites."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fpt_jax import data
from fpt_jax.data.datasets import context_shapes
from fpt_jax.data.records import instances
from fpt_jax.data.records.images import decode_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.batches import coco_ground_truth
from tests.data_sets import config

CIRCLE, SQUARE, TRIANGLE, OF_CIRCLE, OF_SQUARE = range(1, 6)


@pytest.fixture(scope="module")
def examples():
  return [context_shapes.draw_example(i, 128, 0) for i in range(1, 61)]


def test_the_same_seed_gives_the_same_image(examples):
  again = context_shapes.draw_example(3, 128, 0)
  assert again["image"] == examples[2]["image"]
  assert again["objects"][0]["annotation"] == examples[2]["objects"][0]["annotation"]
  assert context_shapes.draw_example(3, 128, 1)["image"] != again["image"]


def test_only_the_beacons_determine_the_satellites(examples):
  for example in examples:
    labels = {o["label"] for o in example["objects"]}
    assert labels - {TRIANGLE} in ({CIRCLE, OF_CIRCLE}, {SQUARE, OF_SQUARE})
  labels = [o["label"] for e in examples for o in e["objects"]]
  counts = np.bincount(labels, minlength=6)[1:]
  assert counts[:3].sum() > counts[3:].sum()  # most instances need no context
  assert counts.min() > 5


def test_satellites_look_the_same_and_are_far_from_beacons(examples):
  greys = {OF_CIRCLE: [], OF_SQUARE: []}
  for example in examples:
    image_HWC = decode_image(example["image"])
    beacons = [o["bbox"] for o in example["objects"] if o["label"] in (CIRCLE, SQUARE)]
    for satellite in example["objects"]:
      if satellite["label"] not in greys:
        continue
      x0, y0, x1, y1 = satellite["bbox"]
      assert min(x1 - x0, y1 - y0) >= 9 and max(x1 - x0, y1 - y0) <= 18
      for bx0, by0, bx1, by1 in beacons:
        assert max(bx0 - x1, x0 - bx1, by0 - y1, y0 - by1) > 0.23 * 128
      x, y = int((x0 + x1) / 2), int((y0 + y1) / 2)
      greys[satellite["label"]].append(image_HWC[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1)))
  one, other = (np.array(values) for values in greys.values())
  assert np.ptp(one.mean(0)) < 3  # grey
  assert abs(one.mean() - other.mean()) < 10
  assert max(one.max(), other.max()) < 225 and min(one.min(), other.min()) > 160


def test_masks_are_the_visible_pixels(examples):
  for example in examples:
    union_HW = np.zeros((128, 128), int)
    for o in example["objects"]:
      annotation = instances.decode_annotation(o["annotation"])
      mask_HW = coco_mask.decode(annotation["segmentation"])
      union_HW += mask_HW
      rows, columns = np.nonzero(mask_HW)
      box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
      np.testing.assert_array_equal(o["bbox"], box)
      assert annotation["area"] == o["area"] == mask_HW.sum() > 50
    assert union_HW.max() == 1


def test_prepared_splits(shapes):
  info = data.info(shapes)
  assert info.num_images == {"train": 23, "val": 5}
  assert info.category_names[3] == "satellite of circle" and info.category_ids == (1, 2, 3, 4, 5)
  truth = coco_ground_truth(shapes, "train+val")
  assert [image["id"] for image in truth["images"]] == list(range(1, 29))
  assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])


def test_each_size_has_a_folder(shapes):
  other = shapes.copy_and_resolve_references()
  other.builder.train_size = 24
  assert data.is_prepared(shapes) and not data.is_prepared(other)


def test_too_small_sizes_raise(tmp_path):
  tiny = config("context_shapes", tmp_path, builder={"image_size": 32})
  with pytest.raises(UserError, match="image_size=32"):
    data.prepare(tiny)
