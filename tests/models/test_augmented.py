"""PANet's heads against their formulas, and their input regions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.heads.augmented import AugmentedBoxHead, AugmentedMaskHead
from fpt_jax.models.state import skeleton
from fpt_jax.ops.roi_align import roi_align
from tests.models.oracle import assert_equals_reference, convolve, randomised

LEVELS, SIDE, CHANNELS, CLASSES = 3, 3, 8, 2
OPTIONS = dict(levels=LEVELS, pool_size=SIDE, num_classes=CLASSES)
LABELS_BR = np.array([[1, 2, 0], [2, 2, 1]])


def norm_relu(x, a, name):
  """GroupNorm with four channels per group, for each region separately."""
  groups = x.reshape(len(x), -1, x.shape[-1] // 4, 4)
  mean, var = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
  normed = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
  return np.maximum(normed * a[f"{name}.scale"] + a[f"{name}.bias"], 0)


def layer(x, a, name):
  return norm_relu(convolve(x, a[f"{name}.conv.kernel"]), a, f"{name}.norm.norm")


def dense(x, a, name):
  return x @ a[f"{name}.kernel"] + a[f"{name}.bias"]


def fused(x_LBRPPC, a):
  """Liu et al. 2018, 3.2: a separate layer for every level, then the maximum."""
  return np.max(
    [
      layer(x.reshape(-1, *x.shape[2:]), a, f"fused.convs.{level}")
      for level, x in enumerate(x_LBRPPC)
    ],
    axis=0,
  )


def box_head(a, x_LBRPPC):
  """[B, R, K, 5]: one logit and four deltas per class."""
  x = fused(x_LBRPPC, a)
  for i in range(3):
    x = layer(x, a, f"convs.{i}")
  hidden = np.maximum(dense(x.reshape(len(x), -1), a, "fc6"), 0)
  logits = dense(hidden, a, "cls_score").reshape(*LABELS_BR.shape, CLASSES + 1, 1)
  deltas = dense(hidden, a, "bbox_pred").reshape(*LABELS_BR.shape, CLASSES + 1, 4)
  return np.concatenate([logits, deltas], axis=-1)


def mask_head(a, x_LBRPPC):
  """Liu et al. 2018, 3.3: logits of the region's class plus those of the whole foreground."""
  x = fused(x_LBRPPC, a)
  for i in range(2):
    x = layer(x, a, f"convs.{i}")
  fine = np.zeros((len(x), 2 * SIDE, 2 * SIDE, CHANNELS))
  coarse = layer(x, a, "last")
  kernel = a["of_class.deconv.kernel"].reshape(CHANNELS, 2, 2, CHANNELS)
  for i, j in np.ndindex(2, 2):
    fine[:, i::2, j::2] = np.maximum(coarse @ kernel[:, i, j] + a["of_class.deconv_bias"], 0)
  logits = fine @ a["of_class.logits.kernel"][0, 0] + a["of_class.logits.bias"]
  own = np.stack([y[..., label] for y, label in zip(logits, LABELS_BR.ravel(), strict=True)])
  x = layer(layer(x, a, "fc_convs.0"), a, "fc_convs.1")
  foreground = dense(x.reshape(len(x), -1), a, "foreground").reshape(own.shape)
  return (own + foreground).reshape(*LABELS_BR.shape, 2 * SIDE, 2 * SIDE)


HEADS = {
  "box": (
    lambda rngs: AugmentedBoxHead(CHANNELS, hidden=6, rngs=rngs, **OPTIONS),
    lambda head, pooled: jnp.concatenate([head(pooled)[0][..., None], head(pooled)[1]], axis=-1),
    box_head,
  ),
  "mask": (
    lambda rngs: AugmentedMaskHead(CHANNELS, hidden=CHANNELS, rngs=rngs, **OPTIONS),
    lambda head, pooled: head(pooled, jnp.asarray(LABELS_BR)),
    mask_head,
  ),
}


@pytest.mark.parametrize("name", HEADS)
def test_equals_formula(name, rng):
  make, call, formula = HEADS[name]
  structure = skeleton(lambda: make(nnx.Rngs(0)))
  zeros = {n: np.zeros(s.shape, np.float32) for n, s in structure.shapes.items()}
  arrays = randomised(structure.fill(zeros), rng)
  x_LBRPPC = rng.standard_normal((LEVELS, *LABELS_BR.shape, SIDE, SIDE, CHANNELS))

  def ours(arrays, x_LBRPPC):
    return call(structure.fill(arrays), tuple(x_LBRPPC))

  assert_equals_reference(ours, formula, arrays, x_LBRPPC.astype(np.float32), True, rng, step=1e-7)


