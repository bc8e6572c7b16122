"""Pyramids of detection: two of them against their formulas, image by image; normalisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.pyramids import DETECTION_PYRAMIDS, PYRAMIDS
from fpt_jax.models.state import arrays_of, skeleton
from tests.models.oracle import assert_equals_reference, randomised

SIZES = np.array([[13, 9], [7, 6]])  # of two images on the finest level
IN_CHANNELS = (3, 4, 5, 6)
CHANNELS = 8


def convolve(x_HWC, p, name, stride=1):
  """3x3 convolution as a sum over taps; output i is centred on input i * stride."""
  H, W, _ = x_HWC.shape
  padded = np.pad(x_HWC, ((1, 1), (1, 1), (0, 0)))
  y = p.get(f"{name}.bias", 0.0)
  for i in range(3):
    for j in range(3):
      y = y + padded[i : i + H : stride, j : j + W : stride] @ p[f"{name}.kernel"][i, j]
  return y


def relu(x):
  return np.maximum(x, 0)


def norm_relu(x_HWC, p, name):
  """GroupNorm of at least four channels per group."""
  groups = max(1, x_HWC.shape[-1] // 4)
  x = x_HWC.reshape(-1, groups, x_HWC.shape[-1] // groups)
  mean, var = x.mean(axis=(0, 2), keepdims=True), x.var(axis=(0, 2), keepdims=True)
  x = ((x - mean) / np.sqrt(var + 1e-5)).reshape(x_HWC.shape)
  return relu(x * p[f"{name}.scale"] + p[f"{name}.bias"])


def at_level(x_HWC, source, target, size):
  """Position (i, j) of the target lies in (i, j) * 2**(target - source) of the source, rounded down."""
  rows, columns = (np.floor(np.arange(n) * 2.0 ** (target - source)).astype(int) for n in size)
  return x_HWC[rows][:, columns]


def path_augmentation(levels, p):
  """Liu et al. 2018, 3.1, from P2..P5 on."""
  done = [levels[0]]
  for i, level in enumerate(levels[1:]):
    carried = relu(convolve(done[-1], p, f"down.{i}", stride=2))
    done.append(relu(convolve(carried + level, p, f"fuse.{i}")))
  return done


def bpa(levels, p):
  summed = [x @ p[f"fpn.lateral.{i}.kernel"][0, 0] for i, x in enumerate(levels)]
  summed = [x + p[f"fpn.lateral.{i}.bias"] for i, x in enumerate(summed)]
  for i in (2, 1, 0):
    summed[i] = summed[i] + at_level(summed[i + 1], i + 1, i, summed[i].shape[:2])
  return path_augmentation([convolve(x, p, f"fpn.smooth.{i}") for i, x in enumerate(summed)], p)


def bfi(levels, p):
  """The two directions cross, and then exchange their features twice."""
  sizes = [x.shape[:2] for x in levels]

  def way(own, order, name, gated):
    done = {}
    for step, i in enumerate(order):
      y = own[i]
      product = 1.0
      for k, j in enumerate(order[: max(0, step - 1)]):
        product = product * at_level(convolve(done[j], p, f"{name}.far.{step}.{k}"), j, i, sizes[i])
      if step > 1:
        y = y * product if gated else y + product
      if step:
        y = y + at_level(done[order[step - 1]], order[step - 1], i, sizes[i])
      done[i] = y
    return [done[i] for i in range(4)]

  def meet(up, down, name):
    u = [norm_relu(convolve(x, p, f"{name}.of_up.{i}.conv"), p, f"{name}.of_up.{i}.norm.norm")
         for i, x in enumerate(up)]  # fmt: skip
    d = [norm_relu(convolve(x, p, f"{name}.of_down.{i}.conv"), p, f"{name}.of_down.{i}.norm.norm")
         for i, x in enumerate(down)]  # fmt: skip
    return [a * b for a, b in zip(u, d, strict=True)]

  rising, falling = (0, 1, 2, 3), (3, 2, 1, 0)
  laterals = [convolve(x, p, f"lateral.{i}") for i, x in enumerate(levels)]
  down = way(laterals, falling, "top_down", True)
  up = way([convolve(x, p, f"rise.{i}") for i, x in enumerate(down)], rising, "bottom_up", True)
  for t in (0, 1):
    down = way(meet(up, down, f"stages.{t}.down"), falling, f"stages.{t}.down.pathway", False)
    up = way(meet(up, down, f"stages.{t}.up"), rising, f"stages.{t}.up.pathway", False)
  return [convolve(x, p, f"smooth.{i}") for i, x in enumerate(up)]


def build(name, in_channels, channels, norm="none"):
  constructor = PYRAMIDS[name]
  return skeleton(lambda: constructor(in_channels, channels=channels, norm=norm, rngs=nnx.Rngs(0)))


# The tested function, its formula, its input channels, and whether padding changes nothing. An FPN
# without a norm, like torchvision's, sees on padding what its own layers put there.
CASES = {
  "bpa": (PYRAMIDS["bpa"].__call__, bpa, IN_CHANNELS, False),
  "bpa, above the FPN": (PYRAMIDS["bpa"].augment, path_augmentation, (CHANNELS,) * 4, True),
  "bfi": (PYRAMIDS["bfi"].__call__, bfi, IN_CHANNELS, True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_formula(case, rng):
  call, formula, channels, padded = CASES[case]
  sizes = SIZES if padded else SIZES[:1]
  structure = build(case[:3], IN_CHANNELS, CHANNELS)
  given = randomised(
    structure.fill({n: np.zeros(s.shape) for n, s in structure.shapes.items()}), rng
  )
  level_sizes = [-(-sizes // 2**i) for i in range(4)]  # [images, 2] of each level
  valid = [
    np.asarray(valid_positions(jnp.asarray(size), *size.max(axis=0))) for size in level_sizes
  ]
  # padding holds random values; a pyramid that reads them differs from the formula
  inputs = [
    rng.standard_normal((*v.shape, c)).astype(np.float32)
    for v, c in zip(valid, channels, strict=True)
  ]
  named = {f"input.{i}": jnp.asarray(x) for i, x in enumerate(inputs) if i}

  def ours(arrays, x):
    values = [x, *(arrays[f"input.{i}"] for i in (1, 2, 3))]
    pyramid = tuple(
      FeatureMap(x, v, 4 * 2**i) for i, (x, v) in enumerate(zip(values, valid, strict=True))
    )
    outputs = call(structure.fill({n: arrays[n] for n in structure.shapes}), pyramid)
    return jnp.concatenate([o.masked().reshape(len(x), -1, CHANNELS) for o in outputs], axis=1)

  def reference(arrays, x):
    values = [x, *(arrays[f"input.{i}"] for i in (1, 2, 3))]
    flat = []
    for b in range(len(sizes)):
      alone = [x[b, : s[b, 0], : s[b, 1]] for x, s in zip(values, level_sizes, strict=True)]
      for y, v in zip(formula(alone, arrays), valid, strict=True):
        canvas = np.zeros((*v.shape[1:], CHANNELS))
        canvas[: y.shape[0], : y.shape[1]] = y
        flat.append(canvas.reshape(-1, CHANNELS))
    return np.stack([np.concatenate(flat[4 * b : 4 * b + 4]) for b in range(len(sizes))])

  seen = np.concatenate([v.reshape(len(sizes), -1, 1) for v in valid], axis=1)
  assert_equals_reference(ours, reference, given | named, inputs[0], seen, rng)


def test_parameters_at_full_size():
  backbone, C = (256, 512, 1024, 2048), 256

  def count(name):
    return sum(math.prod(s.shape) for s in build(name, backbone, C).shapes.values())

  def conv3x3(inputs, outputs):
    return 9 * inputs * outputs + outputs

  fpn = sum(c * C + C for c in backbone) + 4 * conv3x3(C, C)
  assert count("bpa") == fpn + 6 * conv3x3(C, C)

  far = 3  # pairs of levels two or more apart
  crossing = sum(conv3x3(c, C) for c in backbone) + (4 + 2 * far) * conv3x3(C, C)
  half = C // 2

  def meet(inputs, outputs):  # without a bias, but with a scale and a bias of the norm
    return 4 * (9 * inputs * outputs + 2 * outputs)

  first = 3 * meet(C, half) + meet(half, half) + 2 * far * conv3x3(half, half)
  second = 3 * meet(half, C) + meet(C, C) + 2 * far * conv3x3(C, C)
  assert count("bfi") == crossing + first + second + 4 * conv3x3(C, C)


def convolutions(name, norm="none"):
  """Names of a pyramid's arrays, without those of the exchanges, which have GroupNorm."""
  structure = build(name, IN_CHANNELS, CHANNELS, norm)
  return {n for n in structure.shapes if ".of_up." not in n and ".of_down." not in n}


