"""Pictures of detections: positions and colours of what is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from fpt_jax.configs import coco_mask
from fpt_jax.ops import masks
from fpt_jax.tasks import pictures
from fpt_jax.tasks.detection.draw import draw_detections, draw_prediction


@pytest.fixture
def scene():
  """Returns a grey image with a large object and a small one inside it."""
  image = np.full((420, 560, 3), 128, np.uint8)
  large, small = np.zeros((2, 420, 560), bool)
  large[100:380, 60:460] = True
  small[300:312, 200:220] = True
  boxes = np.array([[200.0, 300, 220, 312], [60, 100, 460, 380]])
  return image, boxes, ["ant", "elephant"], np.array([0.75, 0.5]), [small, large]


def changed(image, drawn):
  return (np.asarray(drawn) != image).any(axis=-1)


def test_masks_are_tinted_and_small_ones_are_on_top(scene):
  image, boxes, names, scores, bitmaps = scene
  drawn = draw_detections(image, boxes, names, scores, bitmaps)
  assert drawn.shape == image.shape and drawn.dtype == np.uint8
  assert (image == 128).all()
  for (y, x), name in [((240, 400), "elephant"), ((306, 210), "ant")]:
    tint = drawn[y, x].astype(float) - 128
    color = np.float64(pictures.category_color(name)) - 128
    assert tint @ color / np.linalg.norm(tint) / np.linalg.norm(color) > 0.99
    assert 0.2 < np.linalg.norm(tint) / np.linalg.norm(color) < 0.6
  # the background far from boxes and labels does not change
  np.testing.assert_array_equal(drawn[:60], image[:60])
  np.testing.assert_array_equal(drawn[:, 480:], image[:, 480:])


def test_rles_are_drawn_like_bitmaps(scene):
  image, boxes, names, scores, bitmaps = scene
  rles = [masks.encode_rle(bitmap) for bitmap in bitmaps]
  np.testing.assert_array_equal(
    draw_detections(image, boxes, names, scores, rles),
    draw_detections(image, boxes, names, scores, bitmaps),
  )


def test_frames_surround_their_boxes(scene):
  image, boxes, names, _, _ = scene
  alone = draw_detections(image, boxes[:1], names[:1])
  x0, y0, x1, y1 = boxes[0].astype(int)
  touched = changed(image, alone)
  assert not touched[y0:y1, x0:x1].any()
  color = pictures.category_color("ant")
  for row, col in [(y0 - 2, x0 + 9), (y1 + 1, x0 + 9), (y0 + 5, x0 - 2), (y0 + 5, x1 + 1)]:
    assert tuple(alone[row, col].tolist()) == color


@pytest.mark.parametrize("size", [(8, 9), (64, 48), (64, 1000), (427, 640), (1500, 2200)])
def test_labels_are_legible_and_inside_images_of_any_size(size):
  height, width = size
  image = np.zeros((height, width, 3), np.uint8)
  corners = np.array([[0, 0, 2, 2], [width - 3, height - 2, width, height]], float)
  drawn = draw_detections(image, corners, ["vicuña", "ocelot"], [0.9, 0.8])
  zoom = drawn.shape[0] // height
  assert drawn.shape == (zoom * height, zoom * width, 3)
  assert max(drawn.shape) >= 400
  for name in ("vicuña", "ocelot"):
    rows, cols = np.nonzero((drawn == pictures.category_color(name)).all(axis=-1))
    assert np.ptp(rows) >= 10  # the label, of at least 10 pixels, in one piece
    assert np.ptp(cols) >= 30


def test_labels_do_not_cover_each_other():
  image = np.full((480, 640, 3), 60, np.uint8)
  rng = np.random.default_rng(0)
  boxes = rng.uniform(0, 400, (60, 4))
  boxes[:, 2:] = boxes[:, :2] + rng.uniform(5, 90, (60, 2))
  names = [f"kind {i}" for i in range(60)]
  scores = rng.random(60)
  best = int(scores.argmax())
  together = draw_detections(image, boxes, names, scores)
  # the label of the best is complete: it equals that of the best drawn alone
  alone = draw_detections(image, boxes[best : best + 1], [names[best]], scores[best : best + 1])
  frame = np.zeros(image.shape[:2], bool)
  x0, y0, x1, y1 = boxes[best].astype(int)
  frame[max(y0 - 6, 0) : y1 + 7, max(x0 - 6, 0) : x1 + 7] = True
  label = changed(image, alone) & ~frame
  assert label.sum() > 300
  same = (together == alone).all(axis=-1)
  assert same[label].mean() > 0.97  # its translucent outline may be mixed with frames below


def test_predictions_below_the_lowest_score_are_not_drawn(scene):
  image, boxes, names, scores, bitmaps = scene
  config = coco_mask.get_config()
  config.model.update(dict(category_ids=(3, 7), category_names=("ant", "elephant")))
  found = {
    "boxes_xyxy": boxes,
    "scores": scores,
    "category_ids": np.array([3, 7]),
    "rles": [masks.encode_rle(bitmap) for bitmap in bitmaps],
  }
  drawn = draw_prediction(config, image, found, None, 0.6)
  expected = draw_detections(image, boxes[:1], names[:1], scores[:1], bitmaps[:1])
  np.testing.assert_array_equal(drawn, expected)
  both = draw_prediction(config, image, found, None, 0.5)
  np.testing.assert_array_equal(both, draw_detections(image, boxes, names, scores, bitmaps))


def test_no_detections_change_nothing(scene):
  image = scene[0]
  np.testing.assert_array_equal(draw_detections(image, np.zeros((0, 4)), [], [], []), image)


def test_boxes_outside_the_image_and_empty_masks_are_allowed(scene):
  image = scene[0]
  boxes = np.array([[-50.0, -50, -10, -10], [600, 10, 700, 50], [-20, 100, 900, 200], [9, 9, 9, 9]])
  nothing = np.zeros((4, 420, 560), bool)
  drawn = draw_detections(image, boxes, list("abcd"), None, nothing)
  assert drawn.shape == image.shape
  assert changed(image, drawn)[100, 250:300].sum() == 0
  assert changed(image, drawn)[99, 250:300].all()
  assert not changed(image, draw_detections(image, boxes[:2], list("ab"))).any()


def test_grey_images_are_drawn_and_wrong_inputs_are_reported():
  grey = np.full((400, 400), 50, np.uint8)
  assert draw_detections(grey, [[1, 1, 9, 9]], ["a"]).shape == (400, 400, 3)
  with pytest.raises(ValueError, match="float"):
    draw_detections(grey.astype(np.float32), [[1, 1, 9, 9]], ["a"])
  with pytest.raises(ValueError, match=r"\[1, 2\]"):
    draw_detections(grey, [[1, 1, 9, 9]], ["a", "b"])
  with pytest.raises(ValueError, match=r"expected a bitmap of \(400, 400\), got \(28, 28\)"):
    draw_detections(grey, [[1, 1, 9, 9]], ["a"], [1.0], np.ones((1, 28, 28)))


def test_detections_on_a_real_image(real_data):
  truth = json.loads((real_data / "coco/annotations/instances_val2017.json").read_text())
  names = {category["id"]: category["name"] for category in truth["categories"]}
  image_info = next(image for image in truth["images"] if image["id"] == 92660)
  image = np.asarray(Image.open(real_data / "coco/val2017" / image_info["file_name"]))
  mine = [a for a in truth["annotations"] if a["image_id"] == 92660]
  boxes = np.array([a["bbox"] for a in mine])
  boxes[:, 2:] += boxes[:, :2]
  bitmaps = [masks.rasterize(a["segmentation"], *image.shape[:2]) for a in mine]
  drawn = draw_detections(
    image, boxes, [names[a["category_id"]] for a in mine], np.ones(len(mine)), bitmaps
  )
  touched = changed(image, drawn)
  covered = np.any(bitmaps, axis=0)
  assert touched[covered].mean() > 0.98
  assert touched[~covered].mean() < 0.25
