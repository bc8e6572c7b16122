"""Our models with torchvision's tensors give torchvision's outputs (tests/golden/README.md)."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import coco_mask, voc2012
from fpt_jax.data import transforms
from fpt_jax.errors import UserError
from fpt_jax.models.backbones.resnet import ResNet
from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.state import skeleton
from fpt_jax.ops.masks import paste
from fpt_jax.tasks.detection.prediction import to_original_image
from fpt_jax.weights.families import family_of
from fpt_jax.weights.torchvision import from_torchvision
from tests.conftest import GOLDEN
from tests.golden.fill import fill

TOLERANCE = 1e-3  # relative to the largest value of an array; measured differences are about 1e-5


def state_dict(name: str) -> dict[str, np.ndarray]:
  shapes = json.loads((GOLDEN / f"{name}.shapes.json").read_text())
  return {tensor: fill(tensor, tuple(shape)) for tensor, shape in shapes.items()}


def zeros(name: str) -> dict[str, np.ndarray]:
  shapes = json.loads((GOLDEN / f"{name}.shapes.json").read_text())
  return {tensor: np.zeros(shape, np.float32) for tensor, shape in shapes.items()}


def assert_close(ours, theirs, tolerance=TOLERANCE):
  theirs = np.asarray(theirs)
  assert np.shape(ours) == theirs.shape
  assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_resnet_features_and_logits(name):
  golden = np.load(GOLDEN / f"{name}.npz")
  structure = skeleton(lambda: ResNet(name, classes=1000, rngs=nnx.Rngs(0)))
  arrays = from_torchvision(state_dict(name), structure.shapes)

  @jax.jit
  def forward(arrays, image_BHWC):
    model = structure.fill(arrays)
    levels = model(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))
    return [level.values_BHWC for level in levels], model.classify(image_BHWC)

  levels, logits = forward(arrays, golden["image_BHWC"])
  for level, theirs in zip(levels, ("c2", "c3", "c4", "c5"), strict=True):
    assert_close(level[..., :: int(golden["channel_step"])], golden[theirs])
  assert_close(logits, golden["logits"])


def golden_config(word):
  config = coco_mask.get_config(word)
  config.data.short_edge, config.data.long_edge = 160, 200
  config.model.rpn.train.update(dict(pre_nms=300, post_nms=150))
  config.model.rpn.test.update(dict(pre_nms=300, post_nms=150))
  # as in the reference, all anchors and regions are used
  config.model.rpn.update(dict(samples=10**6, positive_fraction=0.99999))
  config.model.box_head.update(dict(samples=4000, positive_fraction=0.9999))
  config.model.test.score_threshold = 0.02
  return config


def detector_of(word, name):
  config = golden_config(word)
  structure = skeleton(lambda: models.build(config, nnx.Rngs(0)))
  arrays = from_torchvision(state_dict(name), structure.shapes)
  return config, structure, {name: jnp.asarray(array) for name, array in arrays.items()}


DETECTORS = {"torchvision": "maskrcnn_resnet50_fpn", "torchvision_v2": "maskrcnn_resnet50_fpn_v2"}


@pytest.fixture(scope="module")
def detector():
  return detector_of("torchvision", DETECTORS["torchvision"])


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("word", DETECTORS)
def test_detector_inference(word):
  config, structure, arrays = detector_of(word, DETECTORS[word])
  golden = np.load(GOLDEN / f"{DETECTORS[word]}.npz")
  sizes = golden["image_sizes_hw"].astype(np.int32)
  canvas = golden["batched_BHWC"].shape[1:3]

  @jax.jit
  def forward(arrays, normalized_BHWC, size_B2):
    model = structure.fill(arrays)
    pyramid = model.features_of_normalized(normalized_BHWC, valid_positions(size_B2, *canvas))
    logits, deltas = model.rpn(pyramid)
    proposals = model.rpn.propose(
      logits, deltas, model.rpn.anchors(pyramid, canvas), size_B2, train=False
    )
    values = [level.values_BHWC for level in pyramid]
    return values, logits, deltas, proposals, model.detect_in_features(pyramid, size_B2, canvas)

  values, logits, deltas, proposals, detections = jax.device_get(
    forward(arrays, golden["batched_BHWC"], sizes)
  )
  step = values[0].shape[-1] // golden["fpn_0"].shape[-1]
  for i, name in enumerate(("fpn_0", "fpn_1", "fpn_2", "fpn_3", "fpn_pool")):
    assert_close(values[i][..., ::step], golden[name])
    objectness = golden[f"rpn_objectness_{i}"]
    assert_close(logits[i].reshape(objectness.shape), objectness)
    assert_close(deltas[i].reshape(golden[f"rpn_deltas_{i}"].shape), golden[f"rpn_deltas_{i}"])

  for i in range(2):
    boxes_N4, _, valid_N = (array[i] for array in proposals)
    assert_close(boxes_N4[valid_N], golden[f"proposals_xyxy_{i}"])
    original = np.array(golden[f"image_HWC_{i}"].shape[:2])
    found = to_original_image(
      {name: array[i] for name, array in detections.items()},
      sizes[i],
      original,
      config.model,
    )
    order_D = np.arange(len(golden[f"scores_{i}"]))
    if (found["category_ids"] != golden[f"labels_{i}"]).any():
      # One pair of scores differs by 2e-5, also in float64: rounding can swap it.
      ties = np.flatnonzero(-np.diff(golden[f"scores_{i}"]) < 3e-5)
      assert len(ties) <= 1
      order_D[ties], order_D[ties + 1] = ties + 1, ties
    masks_Dmm = detections["masks_BDmm"][i][order_D]
    found = {
      name: np.asarray(found[name])[order_D] for name in ("category_ids", "scores", "boxes_xyxy")
    }
    np.testing.assert_array_equal(found["category_ids"], golden[f"labels_{i}"])
    assert_close(found["scores"], golden[f"scores_{i}"])
    assert_close(found["boxes_xyxy"], golden[f"boxes_xyxy_{i}"])
    masks_DHW = paste(masks_Dmm, found["boxes_xyxy"], *original)
    assert_close(masks_DHW[:5], golden[f"masks_first5_{i}"])
    areas_D = (masks_DHW > 0.5).sum(axis=(1, 2))
    # a pixel at exactly one half may be rounded either way
    np.testing.assert_allclose(areas_D, golden[f"masks_over_half_area_{i}"], atol=1)


def test_anchors(detector, golden):
  _, structure, arrays = detector
  model = structure.fill(arrays)
  sizes = [golden[f"rpn_objectness_{i}"].shape[1:3] for i in range(5)]
  pyramid = [FeatureMap(jnp.zeros((1, *size, 1)), jnp.ones((1, *size), bool), 0) for size in sizes]
  grids = model.rpn.anchors(pyramid, golden["batched_BHWC"].shape[1:3])
  anchors_A4 = np.concatenate([grid.boxes() for grid in grids])
  np.testing.assert_array_equal(anchors_A4, golden["anchors_xyxy"])


@pytest.mark.slow
def test_training_losses_and_gradients(detector, golden):
  _, structure, arrays = detector
  canvas = golden["batched_BHWC"].shape[1:3]
  batch = training_batch(golden, canvas)
  wanted = {
    "backbone.stages.3.2.conv3.kernel": "backbone.body.layer4.2.conv3.weight",
    "pyramid.lateral.0.kernel": "backbone.fpn.inner_blocks.0.0.weight",
    "rpn.conv.kernel": "rpn.head.conv.0.0.weight",
    "box_head.fc7.kernel": "roi_heads.box_head.fc7.weight",
    "mask_head.deconv.kernel": "roi_heads.mask_predictor.conv5_mask.weight",
  }

  @jax.jit
  def losses_and_gradients(some, arrays, batch):
    def total(some):
      model = structure.fill({**arrays, **some})
      pyramid = model.features_of_normalized(
        batch["image_BHWC"], valid_positions(batch["size_B2"], *canvas)
      )
      losses = model.losses_of_features(pyramid, batch, jax.random.key(0), jax.random.key(1))
      return sum(losses.values()), losses

    return jax.grad(total, has_aux=True)(some)

  gradients, losses = losses_and_gradients({n: arrays[n] for n in wanted}, arrays, batch)
  names = {
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
  }
  assert set(losses) == set(names)
  for ours, theirs in names.items():
    np.testing.assert_allclose(losses[ours], golden[theirs], rtol=TOLERANCE, err_msg=ours)
  for ours, theirs in wanted.items():
    norm = jnp.linalg.norm(gradients[ours].ravel())
    np.testing.assert_allclose(norm, golden[f"gradnorm_{theirs}"], rtol=TOLERANCE, err_msg=ours)


def training_batch(golden, canvas):
  """Returns the reference's ground truth on the canvas, with masks as bitmaps of the whole canvas."""
  count = 4
  batch = {
    "image_BHWC": golden["batched_BHWC"],
    "size_B2": golden["image_sizes_hw"].astype(np.int32),
    "gt_boxes_BG4": np.zeros((2, count, 4), np.float32),
    "gt_labels_BG": np.zeros((2, count), np.int32),
    "gt_valid_BG": np.zeros((2, count), bool),
    "gt_masks_BGmm": np.zeros((2, count, *canvas), np.uint8),
    "gt_mask_boxes_BG4": np.tile(np.float32([0, 0, canvas[1], canvas[0]]), (2, count, 1)),
  }
  for i in range(2):
    height, width = golden[f"image_HWC_{i}"].shape[:2]
    size = batch["size_B2"][i]
    boxes = golden[f"gt_boxes_xyxy_{i}"]
    n = len(boxes)
    batch["gt_boxes_BG4"][i, :n] = transforms.scale_boxes(boxes, (height, width), size)
    batch["gt_labels_BG"][i, :n] = golden[f"gt_labels_{i}"]
    batch["gt_valid_BG"][i, :n] = True
    masks = np.unpackbits(golden[f"gt_masks_{i}"], axis=-1)[:, :, :width]
    rows = np.arange(size[0]) * height // size[0]  # torchvision resizes masks to the nearest
    columns = np.arange(size[1]) * width // size[1]
    batch["gt_masks_BGmm"][i, :n, : size[0], : size[1]] = masks[:, rows][:, :, columns]
  return batch


