"""HRNet: a module against float64 NumPy, its levels, and its representation at one stride."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.backbones import hrnet
from fpt_jax.models.backbones.hrnet import HRModule, HRNet, representation
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.state import skeleton
from tests.models.oracle import assert_equals_reference, batch_norm, convolve, random_arrays

CHANNELS, SIZES = (2, 3, 4), ((7, 6), (4, 3), (2, 2))


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
  """One block of each kind, so that a network compiles in seconds."""
  monkeypatch.setattr(hrnet, "BLOCKS", 1)
  monkeypatch.setattr(hrnet, "MODULES", (1, 1, 1))


def upsample(x_BhwC, factor, size, upsampling):
  """Fine position p is in coarse position p // factor, or at (p + 0.5) / factor - 0.5 between two."""

  def weights(length, coarse):
    p = np.arange(length)
    at = p // factor if upsampling == "nearest" else (p + 0.5) / factor - 0.5
    at = np.clip(at, 0, coarse - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse)))

  rows, columns = (weights(n, c) for n, c in zip(size, x_BhwC.shape[1:3], strict=True))
  return np.einsum("Hh,bhwc,Ww->bHWc", rows, x_BhwC, columns)


def reference(a, maps, upsampling):
  def layer(x, name, stride=1):
    kernel = a[f"{name}.conv.kernel"]
    return batch_norm(convolve(x, kernel, stride=stride), a, f"{name}.norm")

  def relu(x):
    return np.maximum(x, 0)

  done = []
  for i, x in enumerate(maps):
    block = f"branches.{i}.0"
    y = relu(batch_norm(convolve(x, a[f"{block}.conv1.kernel"]), a, f"{block}.bn1"))
    y = batch_norm(convolve(y, a[f"{block}.conv2.kernel"]), a, f"{block}.bn2")
    done.append(relu(x + y))
  fused = []
  for i, x in enumerate(done):
    total = x
    for j, y in enumerate(done):
      name = f"fuse.{i}.from_{j}"
      if j > i:
        total = total + upsample(layer(y, f"{name}.0"), 2 ** (j - i), x.shape[1:3], upsampling)
      if j < i:
        for k in range(i - j):
          y = layer(y, f"{name}.{k}", stride=2)
          y = relu(y) if k < i - j - 1 else y
        total = total + y
    fused.append(relu(total))
  return np.concatenate([y.reshape(1, -1) for y in fused], axis=1)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_a_module_equals_its_formula(upsampling, rng):

  def build():
    options = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
    return HRModule(CHANNELS, upsampling=upsampling, norm="frozen_bn", options=options)

  structure = skeleton(build)
  inputs = [
    rng.standard_normal((1, *size, c)).astype(np.float32)
    for size, c in zip(SIZES, CHANNELS, strict=True)
  ]
  given = random_arrays(structure.shapes, rng)
  others = {f"input.{i}": jnp.asarray(inputs[i]) for i in (1, 2)}

  def ours(arrays, x):
    maps = [
      FeatureMap(y, jnp.ones(y.shape[:3], bool), 4 * 2**i)
      for i, y in enumerate((x, arrays["input.1"], arrays["input.2"]))
    ]
    module = structure.fill({n: arrays[n] for n in structure.shapes})
    outputs = module(maps, lambda layer, x: layer(x, train=False))
    assert [y.stride for y in outputs] == [4, 8, 16]
    return jnp.concatenate([y.values_BHWC.reshape(1, -1) for y in outputs], axis=1)

  assert_equals_reference(
    ours,
    lambda a, x: reference(a, (x, a["input.1"], a["input.2"]), upsampling),
    given | others,
    inputs[0],
    np.ones((1, 1), bool),
    rng,
  )


@pytest.mark.parametrize("output_stride", [32, 16, 8, 4])
def test_levels(output_stride):
  channels = (12, 24, 48, 96 if output_stride == 32 else 180)

  def forward(image, valid):
    model = HRNet(
      "hrnet_w48", width=16, output_stride=output_stride, norm="sync_bn", rngs=nnx.Rngs(0)
    )
    assert model.channels == channels
    return model(image, valid, train=True)

  levels = jax.eval_shape(forward, jnp.zeros((2, 45, 70, 3)), jnp.ones((2, 45, 70), bool))
  for level, stride, count in zip(levels, (4, 8, 16, output_stride), channels, strict=True):
    assert level.stride == stride and level.channels == count
    assert level.size == level.valid_BHW.shape[1:] == (-(-45 // stride), -(-70 // stride))


def test_the_representation_at_a_stride(rng):
  """Finer maps are averaged over 3 x 3 positions of the image, coarser ones are interpolated."""
  maps = [
    FeatureMap(rng.standard_normal((1, *size, 2)).astype(np.float32), np.ones((1, *size), bool), s)
    for size, s in zip(SIZES, (4, 8, 16), strict=True)
  ]
  fine, same, coarse = (np.asarray(x.values_BHWC, np.float64) for x in maps)
  averaged = np.array(
    [
      [fine[0, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean(axis=(0, 1)) for c in (0, 2, 4)]
      for r in (0, 2, 4, 6)
    ]
  )
  want = np.concatenate([averaged[None], same, upsample(coarse, 2, (4, 3), "bilinear")], axis=-1)
  found = representation(maps, 8)
  assert found.stride == 8
  np.testing.assert_allclose(found.values_BHWC, want, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(name="hrnet_w30"), "backbone 'hrnet_w30' does not exist; choose one of hrnet_w48"),
    (dict(width=6), "backbone.width=6 must be a multiple of 4"),
    (
      dict(upsampling="cubic"),
      "upsampling 'cubic' does not exist; choose one of nearest, bilinear",
    ),
    (dict(output_stride=2), "output_stride 2 does not exist; choose one of 32, 16, 8, 4"),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    HRNet(**(dict(name="hrnet_w48") | options), rngs=nnx.Rngs(0))