def maps(sizes, make):
  """Makes feature maps of two images."""
  return tuple(
    FeatureMap(make((2, *size, 4)), np.ones((2, *size), bool), 4 * 2**i)
    for i, size in enumerate(sizes)
  )


def demo(masks=True):
  config = coco_mask.get_config("demo,fpt=none,head=augmented")
  config.model.pyramid.channels = 4
  config.model.mask_head.enabled = masks
  return config


def test_every_region_is_pooled_from_every_level(rng):
  config = demo(masks=False)
  structure = models.structure_of(config)
  model = structure.fill({n: np.zeros(s.shape, s.dtype) for n, s in structure.shapes.items()})
  pyramid = maps(
    [(9, 6), (5, 3), (3, 2)], lambda shape: rng.standard_normal(shape).astype(np.float32)
  )
  corner_BR2 = rng.uniform(0, 15, (2, 3, 2)).astype(np.float32)
  boxes_BR4 = np.concatenate([corner_BR2, corner_BR2 + [[[9.0, 20.0]]]], axis=2, dtype=np.float32)
  valid_BR = np.array([[True, True, False], [True, False, True]])
  pool = jax.jit(lambda pyramid: model.pool(pyramid, boxes_BR4, valid_BR, config.model.box_head))
  pooled = pool(pyramid)
  assert len(pooled) == 2  # the last level is for the RPN
  cut = functools.partial(roi_align, output_size=7, sampling_ratio=2, aligned=True)
  for level, pooled_BRPPC in zip(pyramid, pooled, strict=False):
    want = jax.jit(jax.vmap(functools.partial(cut, spatial_scale=1 / level.stride)))(
      level.values_BHWC, boxes_BR4
    )
    want = np.where(valid_BR[..., None, None, None], want, 0)
    np.testing.assert_allclose(pooled_BRPPC, want, atol=1e-6)


@pytest.mark.parametrize("masks", [False, True])
def test_detector(masks):
  """Training and detection work with masks and with boxes only."""
  structure = models.structure_of(demo(masks))
  of_shape = jax.ShapeDtypeStruct
  pyramid = maps(
    [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)], lambda shape: of_shape(shape, jnp.float32)
  )
  batch = dict(
    image_BHWC=of_shape((2, 128, 128, 3), jnp.float32),
    size_B2=of_shape((2, 2), jnp.int32),
    gt_boxes_BG4=of_shape((2, 5, 4), jnp.float32),
    gt_labels_BG=of_shape((2, 5), jnp.int32),
    gt_valid_BG=of_shape((2, 5), jnp.bool_),
    gt_masks_BGmm=of_shape((2, 5, 28, 28), jnp.float32),
  )

  def both(arrays, pyramid, batch):
    model, key = structure.fill(arrays), jax.random.key(0)
    losses = model.losses_of_features(pyramid, batch, key, key)
    return losses, model.detect_in_features(pyramid, batch["size_B2"], (128, 128))

  losses, found = jax.eval_shape(both, structure.shapes, pyramid, batch)
  assert ("loss_mask" in losses) == ("masks_BDmm" in found) == masks
  assert all(loss.shape == () for loss in losses.values())
  assert found["boxes_BD4"].shape == (2, 20, 4)
  assert not masks or found["masks_BDmm"].shape == (2, 20, 28, 28)


def test_parameters_at_full_size():
  shapes = models.structure_of(coco_mask.get_config("fpt=none,head=augmented")).shapes
  C, K, levels = 256, 81, 4
  layer = 9 * C * C + 2 * C

  def count(prefix):
    return sum(math.prod(s.shape) for n, s in shapes.items() if n.startswith(prefix))

  fc6 = 49 * C * 1024 + 1024
  assert count("box_head.") == (levels + 3) * layer + fc6 + (1024 + 1) * 5 * K
  upsampled = 4 * C * C + C + (C + 1) * K
  fc = layer + 9 * C * 128 + 2 * 128 + 196 * 128 * 784 + 784
  assert count("mask_head.") == (levels + 3) * layer + upsampled + fc


def test_too_few_layers():
  with pytest.raises(ValueError, match="at least 2 layers, got 1"):
    skeleton(lambda: AugmentedMaskHead(4, layers=1, rngs=nnx.Rngs(0), **OPTIONS))