def test_parameters_of_the_v2():
  """As torchvision documents, with scale and bias of every BatchNorm."""
  shapes = models.structure_of(coco_mask.get_config("torchvision_v2")).shapes
  counted = [math.prod(s.shape) for n, s in shapes.items() if not n.endswith((".mean", ".var"))]
  assert sum(counted) == 46_359_409


SEGMENTERS = {"fcn": "fcn_resnet101", "deeplabv3": "deeplabv3_resnet101"}


@pytest.mark.slow
@pytest.mark.parametrize("head", SEGMENTERS)
def test_segmenter(head):
  """Features, logits and those of the auxiliary head, before enlarging.

  Both networks enlarge with half-pixel centres: torchvision to the size of the image, ours by the stride,
  which is the same for images of a multiple of 8 pixels.
  """
  golden = np.load(GOLDEN / f"{SEGMENTERS[head]}.npz")
  structure = models.structure_of(voc2012.get_config(f"head={head}"))
  counted = [
    math.prod(s.shape) for n, s in structure.shapes.items() if not n.endswith((".mean", ".var"))
  ]
  assert sum(counted) == golden["parameters"]
  tensors = state_dict(SEGMENTERS[head])
  family = family_of(tensors)
  arrays = family.convert(tensors, structure.shapes)

  @jax.jit
  def forward(arrays, image_BHWC):
    model = structure.fill(arrays)
    levels = model.backbone(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))
    auxiliary = model.auxiliary(levels[-2:-1], key=None)
    logits = (model.logits_of_levels(levels), auxiliary)
    return levels[-1].values_BHWC, *(x.values_BHWC for x in logits)

  c5, logits, auxiliary = forward(arrays, golden["image_BHWC"])
  assert_close(c5[..., ::16], golden["c5_BHWC_step16"], 1e-4)
  assert_close(logits, golden["logits_low_BHWC"], 1e-4)
  assert_close(auxiliary, golden["aux_low_BHWC"], 1e-4)


