"""WiderResNet-38: its blocks against float64 NumPy, its levels, and its dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.backbones import wider_resnet
from fpt_jax.models.backbones.wider_resnet import PreActivationBlock, WiderResNet
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.state import skeleton
from tests.models.oracle import assert_equals_reference, batch_norm, convolve, random_arrays

BLOCKS = {
  "plain": (4, (4, 4), 1, 2),
  "wider": (3, (4, 5), 2, 1),
  "bottleneck": (3, (2, 4, 5), 1, 2),
}


def reference(a, x, stride, dilation):
  y = shortcut = x
  kernels = [a[f"convs.{i}.kernel"] for i in range(3) if f"convs.{i}.kernel" in a]
  for i, kernel in enumerate(kernels):
    y = np.maximum(batch_norm(y, a, f"norms.{i}"), 0)
    if i == 0 and "shortcut.kernel" in a:
      shortcut = convolve(y, a["shortcut.kernel"], stride=stride)
    step = stride if i == 0 else 1
    y = convolve(y, kernel, stride=step, dilation=dilation if len(kernel) == 3 else 1)
  return y + shortcut


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_equals_its_formula(kind, rng):
  in_channels, widths, stride, dilation = BLOCKS[kind]

  def build():
    options = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
    common = dict(stride=stride, dilation=dilation, dropout=0.3, norm="frozen_bn", options=options)
    return PreActivationBlock(in_channels, widths, **common)

  structure = skeleton(build)
  assert ("shortcut.kernel" in structure.shapes) == (kind != "plain")
  x_BHWC = rng.standard_normal((1, 5, 6, in_channels)).astype(np.float32)

  def ours(arrays, x_BHWC):
    x = FeatureMap(x_BHWC, jnp.ones(x_BHWC.shape[:3], bool), 4)
    y = structure.fill(arrays)(x, train=False)
    assert y.stride == 4 * stride
    return y.values_BHWC

  formula = functools.partial(reference, stride=stride, dilation=dilation)
  given = random_arrays(structure.shapes, rng)
  assert_equals_reference(ours, formula, given, x_BHWC, True, rng, step=1e-7)


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_levels(output_stride):
  def run():
    model = WiderResNet("wider_resnet38", output_stride=output_stride, rngs=nnx.Rngs(0))
    image_BHWC, valid_BHW = jnp.ones((1, 33, 65, 3)), jnp.ones((1, 33, 65), bool)
    return model(image_BHWC, valid_BHW), model.every_stage(image_BHWC, valid_BHW)

  levels, stages = jax.eval_shape(run)
  for maps, strides, channels in (
    (levels, (4, 8, 16, 32), (256, 512, 1024, 4096)),
    (stages, (1, 2, 4, 8, 16, 32, 32), (64, 128, 256, 512, 1024, 2048, 4096)),
  ):
    strides = [min(s, output_stride) for s in strides]
    assert [x.stride for x in maps] == strides
    sizes = [(-(-33 // s), -(-65 // s)) for s in strides]
    found = [x.values_BHWC.shape for x in maps]
    assert found == [(1, *size, c) for size, c in zip(sizes, channels, strict=True)]


@pytest.mark.parametrize(
  ("frozen", "train", "key", "draws"),
  [(False, True, 0, 2), (False, True, None, 0), (False, False, 0, 0), (True, True, 0, 0)],
)
def test_dropout_is_in_training_with_a_key_alone(frozen, train, key, draws, monkeypatch):
  """The two stages with dropout have one block each."""
  monkeypatch.setattr(wider_resnet, "BLOCKS", (1,) * 6)
  structure = skeleton(
    lambda: WiderResNet("wider_resnet38", width=2, frozen=frozen, rngs=nnx.Rngs(0))
  )

  def run(arrays):
    stages = structure.fill(arrays).every_stage(
      jnp.ones((1, 16, 16, 3)),
      jnp.ones((1, 16, 16), bool),
      train=train,
      key=None if key is None else jax.random.key(key),
    )
    return [x.values_BHWC for x in stages]

  assert str(jax.make_jaxpr(run)(structure.shapes)).count("random_bits[") == draws


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(name="wider_resnet20"), "backbone 'wider_resnet20' does not exist; choose one of wider"),
    (dict(output_stride=4), "output_stride 4 does not exist; choose one of 32, 16, 8"),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    WiderResNet(**(dict(name="wider_resnet38") | options), rngs=nnx.Rngs(0))
