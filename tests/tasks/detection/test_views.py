"""Detections combined over views: against plain detection, by symmetry, and against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax import models
from fpt_jax.models.rcnn import RCNN
from fpt_jax.tasks.detection.views import detector, mirrored_view
from tests.runs import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE_B2 = np.array([[45, 61], [64, 50]], np.int32)
LARGER_B2 = np.array([[67, 92], [95, 75]], np.int32)


@pytest.fixture(scope="module")
def config():
  config = tiny_config("fpt=none")
  config.model.test.update(dict(detections_per_image=12, max_candidates=60, score_threshold=0.15))
  return config


@pytest.fixture(scope="module")
def structure(config):
  return models.structure_of(config)


@pytest.fixture(scope="module")
def arrays(structure):
  """Returns random weights, large enough to distinguish regions."""
  rng, arrays = np.random.default_rng(0), {}
  for name, shape in sorted((n, s.shape) for n, s in structure.shapes.items()):
    if name.endswith("kernel"):
      values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
    else:
      values = np.full(shape, float(name.endswith(("scale", "var"))))
    arrays[name] = jnp.asarray(values, jnp.float32)
  return arrays


def view(rng, size_B2, canvas):
  image_BHWC = np.zeros((len(size_B2), *canvas, 3), np.float32)
  for image_HWC, (height, width) in zip(image_BHWC, size_B2, strict=True):
    image_HWC[:height, :width] = rng.uniform(0, 255, (height, width, 3))
  return {"image_BHWC": jnp.asarray(image_BHWC), "size_B2": jnp.asarray(size_B2)}


@pytest.fixture(scope="module")
def views():
  rng = np.random.default_rng(0)
  first = view(rng, SIZE_B2, (64, 64))
  # the second image is its own mirror image
  symmetric = np.array(first["image_BHWC"])
  symmetric[1, :64, :50] += symmetric[1, :64, :50][:, ::-1]
  symmetric[1] /= 2
  return first | {"image_BHWC": jnp.asarray(symmetric)}, view(rng, LARGER_B2, (96, 96))


@pytest.fixture(scope="module")
def detect(config, structure):
  """Returns the function that makes a detector for some views."""

  @functools.cache
  def make(short_edges, flip):
    changed = config.copy_and_resolve_references()
    changed.eval.update(dict(short_edges=short_edges, flip=flip))
    return detector(changed, structure)

  return make


@pytest.fixture(scope="module")
def plain(detect, arrays, views):
  return jax.device_get(detect((), flip=False)(arrays, views[:1]))


def test_one_view_is_plain_detection(config, structure, arrays, views, plain):
  direct = jax.jit(lambda arrays, *view: structure.fill(arrays).detect(*view))
  direct = direct(arrays, views[0]["image_BHWC"], views[0]["size_B2"])
  assert plain.keys() == direct.keys() and plain["valid_BD"].sum() > 10
  for name in plain:
    np.testing.assert_array_equal(plain[name], direct[name], err_msg=name)


def test_identical_views_change_nothing(detect, arrays, views, plain):
  twice = jax.device_get(detect((64, 64), flip=False)(arrays, (views[0], views[0])))
  for name in ("valid_BD", "labels_BD"):
    np.testing.assert_array_equal(twice[name], plain[name])
  for name in ("boxes_BD4", "scores_BD", "masks_BDmm"):
    np.testing.assert_allclose(twice[name], plain[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_mirrored_images_give_mirrored_detections(detect, arrays, views):
  detect = detect((), flip=True)
  in_mirror = mirrored_view(views[0])
  np.testing.assert_array_equal(in_mirror["image_BHWC"][1], views[0]["image_BHWC"][1])
  np.testing.assert_array_equal(
    in_mirror["image_BHWC"][0, :45, :61], views[0]["image_BHWC"][0, :45, 60::-1]
  )
  found = jax.device_get(detect(arrays, (views[0],)))
  turned = jax.device_get(detect(arrays, (in_mirror,)))
  for name in ("valid_BD", "labels_BD", "scores_BD"):
    np.testing.assert_array_equal(found[name][0], turned[name][0])
  valid_D = found["valid_BD"][0]
  assert valid_D.sum() > 5
  x0, y0, x1, y1 = turned["boxes_BD4"][0][valid_D].T
  np.testing.assert_allclose(
    found["boxes_BD4"][0][valid_D], np.stack([61 - x1, y0, 61 - x0, y1], -1), atol=1e-4
  )
  masks_Dmm = turned["masks_BDmm"][0][valid_D][..., ::-1]
  np.testing.assert_allclose(found["masks_BDmm"][0][valid_D], masks_Dmm, atol=1e-4)


def test_a_symmetric_image_has_symmetric_detections(detect, arrays, views, config):
  found = jax.device_get(detect((), flip=True)(arrays, (views[0],)))
  valid_D = found["valid_BD"][1]
  boxes_D4, labels_D = found["boxes_BD4"][1][valid_D], found["labels_BD"][1][valid_D]
  x0, y0, x1, y1 = boxes_D4.T
  mirrored_D4 = np.stack([50 - x1, y0, 50 - x0, y1], -1)
  partners = 0
  for i, box_4 in enumerate(mirrored_D4[:-1]):  # the partner of the last one may be missing
    near_D = (np.abs(boxes_D4 - box_4).max(-1) < 1e-3) & (labels_D == labels_D[i])
    if near_D.any():
      partner = int(near_D.argmax())
      partners += partner != i
      np.testing.assert_allclose(
        found["masks_BDmm"][1][i], found["masks_BDmm"][1][partner][:, ::-1], atol=1e-4
      )
      assert found["scores_BD"][1][i] == found["scores_BD"][1][partner]
    else:  # suppressed by the better half of the pair, or by a box that does not overlap this one
      others = np.flatnonzero(labels_D == labels_D[i])
      assert max(iou(box_4, boxes_D4[o]) for o in others) > config.model.test.nms_threshold - 1e-4
  assert partners > 0


def iou(a_4, b_4):
  a_4, b_4 = np.float64(a_4), np.float64(b_4)
  sides = np.minimum(a_4[2:], b_4[2:]) - np.maximum(a_4[:2], b_4[:2])
  overlap = np.prod(np.maximum(sides, 0))
  return overlap / (np.prod(a_4[2:] - a_4[:2]) + np.prod(b_4[2:] - b_4[:2]) - overlap)


def moved(boxes_N4, size, new_size, flip):
  """Converts boxes on an image of one size to boxes on the same image of another size."""
  boxes_N4 = np.float64(boxes_N4) * np.tile(np.float64(new_size[::-1]) / size[::-1], 2)
  x0, y0, x1, y1 = boxes_N4.T
  return np.stack([new_size[1] - x1, y0, new_size[1] - x0, y1], -1) if flip else boxes_N4


def test_sizes_and_mirror_images_against_numpy(
  detect, arrays, views, structure, config, monkeypatch
):
  traced, features = [], RCNN.features
  with monkeypatch.context() as patch:
    patch.setattr(RCNN, "features", lambda *args: traced.append(args[1].shape) or features(*args))
    found = jax.device_get(detect((64, 96), flip=True)(arrays, views))
  assert traced == [(2, 64, 64, 3), (2, 96, 96, 3)]  # one compilation per canvas
  seen = [(mirrored_view(v) if flip else v, flip) for v in views for flip in (False, True)]

  @jax.jit
  def find_candidates(arrays, view):
    model = structure.fill(arrays)
    pyramid = model.features(view["image_BHWC"], view["size_B2"])
    canvas = view["image_BHWC"].shape[1:3]
    return pyramid, model.candidates(pyramid, view["size_B2"], canvas)

  features_and_candidates = [find_candidates(arrays, v) for v, _ in seen]
  sizes = [np.asarray(v["size_B2"]) for v, _ in seen]
  draw = jax.jit(lambda arrays, *inputs: structure.fill(arrays).masks(*inputs))
  masks = 0
  for (pyramid, _), size_B2, (_, flip) in zip(features_and_candidates, sizes, seen, strict=True):
    boxes_BD4 = np.stack(
      [moved(found["boxes_BD4"][b], SIZE_B2[b], size_B2[b], flip) for b in range(2)]
    ).astype(np.float32)
    part = np.asarray(draw(arrays, pyramid, found | {"boxes_BD4": boxes_BD4}))
    masks = masks + (part[..., ::-1] if flip else part) / 4

  sources = set()
  for b in range(2):
    union = []
    for i, ((_, candidates), size_B2, (_, flip)) in enumerate(
      zip(features_and_candidates, sizes, seen, strict=True)
    ):
      boxes_M4 = moved(candidates["boxes_BM4"][b], size_B2[b], SIZE_B2[b], flip)
      scores_M, labels_M = candidates["scores_BM"][b], candidates["labels_BM"][b]
      union += [
        (float(s), int(l), box, i)
        for s, l, box in zip(scores_M, labels_M, boxes_M4, strict=True)
        if s > 0
      ]
    kept = []
    for score, label, box_4, i in sorted(union, key=lambda c: -c[0]):
      threshold = config.model.test.nms_threshold
      if all(l != label or iou(box_4, other) <= threshold for _, l, other, _ in kept):
        kept.append((score, label, box_4, i))
    kept = kept[:12]
    sources |= {i for *_, i in kept}
    assert found["valid_BD"][b].sum() == len(kept) > 5
    scores, labels, boxes, _ = zip(*kept, strict=True)
    valid_D = found["valid_BD"][b]
    np.testing.assert_allclose(found["scores_BD"][b][valid_D], scores, rtol=1e-6)
    np.testing.assert_array_equal(found["labels_BD"][b][valid_D], labels)
    np.testing.assert_allclose(found["boxes_BD4"][b][valid_D], np.stack(boxes), atol=1e-3)
    np.testing.assert_allclose(found["masks_BDmm"][b][valid_D], masks[b][valid_D], atol=1e-4)
  assert len(sources) > 2  # several sizes contribute, and so do mirrored images