def test_wrong_tensors_of_a_segmenter_are_named():
  structure = models.structure_of(voc2012.get_config("head=deeplabv3"))
  tensors = zeros("deeplabv3_resnet101")
  tensors["classifier.4.weight"] = np.zeros((19, 256, 1, 1), np.float32)
  del tensors["classifier.0.convs.4.2.running_mean"]
  tensors["classifier.5.weight"] = np.zeros(1, np.float32)
  with pytest.raises(UserError) as error:
    family_of(tensors).convert(tensors, structure.shapes)
  for text in (
    "classifier.4.weight is (19, 256, 1, 1) and does not fit head.classify.kernel (1, 1, 256, 21)",
    "classifier.0.convs.4.2.running_mean is missing",
    "classifier.5.weight has no place in the model",
  ):
    assert text in str(error.value)


def test_the_auxiliary_head_may_be_left_out():
  config = voc2012.get_config("head=fcn")
  config.model.auxiliary.weight = 0.0
  shapes = models.structure_of(config).shapes
  tensors = zeros("fcn_resnet101")
  assert family_of(tensors).convert(tensors, shapes).keys() == shapes.keys()


def test_wrong_tensors_are_named(detector):
  _, structure, _ = detector
  tensors = state_dict("maskrcnn_resnet50_fpn")
  tensors["backbone.body.conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
  del tensors["rpn.head.cls_logits.bias"]
  tensors["roi_heads.extra"] = np.zeros(1, np.float32)
  with pytest.raises(UserError) as error:
    from_torchvision(tensors, structure.shapes)
  for name in ("backbone.body.conv1.weight", "rpn.head.cls_logits.bias", "roi_heads.extra"):
    assert name in str(error.value)
