"""Pyramids and heads of segmentation against float64 NumPy, written from the formulas of their papers.

Each is called once, on two images of different sizes in the corner of one canvas with other values on
the padding, and the formula is applied to each image alone. So the test also shows that padding changes
nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.heads.apnb import AsymmetricPyramid
from fpt_jax.models.heads.cfnet import CoOccurrentFeatureNetwork
from fpt_jax.models.heads.deeplab import AtrousPooling
from fpt_jax.models.heads.object_context import (
  AtrousObjectContext,
  BaseObjectContext,
  PyramidObjectContext,
)
from fpt_jax.models.heads.pspnet import PyramidPoolingContext
from fpt_jax.models.pyramids.afnb import AsymmetricFusion
from fpt_jax.models.pyramids.aspp import AtrousSpatialPyramid
from fpt_jax.models.pyramids.ppm import PyramidPooling
from fpt_jax.models.state import arrays_of, skeleton
from tests.models.oracle import assert_equals_reference, batch_norm, convolve, randomised
from tests.models.reference import softmax

SIZES, CANVAS, IN, CHANNELS = ((7, 8), (8, 5)), (9, 8), 6, 8


def conv_norm(a, name, x_HWC, *, relu=True, dilation=1, slope=0.0):
  y = convolve(x_HWC[None], a[f"{name}.conv.kernel"], dilation=dilation)[0]
  y = batch_norm(y, a, f"{name}.norm")
  return np.where(y > 0, y, slope * y) if relu else y


leaky = functools.partial(conv_norm, slope=0.01)


def linear(a, name, x):
  return x @ a[f"{name}.kernel"][0, 0] + a.get(f"{name}.bias", 0)


def means(x_HWC, bins):
  h, w, _ = x_HWC.shape
  out = np.zeros((bins, bins, x_HWC.shape[-1]))
  for i, j in np.ndindex(bins, bins):
    rows = slice(i * h // bins, math.ceil((i + 1) * h / bins))
    columns = slice(j * w // bins, math.ceil((j + 1) * w / bins))
    out[i, j] = x_HWC[rows, columns].mean(axis=(0, 1))
  return out


def spread(x_nnC, size):
  bins = len(x_nnC)
  out = np.zeros((*size, x_nnC.shape[-1]))
  for r, c in np.ndindex(*size):
    places = []
    for p, n in ((r, size[0]), (c, size[1])):
      at = min(max((p + 0.5) * bins / n - 0.5, 0), bins - 1)
      low = int(at)
      places.append(((low, 1 - at + low), (min(low + 1, bins - 1), at - low)))
    out[r, c] = sum(u * v * x_nnC[i, j] for i, u in places[0] for j, v in places[1])
  return out


def ppm(a, x, _, prefix=""):
  levels = [
    spread(conv_norm(a, f"{prefix}branches.{i}", means(x, bins)), x.shape[:2])
    for i, bins in enumerate((6, 3, 2, 1))
  ]
  return np.concatenate(levels, axis=-1)


def aspp(a, x, _, prefix=""):
  rates = (1, 3, 6, 9)  # at stride 32
  levels = [conv_norm(a, f"{prefix}branches.{i}", x, dilation=rate) for i, rate in enumerate(rates)]
  return np.concatenate(levels, axis=-1)


def psp(a, x, _):
  return conv_norm(a, "fuse", np.concatenate([x, ppm(a, x, _, "pooling.")], axis=-1))


def deeplabv3(a, x, _):
  mean_HWC = np.broadcast_to(x.mean(axis=(0, 1)), x.shape)
  branches = [aspp(a, x, _, "parallel."), conv_norm(a, "image", mean_HWC)]
  return conv_norm(a, "smooth", conv_norm(a, "project", np.concatenate(branches, axis=-1)))


def attention(q_HWD, k_KD, v_KC, seen):
  """`seen`: (row, column) -> which keys."""
  out = np.zeros((*q_HWD.shape[:2], v_KC.shape[-1]))
  for r, c in np.ndindex(*q_HWD.shape[:2]):
    chosen = seen(r, c)
    scores = k_KD[chosen] @ q_HWD[r, c] / np.sqrt(k_KD.shape[-1])
    out[r, c] = softmax(scores) @ v_KC[chosen]
  return out


def pooled_context(a, name, x, regions=1):
  h, w, _ = x.shape
  k = leaky(a, f"{name}.key", x)
  v = linear(a, f"{name}.value", x)
  region = [(r * regions // h, c * regions // w) for r in range(h) for c in range(w)]

  def seen(r, c):
    return [i for i, other in enumerate(region) if other == region[r * w + c]]

  return linear(
    a,
    f"{name}.project",
    attention(k, k.reshape(h * w, -1), v.reshape(h * w, -1), seen),
  )


def oc_base(a, x, _):
  x = leaky(a, "reduce", x)
  return leaky(a, "fuse", np.concatenate([pooled_context(a, "context", x), x], axis=-1))


def oc_pyramid(a, x, _):
  x = conv_norm(a, "reduce", x, relu=False)
  contexts = [pooled_context(a, f"contexts.{i}", x, n) for i, n in enumerate((1, 2, 3, 6))]
  return leaky(a, "fuse", np.concatenate([leaky(a, "widen", x), *contexts], axis=-1))


def oc_asp(a, x, _):
  x = leaky(a, "reduce", x)
  branches = [leaky(a, f"branches.{i}", x, dilation=d) for i, d in enumerate((1, 3, 6, 9))]
  context = leaky(a, "of_context", pooled_context(a, "context", leaky(a, "narrow", x)))
  return leaky(a, "fuse", np.concatenate([context, *branches], axis=-1))


def acf(a, x, _):
  """CFNet: the mean of the image and its co-occurrent features, weighted by EncNet's encoding."""
  x = conv_norm(a, "reduce", x)
  mean = conv_norm(a, "mean", x.mean(axis=(0, 1), keepdims=True))
  own = {n.removeprefix("co_occurrent."): v for n, v in a.items()}
  x = np.concatenate([np.broadcast_to(mean, x.shape), co_occurrent(own, x)], axis=-1)
  own = {n.removeprefix("encoding."): v for n, v in a.items()}
  return encoding(own, x)


