"""Mask R-CNN with detectron2's names and settings, against the formulas of its inference in NumPy.

The formulas are written from detectron2's documentation of its parts: anchors with exact corners at multiples
of the stride, proposals per level, RoIAlign with the half-pixel offset and as many samples as cells, the
background as the last class.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.data import transforms
from fpt_jax.errors import UserError
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.heads.rpn import anchors_of_canvas
from fpt_jax.models.preprocess import DETECTRON2
from fpt_jax.weights.families import check_recorded, family_of, without_prefix
from fpt_jax.weights.files import read_state_dict
from tests.golden.fill import fill
from tests.models.oracle import convolve
from tests.weights.resnets import detectron2_names, resnet50

pytestmark = pytest.mark.usefixtures("quick_compilation")

CANVAS, SIZE = (96, 160), (90, 150)
CHANNELS, HIDDEN, CLASSES = 8, 16, 3
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SIDES = (16.0, 24.0, 32.0, 48.0, 64.0)
PRE_NMS, POST_NMS, DETECTIONS, SCORE = 60, 40, 60, 0.05
CANONICAL = 60.0


def narrow_config():
  config = coco_mask.get_config("detectron2")
  model = config.model
  model.backbone.width, model.pyramid.channels = 16, CHANNELS
  model.num_classes, model.category_ids = CLASSES, (1, 2, 3)
  model.canonical_size = CANONICAL
  model.rpn.anchor_sizes = tuple((side,) for side in ANCHOR_SIDES)
  model.rpn.test.update(dict(pre_nms=PRE_NMS, post_nms=POST_NMS))
  model.box_head.hidden, model.mask_head.hidden = HIDDEN, CHANNELS
  model.test.update(dict(detections_per_image=DETECTIONS, score_threshold=SCORE))
  return config


def state_dict():
  """Returns the tensors of a narrow mask_rcnn_R_50_FPN by detectron2's names."""
  shapes = {}
  for level, inputs in zip((2, 3, 4, 5), (64, 128, 256, 512), strict=True):
    shapes[f"backbone.fpn_lateral{level}"] = (CHANNELS, inputs, 1, 1)
    shapes[f"backbone.fpn_output{level}"] = (CHANNELS, CHANNELS, 3, 3)
  head = "proposal_generator.rpn_head"
  shapes[f"{head}.conv"] = (CHANNELS, CHANNELS, 3, 3)
  shapes[f"{head}.objectness_logits"] = (3, CHANNELS, 1, 1)
  shapes[f"{head}.anchor_deltas"] = (12, CHANNELS, 1, 1)
  shapes["roi_heads.box_head.fc1"] = (HIDDEN, CHANNELS * 49)
  shapes["roi_heads.box_head.fc2"] = (HIDDEN, HIDDEN)
  shapes["roi_heads.box_predictor.cls_score"] = (CLASSES + 1, HIDDEN)
  shapes["roi_heads.box_predictor.bbox_pred"] = (4 * CLASSES, HIDDEN)
  for i in range(1, 5):
    shapes[f"roi_heads.mask_head.mask_fcn{i}"] = (CHANNELS, CHANNELS, 3, 3)
  shapes["roi_heads.mask_head.deconv"] = (CHANNELS, CHANNELS, 2, 2)
  shapes["roi_heads.mask_head.predictor"] = (CLASSES, CHANNELS, 1, 1)
  tensors = resnet50(detectron2_names, "backbone.bottom_up.")
  for name, shape in shapes.items():
    outputs = shape[1] if name.endswith("deconv") else shape[0]
    tensors[f"{name}.weight"] = fill(f"{name}.weight", shape)
    tensors[f"{name}.bias"] = fill(f"{name}.bias", (outputs,))
  # constants that older versions store
  tensors["pixel_mean"] = np.float32([103.53, 116.28, 123.675]).reshape(3, 1, 1)
  tensors["pixel_std"] = np.ones((3, 1, 1), np.float32)
  for i in range(5):
    tensors[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = np.zeros((3, 4), np.float32)
  return tensors


@pytest.fixture(scope="module")
def structure():
  return models.structure_of(narrow_config())


def test_every_tensor_has_its_place(structure, tmp_path):
  tensors = state_dict()
  np.savez(tmp_path / "model_final.npz", **tensors)
  read = without_prefix(read_state_dict(tmp_path / "model_final.npz"))
  family = family_of(read)
  assert family.preprocessing == DETECTRON2
  check_recorded(read, family.preprocessing)
  arrays = family.convert(read, structure.shapes)
  assert arrays.keys() == structure.shapes.keys()

  del tensors["backbone.fpn_output3.bias"]
  tensors["roi_heads.mask_head.predictor.weight"] = np.zeros((CLASSES + 1, CHANNELS, 1, 1))
  tensors["roi_heads.box_predictor.cls_score.bias"] = np.zeros(())
  tensors["roi_heads.keypoint_head.conv_fcn1.weight"] = np.zeros(1)
  with pytest.raises(UserError) as error:
    family.convert(tensors, structure.shapes)
  for message in (
    "backbone.fpn_output3.bias is missing",
    "roi_heads.mask_head.predictor.weight is",
    "roi_heads.box_predictor.cls_score.bias is () and does not fit",
    "roi_heads.keypoint_head.conv_fcn1.weight has no place",
  ):
    assert message in str(error.value)


def test_the_word_sets_what_the_weights_need():
  config = coco_mask.get_config("detectron2,backbone=resnet101")
  model = config.model
  assert (model.pixel_mean, model.pixel_std) == DETECTRON2[:2]
  np.testing.assert_allclose(255 * np.array(model.pixel_mean), [123.675, 116.28, 103.53])
  assert model.backbone.stride_in == "1x1" and model.backbone.norm == "frozen_bn"
  assert (model.backbone.name, model.aligned, model.canonical_size) == ("resnet101", True, 224)
  assert model.num_classes == 80
  assert model.category_ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
  assert model.category_ids[-3:] == (88, 89, 90)
  shapes = models.structure_of(config).shapes
  assert shapes["box_head.cls_score.kernel"].shape == (1024, 81)


@pytest.mark.parametrize(
  ("size", "expected"),
  [
    ((480, 640), (800, 1067)),
    ((427, 640), (800, 1199)),
    ((640, 427), (1199, 800)),
    ((375, 500), (800, 1067)),
    ((300, 640), (625, 1333)),
    ((640, 300), (1333, 625)),
    ((500, 500), (800, 800)),
  ],
)
def test_sizes_of_images_are_rounded(size, expected):
  """800 / 480 * 640 = 1066.7; 800 / 427 * 640 = 1199.06; 300 / 640 * 1333 = 624.8."""
  assert transforms.resized_size(*size, 800, 1333, "detectron2") == expected


@pytest.mark.parametrize("size", [(37, 61), (120, 50), (19, 23), (80, 128)])
def test_images_are_resized_as_pillow_does(size, rng):
  image_HWC = rng.integers(0, 256, (57, 83, 3)).astype(np.uint8)
  expected = np.asarray(Image.fromarray(image_HWC).resize(size[::-1], Image.Resampling.BILINEAR))
  canvas = (size[0] + 3, size[1] + 5)
  ours = transforms.resize_and_pad(image_HWC, size, canvas, "detectron2").numpy()
  assert not ours[size[0] :].any() and not ours[:, size[1] :].any()
  difference = np.abs(ours[: size[0], : size[1]] - expected)
  # Pillow computes with integers: a value of exactly one half may be rounded the other way
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def exact_anchors():
  """Yields the anchors of each level: row, column, aspect ratio."""
  for side, stride in zip(ANCHOR_SIDES, STRIDES, strict=True):
    boxes = []
    for row in range(-(-CANVAS[0] // stride)):
      for column in range(-(-CANVAS[1] // stride)):
        for ratio in (0.5, 1.0, 2.0):
          width = side / ratio**0.5
          height = width * ratio
          x, y = column * stride, row * stride
          boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    yield np.array(boxes)


def test_anchors_are_exact():
  ours = anchors_of_canvas(narrow_config().model.rpn, CANVAS)
  expected = np.concatenate(list(exact_anchors()))
  np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-5)
  assert expected[-1][0] == pytest.approx(128 - 64 / 2**0.5 / 2)  # P6: strides of 64, not 160 // 3


def decoded(deltas, boxes, weights):
  width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  x = boxes[:, 0] + width / 2 + deltas[:, 0] / weights[0] * width
  y = boxes[:, 1] + height / 2 + deltas[:, 1] / weights[1] * height
  width = width * np.exp(np.minimum(deltas[:, 2] / weights[2], np.log(1000 / 16)))
  height = height * np.exp(np.minimum(deltas[:, 3] / weights[3], np.log(1000 / 16)))
  boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
  return np.clip(boxes, 0, [SIZE[1], SIZE[0]] * 2)


def kept(boxes, scores, groups, threshold):
  """Greedy non-maximum suppression within groups; indices in descending order of the scores."""
  chosen = []
  for i in np.argsort(-scores, kind="stable"):
    for j in chosen:
      low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
      both = np.prod(np.maximum(high - low, 0))
      area_i, area_j = (np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j))
      if groups[i] == groups[j] and both > threshold * (area_i + area_j - both):
        break
    else:
      chosen.append(i)
  return np.array(chosen)


def pooled(features, box, bins):
  """RoIAlign of one box: half-pixel offset, ceil(cells per bin) samples; level by the box's size."""
  side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
  level = int(np.clip(np.floor(4 + np.log2(side / CANONICAL + 1e-8)), 2, 5)) - 2
  x_HWC = features[level]

  def weights(low, high, cells):
    start, size = low / STRIDES[level] - 0.5, (high - low) / STRIDES[level] / bins
    samples = int(np.ceil(size))
    matrix = np.zeros((bins, cells))
    for i in range(bins):
      for s in range(samples):
        position = start + i * size + (s + 0.5) * size / samples
        if not -1 <= position <= cells:
          continue
        position = min(max(position, 0), cells - 1)
        below = int(position)
        matrix[i, below] += (1 - position + below) / samples
        matrix[i, min(below + 1, cells - 1)] += (position - below) / samples
    return matrix

  rows = weights(box[1], box[3], x_HWC.shape[0])
  columns = weights(box[0], box[2], x_HWC.shape[1])
  return np.einsum("ph,hwc,qw->pqc", rows, x_HWC, columns)


def inference(features, tensors):
  """Returns boxes, scores, classes and masks from P2..P6 of one image, in float64."""

  def layer(x_HWC, name):
    kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0).astype(np.float64)
    return convolve(x_HWC[None], kernel)[0] + tensors[f"{name}.bias"][None, None]

  def linear(x, name):
    return tensors[f"{name}.weight"].astype(np.float64) @ x + tensors[f"{name}.bias"]

  head = "proposal_generator.rpn_head"
  boxes, logits, levels = [], [], []
  for level, (x_HWC, anchors) in enumerate(zip(features, exact_anchors(), strict=True)):
    hidden = np.maximum(layer(x_HWC, f"{head}.conv"), 0)
    score = layer(hidden, f"{head}.objectness_logits").reshape(-1)
    deltas = layer(hidden, f"{head}.anchor_deltas").reshape(-1, 4)
    best = np.argsort(-score, kind="stable")[:PRE_NMS]
    boxes.append(decoded(deltas[best], anchors[best], (1, 1, 1, 1)))
    logits.append(score[best])
    levels.append(np.full(len(best), level))
  boxes, logits, levels = (np.concatenate(parts) for parts in (boxes, logits, levels))
  some = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
  boxes, logits, levels = boxes[some], logits[some], levels[some]
  proposals = boxes[kept(boxes, logits, levels, 0.7)[:POST_NMS]]

  boxes, scores, classes = [], [], []
  for box in proposals:
    x = pooled(features, box, 7).transpose(2, 0, 1).reshape(-1)
    x = np.maximum(linear(x, "roi_heads.box_head.fc1"), 0)
    x = np.maximum(linear(x, "roi_heads.box_head.fc2"), 0)
    score = np.exp(linear(x, "roi_heads.box_predictor.cls_score"))
    score = (score / score.sum())[:-1]
    deltas = linear(x, "roi_heads.box_predictor.bbox_pred").reshape(CLASSES, 4)
    refined = decoded(deltas, np.tile(box, (CLASSES, 1)), (10, 10, 5, 5))
    for k in np.flatnonzero(score > SCORE):
      boxes.append(refined[k])
      scores.append(score[k])
      classes.append(k)
  boxes, scores, classes = map(np.array, (boxes, scores, classes))
  best = kept(boxes, scores, classes, 0.5)[:DETECTIONS]
  boxes, scores, classes = boxes[best], scores[best], classes[best]

  masks = []
  head = "roi_heads.mask_head"
  deconvolution = tensors[f"{head}.deconv.weight"].astype(np.float64)
  for box, k in zip(boxes, classes, strict=True):
    x = pooled(features, box, 14)
    for i in range(1, 5):
      x = np.maximum(layer(x, f"{head}.mask_fcn{i}"), 0)
    x = np.einsum("hwi,ioab->hawbo", x, deconvolution).reshape(28, 28, -1)
    x = np.maximum(x + tensors[f"{head}.deconv.bias"][None, None], 0)
    masks.append(1 / (1 + np.exp(-layer(x, f"{head}.predictor")[..., k])))
  return proposals, boxes, scores, classes, np.array(masks)


def test_detections_equal_the_formulas(structure, rng):
  tensors = state_dict()
  features = [
    rng.standard_normal((-(-CANVAS[0] // s), -(-CANVAS[1] // s), CHANNELS)).astype(np.float32)
    for s in STRIDES
  ]
  proposals, boxes, scores, classes, masks = inference(
    [f.astype(np.float64) for f in features], tensors
  )
  sides = np.sqrt(np.prod(proposals[:, 2:] - proposals[:, :2], axis=1))
  levels = np.clip(np.floor(4 + np.log2(sides / CANONICAL)), 2, 5)
  assert len(boxes) == DETECTIONS and len(set(levels)) >= 3 and set(classes) == {0, 1, 2}

  converted = family_of(tensors).convert(tensors, structure.shapes)

  @jax.jit
  def detect(arrays, values, size_B2):
    pyramid = tuple(
      FeatureMap(x, jnp.ones(x.shape[:3], bool), s) for x, s in zip(values, STRIDES, strict=True)
    )
    return structure.fill(arrays).detect_in_features(pyramid, size_B2, CANVAS)

  found = detect(
    {name: jnp.asarray(array) for name, array in converted.items()},
    [f[None] for f in features],
    jnp.asarray([SIZE], jnp.int32),
  )
  assert found["valid_BD"][0].all()
  np.testing.assert_array_equal(found["labels_BD"][0], classes + 1)
  np.testing.assert_allclose(found["scores_BD"][0], scores, atol=1e-4)
  np.testing.assert_allclose(found["boxes_BD4"][0], boxes, atol=2e-3)
  np.testing.assert_allclose(found["masks_BDmm"][0], masks, atol=1e-3)
