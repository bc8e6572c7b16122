"""Images of any sizes are predicted on few canvases, and a model is compiled once per canvas."""

from types import SimpleNamespace

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fpt_jax.configs import coco_mask
from fpt_jax.data import canvases, transforms
from fpt_jax.data.transforms import round_up, round_up_to_few
from fpt_jax.tasks import detection, segmentation
from tests.runs import tiny_config, tiny_segmentation_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = [(height, width) for height in (530, 560, 590, 620) for width in (800, 850)]


@pytest.mark.parametrize(("multiple", "remainder"), [(32, 0), (32, 1), (24, 0)])
def test_few_sizes(multiple, remainder):
  edges = np.arange(1 + remainder, 5000)
  few = np.array([round_up_to_few(int(edge), multiple, remainder) for edge in edges])
  own = round_up(edges, multiple, remainder)
  assert (few >= own).all() and ((few - remainder) % multiple == 0).all()
  assert (4 * (few - remainder) < 5 * (own - remainder)).all()
  assert (few == own)[edges <= 8 * multiple + remainder].all()
  sizes = np.unique(few) - remainder
  assert all(((size < sizes) & (sizes <= 2 * size)).sum() <= 4 for size in sizes)


def test_canvases_of_a_thousand_images(rng):
  sizes = rng.integers(200, 2000, (1000, 2)).tolist()
  data = ml_collections.ConfigDict({"buckets": (), "canvas_multiple": 32, "few_canvases": True})
  few = {canvases.of_prediction(data, size) for size in sizes}
  data.few_canvases = False
  own = {canvases.of_prediction(data, size) for size in sizes}
  assert len(own) > 800 and len(few) <= 14**2  # edges of 224, 256, 320, 384, 448, 512, ..., 2048
  area = lambda found: sum(
    h * w for h, w in map(lambda size: canvases.of_prediction(data, size), found)
  )
  own_area = area(sizes)
  data.few_canvases = True
  assert own_area < area(sizes) < 1.2 * own_area


@pytest.mark.parametrize("align_corners", [False, True])
def test_label_maps_of_eight_sizes(align_corners):
  config = tiny_segmentation_config(data__buckets=(), model__align_corners=align_corners)
  config.model.num_classes = 3
  seen = []

  def logits(image_BHWC, size_B2):
    seen.append(image_BHWC.shape[1:3])
    return image_BHWC

  structure = SimpleNamespace(fill=lambda _: SimpleNamespace(logits=logits))
  predict = segmentation.predictor(config, structure, {})
  for height, width in SIZES:
    image_HWC = np.zeros((height, width, 3), np.uint8)
    image_HWC[-1, -1, 2] = 9
    label_HW = predict(image_HWC)["label_map"]
    assert label_HW.shape == (height, width)
    assert np.argwhere(label_HW).tolist() == [[height - 1, width - 1]]
  assert seen == [(640 + align_corners, 896 + align_corners)]
  config.data.few_canvases = False
  assert len({canvases.of_prediction(config.data, size, int(align_corners)) for size in SIZES}) == 8


@pytest.mark.parametrize(
  ("size", "resize"),
  [
    ((5, 7), "torchvision"),
    ((5, 7), "detectron2"),
    ((6, 4), "detectron2"),
    ((6, 4), "torchvision"),
    ((5, 9), "torchvision"),
    ((1, 1), "torchvision"),
    ((33, 20), "torchvision"),
  ],
)
def test_an_image_in_memory_is_laid_on_its_canvas_as_in_the_pipeline(size, resize, rng):
  image_HWC = rng.integers(0, 256, (5, 7, 3), np.uint8)
  expected = np.asarray(transforms.resize_and_pad(image_HWC, size, (34, 21), resize))
  laid = transforms.on_canvas(image_HWC, size, (34, 21), resize)
  assert laid.dtype == np.float32
  np.testing.assert_array_equal(laid, expected)


def test_detections_of_eight_sizes():
  config = tiny_config(data__buckets=(), data__short_edge=514, data__long_edge=900)
  config.model.category_ids = (1, 2, 3, 4, 5, 6)
  seen = []

  def detect(image_BHWC, size_B2):
    seen.append(image_BHWC.shape[1:3])
    empty = jnp.zeros((1, 3))
    return {
      "boxes_BD4": jnp.zeros((1, 3, 4)), "scores_BD": empty, "labels_BD": empty.astype(int),
      "valid_BD": empty > 0,
    }  # fmt: skip

  structure = SimpleNamespace(fill=lambda _: SimpleNamespace(detect=detect))
  predict = detection.predictor(config, structure, {})
  for size in SIZES:
    assert len(predict(np.zeros((*size, 3), np.uint8))["scores"]) == 0
  assert sorted(seen) == [(640, 768), (640, 896)]


@pytest.mark.parametrize("word", ["torchvision", "torchvision_v2", "detectron2"])
def test_detectors_of_other_libraries_have_their_canvases(word):
  data = coco_mask.get_config(word).data
  assert canvases.of_prediction(data, (800, 1066)) == (800, 1088)
  data.few_canvases = True
  assert canvases.of_prediction(data, (800, 1066)) == (896, 1280)
