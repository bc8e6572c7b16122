"""ZigZagNet's heads against their formulas, and their size."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.heads.mask import MaskHead
from fpt_jax.models.heads.zigzag import EncodedMaskHead, RegionEncoding, SummedBoxHead
from fpt_jax.models.state import arrays_of, skeleton
from tests.models.oracle import assert_equals_reference, randomised
from tests.models.test_augmented import dense

LEVELS, SIDE, CHANNELS = 3, 3, 4


def pointwise(a, name, x):
  return x @ a[f"{name}.kernel"][0, 0] + a[f"{name}.bias"]


def transposed(a, level, x_NC):
  """A transposed convolution of one position: each of its outputs meets one tap of the kernel."""
  kernel = a[f"spread.{level}.kernel"].reshape(CHANNELS, SIDE, SIDE, CHANNELS)
  y = np.zeros((len(x_NC), SIDE, SIDE, CHANNELS))
  for i, j in np.ndindex(SIDE, SIDE):
    y[:, i, j] = x_NC @ kernel[:, i, j]
  return y + a[f"spread_biases.{level}"]


def encoding(a, x_LBRPPC):
  x_LNPPC = x_LBRPPC.reshape(LEVELS, -1, SIDE, SIDE, CHANNELS)
  parts = [
    pointwise(a, f"local.{i}", x) + transposed(a, i, x.mean(axis=(1, 2)))
    for i, x in enumerate(x_LNPPC)
  ]
  together = sum(parts)
  of_level = [
    pointwise(a, f"of_part.{i}", part) + pointwise(a, f"of_sum.{i}", together)
    for i, part in enumerate(parts)
  ]
  return sum(of_level)


def box_head(a, x_LBRPPC):
  """[B, R, K, 5]: one logit and four deltas per class."""
  a = {n.removeprefix("of_sum."): v for n, v in a.items()}
  x = sum(x_LBRPPC)
  x = x.reshape(*x.shape[:2], -1)
  for layer in ("fc6", "fc7"):
    x = np.maximum(dense(x, a, layer), 0)
  logits, deltas = dense(x, a, "cls_score"), dense(x, a, "bbox_pred")
  return np.concatenate([logits[..., None], deltas.reshape(*logits.shape, 4)], axis=-1)


def both(head, pooled):
  logits, deltas = head(pooled)
  return jnp.concatenate([logits[..., None], deltas], axis=-1)


SIZES = dict(levels=LEVELS, pool_size=SIDE)
PARTS = {
  "encoding": (
    lambda rngs: RegionEncoding(CHANNELS, rngs=rngs, **SIZES),
    lambda module, pooled: module(pooled),
    encoding,
  ),
  "box": (
    lambda rngs: SummedBoxHead(CHANNELS, hidden=5, num_classes=2, rngs=rngs, **SIZES),
    both,
    box_head,
  ),
}


@pytest.mark.parametrize("name", PARTS)
def test_equals_formula(name, rng):
  make, call, formula = PARTS[name]
  module = make(nnx.Rngs(0))
  structure, arrays = skeleton(lambda: module), randomised(module, rng)
  x_LBRPPC = rng.standard_normal((LEVELS, 2, 3, SIDE, SIDE, CHANNELS)).astype(np.float32)

  def ours(arrays, x_LBRPPC):
    return call(structure.fill(arrays), tuple(x_LBRPPC))

  assert_equals_reference(ours, formula, arrays, x_LBRPPC, True, rng, step=1e-7)


def test_masks_are_those_of_the_standard_head_on_the_encoding(rng):
  head = EncodedMaskHead(CHANNELS, hidden=6, layers=1, num_classes=2, rngs=nnx.Rngs(0), **SIZES)
  pooled = tuple(
    jnp.asarray(rng.standard_normal((LEVELS, 2, 3, SIDE, SIDE, CHANNELS)), jnp.float32)
  )
  labels_BR = jnp.array([[1, 2, 0], [2, 2, 1]])
  arrays = {n: np.asarray(a, np.float64) for n, a in arrays_of(head.encoding).items()}
  encoded = encoding(arrays, np.asarray(pooled))
  want = head.of_encoding(jnp.asarray(encoded, jnp.float32).reshape(pooled[0].shape), labels_BR)
  np.testing.assert_allclose(head(pooled, labels_BR), want, atol=1e-5)


def test_the_encoding_keeps_the_variance_of_the_features_at_the_start(rng):
  """Not that of the mean, whose variance is that of the features divided by the positions."""
  channels = 64
  module = RegionEncoding(channels, levels=4, pool_size=2, rngs=nnx.Rngs(0))
  x_LBRC = rng.standard_normal((4, 1, 50, channels))
  constant = np.broadcast_to(x_LBRC[..., None, None, :], (4, 1, 50, 2, 2, channels))
  y = module(tuple(jnp.asarray(constant, jnp.float32)))
  assert np.std(y) == pytest.approx(1, rel=0.1)


def test_parameters_at_full_size():
  """The encoding has 52.2 M parameters, four times 12.8 M of them in the transposed convolutions."""
  C, levels, side = 256, 4, 14

  def count(build):
    structure = skeleton(lambda: build(C, num_classes=80, rngs=nnx.Rngs(0)))
    return sum(math.prod(s.shape) for s in structure.shapes.values())

  encoding = levels * (side**2 * C**2 + C) + 3 * levels * (C**2 + C)
  assert encoding == 52_170_752
  encoded = functools.partial(EncodedMaskHead, levels=levels, pool_size=side)
  assert count(encoded) == count(MaskHead) + encoding
