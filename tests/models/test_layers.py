"""Normalisation over valid positions, DropBlock, resizing."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.feature_map import valid_positions
from fpt_jax.models.layers import Norm, conv, drop_block, dropout, resize_nearest
from tests.runs import host_devices


def test_sync_bn_statistics_are_over_valid_positions(rng):
  x = rng.standard_normal((3, 6, 5, 4)).astype(np.float32)
  sizes = np.array([[6, 5], [2, 3], [4, 1]], np.int32)
  valid = np.asarray(valid_positions(jnp.asarray(sizes), 6, 5))
  norm = Norm("sync_bn", 4, rngs=nnx.Rngs(0))
  y = norm(jnp.asarray(np.where(valid[..., None], x, 99)), valid_BHW=jnp.asarray(valid), train=True)
  mean, var = x[valid].mean(0), x[valid].var(0)
  np.testing.assert_allclose(y[valid], (x[valid] - mean) / np.sqrt(var + 1e-5), atol=1e-4)
  np.testing.assert_allclose(norm.norm.mean[...], 0.1 * mean, atol=1e-5)
  np.testing.assert_allclose(norm.norm.var[...], 0.9 + 0.1 * var, atol=1e-4)
  # inference uses the running statistics and updates nothing
  y = norm(jnp.asarray(x), valid_BHW=jnp.asarray(valid))
  np.testing.assert_allclose(y, (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5), atol=1e-4)


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from fpt_jax.run import sharding
from fpt_jax.models.layers import Norm
from fpt_jax.models.state import arrays_of, skeleton

inputs = np.load(sys.argv[1])
mesh = sharding.mesh(batch_sizes=(8,))
batch = sharding.to_devices({k: inputs[k] for k in ("x", "valid", "weight")}, mesh)
results = {}
for kind in ("bn", "sync_bn"):
  build = lambda: Norm(kind, 2, rngs=nnx.Rngs(0))
  structure = skeleton(build)
  def total(x, arrays, valid, weight):
    norm = structure.fill(arrays)
    y = norm(x, valid_BHW=valid, train=True)
    return (y * weight).sum(), {"y": y} | arrays_of(norm)
  gradient, rest = jax.jit(jax.grad(total, has_aux=True))(
    batch["x"], arrays_of(build()), batch["valid"], batch["weight"]
  )
  results |= {f"{kind}_{name}": value for name, value in (rest | {"gradient": gradient}).items()}
np.savez(sys.argv[2], devices=jax.device_count(), **results)
"""


def float64_batch_norm(x, valid, groups):
  """Returns the output, and the mean and variance of the batch, for `groups` devices in order."""
  y = np.zeros_like(x)
  means, variances = [], []
  for part in np.split(np.arange(len(x)), groups):
    inside = x[part][valid[part]]
    means.append(inside.mean(0))
    variances.append(((inside - inside.mean(0)) ** 2).mean(0))
    y[part] = (x[part] - means[-1]) / np.sqrt(variances[-1] + 1e-5)
  return y, np.mean(means, 0), np.mean(variances, 0)