def encoding(a, x):
  codewords, smoothing = a["codewords"], a["smoothing"]
  e = np.zeros_like(codewords)
  for x_C in conv_norm(a, "conv", x).reshape(-1, x.shape[-1]):
    weights = softmax(smoothing * np.sum((x_C - codewords) ** 2, axis=1))
    e += weights[:, None] * (x_C - codewords)
  e = np.maximum(batch_norm(e.T, a, "norm"), 0).mean(axis=1)
  gamma = 1 / (1 + np.exp(-(e @ a["weigh.kernel"] + a["weigh.bias"])))
  return np.maximum(x + x * gamma, 0)


def co_occurrent(a, x):
  h, w, _ = x.shape
  coarse = np.array(
    [
      [x[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean(axis=(0, 1)) for c in range(0, w, 2)]
      for r in range(0, h, 2)
    ]
  )
  q = linear(a, "key", x)
  k, v = (linear(a, n, coarse).reshape(-1, c) for n, c in (("key", q.shape[-1]), ("value", 8)))
  pi = softmax(q.mean(axis=(0, 1)) @ a["prior.kernel"])
  out = np.zeros_like(x)
  for r, c in np.ndindex(h, w):
    weights = sum(
      pi[m] * softmax(k_part @ q_part / np.sqrt(q.shape[-1]))
      for m, (q_part, k_part) in enumerate(
        zip(np.split(q[r, c], 4), np.split(k, 4, axis=1), strict=True)
      )
    )
    out[r, c] = weights @ v
  return x + batch_norm(linear(a, "project", out), a, "norm")


def to_bins(q, k, v):
  k, v = (np.concatenate([means(m, n).reshape(n * n, -1) for n in (1, 3, 6, 8)]) for m in (k, v))
  return attention(q, k, v, lambda r, c: slice(None))


def apnb(a, x, _):
  x = conv_norm(a, "reduce", x)
  k = conv_norm(a, "key", x)
  context = linear(a, "project", to_bins(k, k, linear(a, "value", x)))
  return conv_norm(a, "fuse", np.concatenate([context, x], axis=-1))


def afnb(a, x, low):
  q, k = conv_norm(a, "query", x), conv_norm(a, "key", low)
  context = linear(a, "project", to_bins(q, k, linear(a, "value", low)))
  return conv_norm(a, "fuse", np.concatenate([context, x], axis=-1), relu=False)


CASES = {
  "ppm": (lambda **o: PyramidPooling((IN,), channels=CHANNELS, **o), ppm),
  "aspp": (
    lambda **o: AtrousSpatialPyramid((IN,), channels=CHANNELS, output_stride=32, **o),
    aspp,
  ),
  "afnb": (lambda **o: AsymmetricFusion((IN, IN), channels=CHANNELS, **o), afnb),
  "oc_base": (lambda **o: BaseObjectContext(IN, CHANNELS, **o), oc_base),
  "oc_pyramid": (lambda **o: PyramidObjectContext(IN, CHANNELS, **o), oc_pyramid),
  "oc_asp": (lambda **o: AtrousObjectContext(IN, CHANNELS, output_stride=32, **o), oc_asp),
  "acf": (lambda **o: CoOccurrentFeatureNetwork(IN, CHANNELS, **o), acf),
  "apnb": (lambda **o: AsymmetricPyramid(IN, CHANNELS, **o), apnb),
  "psp": (lambda **o: PyramidPoolingContext(IN, CHANNELS, **o), psp),
  "deeplabv3": (lambda **o: AtrousPooling(IN, CHANNELS, output_stride=32, **o), deeplabv3),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_its_formula_and_padding_changes_nothing(name, rng):
  build, formula = CASES[name]
  module = build(norm="frozen_bn", rngs=nnx.Rngs(0))
  arrays = randomised(module, rng)
  structure = skeleton(lambda: module)
  valid = np.asarray(valid_positions(jnp.array(SIZES), *CANVAS))
  low, high = (
    np.where(valid[..., None], rng.standard_normal((2, *CANVAS, IN)), 7).astype(np.float32)
    for _ in range(2)
  )

  @jax.jit
  def run(low, high):
    maps = [FeatureMap(v, valid, 8) for v in (low, high)]
    module = structure.fill(arrays)
    if name in ("ppm", "aspp", "afnb"):
      levels = module(tuple(maps))
      assert module.channels == tuple(level.channels for level in levels)
      return jnp.concatenate([level.values_BHWC for level in levels], axis=-1)
    return module(maps[1], train=False).values_BHWC

  found = run(low, high)
  assert np.isfinite(found).all()
  arrays64 = {n: np.asarray(v, np.float64) for n, v in arrays.items()}
  for i, (h, w) in enumerate(SIZES):
    want = formula(arrays64, high[i, :h, :w].astype(float), low[i, :h, :w].astype(float))
    # similarities within a region of pyramid-OC are 1024 larger, and have fewer digits after the point
    tolerance = 6e-5 if name == "oc_pyramid" else 2e-5
    np.testing.assert_allclose(found[i, :h, :w], want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("name", ["oc_base", "oc_asp", "acf"])
def test_gradients(name, rng):
  build, formula = CASES[name]
  module = build(norm="frozen_bn", rngs=nnx.Rngs(0))
  arrays = randomised(module, rng)
  structure = skeleton(lambda: module)
  x_HWC = rng.standard_normal((3, 4, IN)).astype(np.float32)

  def ours(arrays, x_HWC):
    x = FeatureMap(x_HWC[None], jnp.ones((1, 3, 4), bool), 8)
    return structure.fill(arrays)(x, train=False).values_BHWC[0]

  assert_equals_reference(
    ours, lambda a, x: formula(a, x, None), arrays, x_HWC, True, rng, step=1e-7
  )


@pytest.mark.parametrize("name", ["oc_base", "oc_pyramid", "oc_asp", "apnb", "afnb"])
def test_the_context_is_zero_at_the_start(name):
  arrays = arrays_of(CASES[name][0](norm="sync_bn", rngs=nnx.Rngs(0)))
  projections = {n: a for n, a in arrays.items() if "project." in n}
  assert len(projections) == (8 if name == "oc_pyramid" else 2)
  assert not any(np.any(a) for a in projections.values())


def test_rates_follow_the_stride():
  """Doubled at stride 8 (Chen et al. 2017, section 4.1)."""
  for stride, rates in ((8, (12, 24, 36)), (16, (6, 12, 18))):
    pyramid = nnx.eval_shape(
      lambda stride=stride: AtrousSpatialPyramid((4,), output_stride=stride, rngs=nnx.Rngs(0))
    )
    assert tuple(b.conv.kernel_dilation for b in list(pyramid.branches)[1:]) == rates