@pytest.mark.parametrize("name", DETECTION_PYRAMIDS)
def test_names_with_and_without_a_norm(name):
  plain = convolutions(name)
  kernels = {n for n in plain if n.endswith(".kernel")}
  assert plain == kernels | {n.replace(".kernel", ".bias") for n in kernels}
  assert {
    f"fpn.lateral.{i}.kernel" if name == "bpa" else f"lateral.{i}.kernel" for i in range(4)
  } <= kernels
  leaves = ("scale", "bias", "mean", "var")
  normed = {n.replace(".kernel", f".norm.norm.{leaf}") for n in kernels for leaf in leaves}
  assert convolutions(name, "sync_bn") == kernels | normed


@pytest.mark.parametrize("name", DETECTION_PYRAMIDS)
def test_a_norm_is_over_valid_positions(name, rng):
  """Padding changes neither the levels nor the running statistics, which training updates."""
  structure = build(name, IN_CHANNELS, CHANNELS, "sync_bn")
  zeros = {n: np.zeros(s.shape, s.dtype) for n, s in structure.shapes.items()}
  arrays = randomised(structure.fill(zeros), rng)
  sizes = [jnp.asarray(-(-SIZES // 2**i)) for i in range(4)]
  valid = [valid_positions(size, 16 // 2**i, 16 // 2**i) for i, size in enumerate(sizes)]
  shapes = [(*v.shape, c) for v, c in zip(valid, IN_CHANNELS, strict=True)]
  images = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

  @jax.jit
  def train(arrays, padding):
    levels = tuple(
      FeatureMap(jnp.where(v[..., None], image, padding), v, 4 * 2**i)
      for i, (image, v) in enumerate(zip(images, valid, strict=True))
    )
    module = structure.fill(arrays)
    return [level.masked() for level in module(levels, train=True)], arrays_of(module)

  levels, after = train(arrays, 0.0)
  for found, expected in zip(*(jax.tree.leaves(train(arrays, x)) for x in (9.0, 0.0)), strict=True):
    np.testing.assert_array_equal(found, expected)
  assert all(np.isfinite(level).all() and np.any(level) for level in levels)
  for array in arrays:
    is_running = array.endswith((".mean", ".var"))
    assert np.any(after[array] != arrays[array]) == is_running


@pytest.mark.parametrize(("init", "gain"), [("fan_in", 1.0), ("fan_out", math.sqrt(2 * 256 / 64))])
def test_initial_laterals_and_the_size_of_features(init, gain, rng):
  """With a variance of 1 / fan-in, a lateral keeps it; with 2 / fan-out, 256 channels grow."""
  pyramid = PYRAMIDS["bfp"]((256,), channels=64, init=init, rngs=nnx.Rngs(0))
  x = jnp.asarray(rng.standard_normal((1, 16, 16, 256)), jnp.float32)
  (level,) = pyramid((FeatureMap(x, jnp.ones((1, 16, 16), bool), 4),))
  assert float(jnp.std(level.values_BHWC)) == pytest.approx(gain, rel=0.05)