def test_bn_and_sync_bn_on_eight_devices(rng, tmp_path):
  """Unsynchronised statistics are those of one device, synchronised ones those of all devices."""
  x = (rng.standard_normal((8, 3, 4, 2)) + np.arange(8)[:, None, None, None]).astype(np.float32)
  valid = np.asarray(valid_positions(jnp.array([[3, 4], [2, 2]] * 4, jnp.int32), 3, 4))
  weight = rng.standard_normal(x.shape).astype(np.float32)
  np.savez(tmp_path / "in.npz", x=x, valid=valid, weight=weight)
  environment = os.environ | host_devices(8)
  command = [sys.executable, "-c", EIGHT_DEVICES, tmp_path / "in.npz", tmp_path / "out.npz"]
  subprocess.run(command, check=True, env=environment, cwd=pathlib.Path(__file__).parents[2])
  found = np.load(tmp_path / "out.npz")
  assert found["devices"] == 8
  x64, direction = x.astype(np.float64), rng.standard_normal(x.shape) * valid[..., None]
  for kind, groups in (("bn", 8), ("sync_bn", 1)):
    y, mean, var = float64_batch_norm(x64, valid, groups)
    np.testing.assert_allclose(found[f"{kind}_y"][valid], y[valid], atol=2e-5)
    np.testing.assert_allclose(found[f"{kind}_norm.mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(found[f"{kind}_norm.var"], 0.9 + 0.1 * var, rtol=1e-6)
    sides = [
      np.sum(float64_batch_norm(x64 + sign * 1e-6 * direction, valid, groups)[0] * weight)
      for sign in (1, -1)
    ]
    slope = np.sum(found[f"{kind}_gradient"] * direction)
    np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2e-6, rtol=1e-4)
  assert np.abs(found["bn_y"] - found["sync_bn_y"]).max() > 0.5


def test_group_norm_is_over_valid_positions(rng):
  x = rng.standard_normal((2, 5, 4, 8)).astype(np.float32)
  valid = np.asarray(valid_positions(jnp.array([[5, 4], [3, 2]], jnp.int32), 5, 4))
  y = Norm("group_norm", 8, rngs=nnx.Rngs(0))(jnp.asarray(x), valid_BHW=jnp.asarray(valid))
  group = x[1, :3, :2].reshape(3, 2, 2, 4)  # two groups of four channels
  mean, var = group.mean((0, 1, 3)), group.var((0, 1, 3))
  expected = (group - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
  np.testing.assert_allclose(y[1, :3, :2], expected.reshape(3, 2, 8), atol=1e-5)


def test_frozen_bn_has_nothing_to_train(rng):
  norm = Norm("frozen_bn", 4, rngs=nnx.Rngs(0))
  assert not nnx.state(norm, nnx.Param)
  x = jnp.asarray(rng.standard_normal((1, 2, 2, 4)), jnp.float32)
  np.testing.assert_allclose(norm(x, train=True), x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_unknown_norm_is_refused():
  with pytest.raises(ValueError, match="norm 'layer' does not exist; choose one of sync_bn"):
    Norm("layer", 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("stride", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_pointwise_convolution_is_a_convolution(stride, dtype, rng):
  layer = conv(3, 5, 1, stride=stride, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  x = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
  y = layer(jnp.asarray(x))
  assert y.dtype == dtype
  expected = x[:, ::stride, ::stride] @ np.asarray(layer.kernel[...])[0, 0]
  np.testing.assert_allclose(
    np.asarray(y, np.float32), expected, atol=1e-5 if y.itemsize == 4 else 0.03
  )


@pytest.mark.parametrize(("block", "keep"), [(3, 0.8), (5, 0.9)])
def test_drop_block_drops_squares_and_keeps_the_mean(block, keep):
  x = jnp.ones((4, 40, 36, 32))
  y = np.asarray(drop_block(x, jax.random.key(0), block_size=block, keep_probability=keep))
  dropped = y == 0
  # gamma does not account for overlaps, which leave slightly more
  assert keep - 0.02 < 1 - dropped.mean() < keep + 0.04
  np.testing.assert_allclose(y.mean(axis=(1, 2, 3)), 1, rtol=1e-5)
  # a dropped position lies in a square of dropped positions
  first = np.argwhere(dropped[0, :, :, 0])[0]
  rows, columns = first[0] + np.arange(block), first[1] - np.arange(block)
  square = [
    dropped[0, rows[:, None], (columns[::-1] + shift)[None], 0].all()
    for shift in range(block)
    if (columns + shift).min() >= 0 and (columns + shift).max() < 36
  ]
  assert any(square)


def test_drop_block_on_tiny_maps_and_padding():
  x = jnp.ones((2, 2, 3, 64))
  valid = valid_positions(jnp.array([[2, 3], [1, 1]], jnp.int32), 2, 3)
  y = np.asarray(
    drop_block(x, jax.random.key(1), block_size=5, keep_probability=0.7, valid_BHW=valid)
  )
  np.testing.assert_allclose(
    np.where(valid[..., None], y, 0).sum((1, 2, 3)), [6 * 64, 64], rtol=1e-5
  )
  assert (drop_block(x, jax.random.key(1), block_size=5, keep_probability=1.0) == x).all()


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (9, 11), (4, 3)])
def test_resize_nearest(size, rng):
  x = rng.standard_normal((1, 4, 3, 2)).astype(np.float32)
  rows = [i * 4 // size[0] for i in range(size[0])]
  columns = [j * 3 // size[1] for j in range(size[1])]
  np.testing.assert_array_equal(resize_nearest(jnp.asarray(x), *size), x[:, rows][:, :, columns])


@pytest.mark.parametrize("of", ["channels", "values"])
def test_dropout_drops_whole_channels_or_single_values(of):
  x = jnp.ones((2, 20, 30, 64))
  y = np.asarray(dropout(x, jax.random.key(0), 0.25, of=of))
  np.testing.assert_allclose(y[y > 0], 1 / 0.75, rtol=1e-6)
  kept = (y > 0).mean(axis=(1, 2))  # of each channel
  assert kept.mean() == pytest.approx(0.75, abs=0.1 if of == "channels" else 0.01)
  assert set(np.unique(kept)) == {0.0, 1.0} if of == "channels" else kept.std() < 0.05
  np.testing.assert_array_equal(dropout(x, None, 0.25, of=of), x)
