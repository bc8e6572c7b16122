"""Non-local, global context and attention-augmented blocks against their formulas, and their position."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fpt_jax import models, optim
from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.models.backbones import context_blocks
from fpt_jax.models.backbones.context_blocks import (
  HEADS,
  AttentionAugmentedConv,
  GlobalContext,
  NonLocal,
  average_pool,
  of_distance,
)
from fpt_jax.models.backbones.resnet import ResNet
from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.state import initial_arrays, skeleton
from fpt_jax.ops.resize import upsample_bilinear
from fpt_jax.train_step import make_train_step, training_state
from tests.models.oracle import assert_equals_reference, convolve, random_arrays, randomised

SIZES = np.array([[7, 5], [4, 3]], np.int32)  # of two images on a canvas of 7 x 5


def batch(rng, channels, sizes=SIZES):
  height, width = sizes.max(axis=0)
  valid = np.asarray(valid_positions(jnp.asarray(sizes), height, width))
  x = rng.standard_normal((len(sizes), height, width, channels)).astype(np.float32)
  return np.where(valid[..., None], x, 0), valid


def softmax(scores):
  e = np.exp(scores - scores.max())
  return e / e.sum()


# Each block: a constructor, a call (block, x, valid), and the formula.


def call_non_local(block, x, valid):
  return block(FeatureMap(x, valid, 16), train=False).values_BHWC


def non_local(a, x, valid):
  """Wang et al. 2018, eq. 1 and 6, embedded Gaussian."""
  theta, phi, g = (x @ a[f"{n}.kernel"][0, 0] + a[f"{n}.bias"] for n in ("theta", "phi", "g"))
  z = x.copy()
  for b, r, c in np.ndindex(x.shape[:3]):
    weights = softmax(phi[b][valid[b]] @ theta[b, r, c] / np.sqrt(theta.shape[-1]))
    z[b, r, c] += weights @ g[b][valid[b]] @ a["project.kernel"][0, 0] + a["project.bias"]
  return z


def call_global_context(block, x, valid):
  return block(x, valid_BHW=valid)


def global_context(a, x, valid):
  """Cao et al. 2019, eq. of fig. 4d."""
  z = x.copy()
  for b in range(len(x)):
    inside = x[b][valid[b]]
    context = softmax((inside @ a["key.kernel"])[:, 0]) @ inside
    hidden = context @ a["squeeze.kernel"] + a["squeeze.bias"]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    hidden = np.maximum(hidden * a["norm.scale"] + a["norm.bias"], 0)
    z[b] += hidden @ a["expand.kernel"] + a["expand.bias"]
  return z


def pool(x, valid):
  B, H, W, C = x.shape
  y = np.zeros((B, -(-H // 2), -(-W // 2), C))
  for b, r, c in np.ndindex(y.shape[:3]):
    window = (b, slice(max(0, 2 * r - 1), 2 * r + 2), slice(max(0, 2 * c - 1), 2 * c + 2))
    if valid[window].any():
      y[b, r, c] = x[window][valid[window]].mean(0)
  return y, valid[:, ::2, ::2]


def enlarge(x, valid, size):
  y = np.zeros((len(x), *size, x.shape[-1]))
  for b, r, c in np.ndindex(y.shape[:3]):
    rows, columns = {r // 2, -(-r // 2)}, {c // 2, -(-c // 2)}
    near = [
      x[b, i, j]
      for i, j in itertools.product(rows, columns)
      if i < x.shape[1] and j < x.shape[2] and valid[b, i, j]
    ]
    y[b, r, c] = np.mean(near, axis=0) if near else 0
  return y


def augmented(a, x, valid, *, stride, downsample):
  """Bello et al. 2019, eq. 1 to 5."""
  convolved = convolve(x, a["conv.kernel"], stride=stride)
  for _ in range((stride == 2) + downsample):
    x, valid = pool(x, valid)
  keys = 160
  qkv = x @ a["context.qkv.kernel"][0, 0]
  q, k, v = qkv[..., :keys], qkv[..., keys : 2 * keys], qkv[..., 2 * keys :]
  q, k, v = (y.reshape(*x.shape[:3], HEADS, -1) for y in (q, k, v))
  out = np.zeros_like(v)
  limit = context_blocks.MAX_DISTANCE
  for b, r, c in np.ndindex(x.shape[:3]):
    if not valid[b].any():
      continue
    at = np.argwhere(valid[b])
    rows = np.clip(at[:, 0] - r, -limit, limit) + limit
    columns = np.clip(at[:, 1] - c, -limit, limit) + limit
    for n in range(HEADS):
      key = k[b][valid[b]][:, n] + a["context.rows"][rows] + a["context.columns"][columns]
      weights = softmax(key @ q[b, r, c, n] / np.sqrt(20))
      out[b, r, c, n] = weights @ v[b][valid[b]][:, n]
  out = out.reshape(*x.shape[:3], -1) @ a["context.project.kernel"][0, 0]
  if downsample:
    out = enlarge(out, valid, convolved.shape[1:3])
  return np.concatenate([convolved, out], axis=-1)


def assert_block(block, call, formula, rng, channels, stride=1):
  structure = skeleton(lambda: block)
  x, valid = batch(rng, channels)
  assert_equals_reference(
    lambda a, x: call(structure.fill(a), x, jnp.asarray(valid)),
    lambda a, x: formula(a, x, valid),
    randomised(block, rng),
    x,
    valid[:, ::stride, ::stride, None],
    rng,
  )


def test_non_local_equals_its_formula(rng):
  block = NonLocal(6, norm="none", rngs=nnx.Rngs(0))
  assert_block(block, call_non_local, non_local, rng, 6)


def test_global_context_equals_its_formula(rng):
  block = GlobalContext(12, ratio=3, rngs=nnx.Rngs(0))
  assert_block(block, call_global_context, global_context, rng, 12)


@pytest.mark.parametrize(
  ("stride", "downsample", "distance"),
  [(1, False, 63), (2, False, 63), (1, True, 63), (2, True, 1), (1, False, 2)],
)
def test_attention_augmented_equals_its_formula(stride, downsample, distance, rng, monkeypatch):
  monkeypatch.setattr(context_blocks, "MAX_DISTANCE", distance)
  block = AttentionAugmentedConv(3, 18, stride=stride, downsample=downsample, rngs=nnx.Rngs(0))
  assert block.value_channels == 8

  def formula(a, x, valid):
    return augmented(a, x, valid, stride=stride, downsample=downsample)

  assert_block(block, call_global_context, formula, rng, 3, stride)


def test_distances_beyond_the_table_count_as_its_last():
  table = jnp.arange(127.0)[:, None]
  near = np.asarray(of_distance(table, 64))[..., 0]
  assert near[0, 63] == 126 and near[63, 0] == 0 and (np.diag(near) == 63).all()
  far = np.asarray(of_distance(table, 100))[..., 0]
  assert far[0, 99] == 126 and far[99, 0] == 0 and far[10, 20] == 73


def test_pooling_and_interpolation_by_hand():
  x = FeatureMap(jnp.arange(1.0, 6)[None, :, None, None], jnp.ones((1, 5, 1), bool), 4)
  pooled = average_pool(x)
  np.testing.assert_allclose(pooled.values_BHWC[0, :, 0, 0], [1.5, 3, 4.5])
  assert pooled.stride == 8
  doubled = upsample_bilinear(pooled.values_BHWC, pooled.valid_BHW, 2, 6, 1, align_corners=True)
  np.testing.assert_allclose(doubled[0, :, 0, 0], [1.5, 2.25, 3, 3.75, 4.5, 4.5])


BLOCKS = {
  "non_local": (lambda **o: NonLocal(8, norm="none", **o), call_non_local),
  "global_context": (lambda **o: GlobalContext(8, ratio=2, **o), call_global_context),
  "strided": (lambda **o: AttentionAugmentedConv(8, 16, stride=2, **o), call_global_context),
  "coarser": (
    lambda **o: AttentionAugmentedConv(8, 16, stride=2, downsample=True, **o),
    call_global_context,
  ),
}


@pytest.mark.parametrize("name", ["non_local", "global_context", "strided", "coarser"])
def test_padding_changes_nothing(name, rng):
  """Alone, or on a larger canvas, for odd and tiny images."""
  build, call = BLOCKS[name]
  block = build(rngs=nnx.Rngs(0))
  structure, arrays = skeleton(lambda: block), randomised(block, rng)
  run = jax.jit(lambda x, valid: call(structure.fill(arrays), x, valid))
  augments = isinstance(block, AttentionAugmentedConv)
  for height, width in ((5, 7), (1, 1)):
    x = rng.standard_normal((1, height, width, 8)).astype(np.float32)
    alone = run(x, np.ones((1, height, width), bool))
    valid = np.asarray(valid_positions(jnp.array([[height, width]]), 8, 10))
    canvas = np.where(
      valid[..., None], np.pad(x, ((0, 0), (0, 8 - height), (0, 10 - width), (0, 0))), 0
    )
    _, h, w, _ = alone.shape
    if augments:  # its convolution reads the padding
      np.testing.assert_allclose(run(canvas, valid)[:, :h, :w], alone, atol=1e-5)
    junk = run(np.where(valid[..., None], canvas, np.nan).astype(np.float32), valid)
    channels = slice(-8, None) if augments else slice(None)
    np.testing.assert_allclose(junk[:, :h, :w, channels], alone[..., channels], atol=1e-5)


@pytest.mark.parametrize("name", ["non_local", "global_context", "coarser"])
def test_bfloat16(name, rng):
  build, call = BLOCKS[name]
  block, half = build(rngs=nnx.Rngs(0)), build(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  arrays = randomised(block, rng)
  x, valid = batch(rng, 8)

  def run(block, x):
    structure = skeleton(lambda: block)
    return jax.jit(lambda x: call(structure.fill(arrays), x, jnp.asarray(valid)))(x)

  full, y = run(block, x), run(half, jnp.asarray(x, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert np.abs(np.asarray(y, np.float32) - full).max() < 0.05 * np.abs(full).max()


# In the ResNet.


def count(shapes):
  return sum(
    math.prod(s.shape) for n, s in shapes.items() if not n.endswith(("norm.mean", "norm.var"))
  )


def parameters(name, context, **options):
  return count(skeleton(lambda: ResNet(name, context=context, **options, rngs=nnx.Rngs(0))).shapes)


def test_parameters_counted_by_hand():
  plain = parameters("resnet50", "none")
  assert plain == 23_508_032
  # three 1x1 convolutions to half the channels of C4 and one back, biases included
  non_local = 4 * 1024 * 512 + 3 * 512 + 1024
  assert parameters("resnet50", "non_local") == plain + non_local
  assert parameters("resnet50", "non_local", norm="sync_bn") == plain + non_local + 2 * 1024
  blocks = ((4, 512), (6, 1024), (3, 2048))
  context = sum(n * (c + 2 * c * (c // 16) + 3 * (c // 16) + c) for n, c in blocks)
  assert parameters("resnet50", "global_context") == plain + context
  # width, channels of all values: a tenth, to a multiple of eight
  augmented = {128: (4, 16), 256: (6, 24), 512: (3, 48)}
  more = sum(
    n * (w * (2 * 160 + v) + v * v + 2 * 127 * 20 - 9 * w * v) for w, (n, v) in augmented.items()
  )
  assert parameters("resnet50", "attention_augmented") == plain + more
  # the basic blocks' second convolution
  more -= 4 * (128 * 320 + 128 * 16 + 256 + 5080 - 9 * 128 * 16)
  assert parameters("resnet18", "attention_augmented") > parameters("resnet18", "none")


def test_parameters_of_the_attention_paper():
  """Bello et al. 2019, table 2: 25.8M and 45.4M with the classifier."""
  for name, millions in (("resnet50", 25.8), ("resnet101", 45.4)):
    total = parameters(name, "attention_augmented", classes=1000)
    assert abs(total / 1e6 - millions) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "context", "first_changed"),
  [
    ("resnet50", "non_local", 2),
    ("resnet50", "global_context", 1),
    ("resnet50", "attention_augmented", 1),
    ("resnet18", "global_context", 1),
  ],
)
def test_place_in_the_resnet(name, context, first_changed, rng):
  """Nothing changes before its stage; non-local and global context start as the identity."""
  image = rng.standard_normal((1, 49, 67, 3)).astype(np.float32)
  options = dict(width=8 if name == "resnet18" else 16)

  def build(context):
    return ResNet(name, context=context, **options, rngs=nnx.Rngs(0))

  plain, structure = skeleton(lambda: build("none")), skeleton(lambda: build(context))

  @jax.jit
  def levels_of(arrays, moved):
    inside = {n: a + moved for n, a in arrays.items() if "context." in n}
    model = structure.fill(arrays | inside)
    return [level.values_BHWC for level in model(image, jnp.ones(image.shape[:3], bool))]

  @jax.jit
  def plain_levels(arrays):
    model = plain.fill({n: arrays[n] for n in plain.variables})
    return [level.values_BHWC for level in model(image, jnp.ones(image.shape[:3], bool))]

  arrays = initial_arrays(lambda: build(context))
  inside = [n for n in arrays if "context." in n]
  stages = {n.split(".")[1] for n in inside if n.startswith("stages.")}
  assert stages == (set() if context == "non_local" else {"1", "2", "3"})
  started, moved = levels_of(arrays, 0.0), levels_of(arrays, 0.3)
  if context != "attention_augmented":
    for a, b in zip(started, plain_levels(arrays), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  for i, (a, b) in enumerate(zip(moved, started, strict=True)):
    changed = float(np.abs(a - b).max()) > 1e-3 * float(np.abs(b).max())
    assert a.shape == b.shape and changed == (i >= first_changed), i


@pytest.mark.parametrize("norm", ["frozen_bn", "sync_bn", "group_norm"])
def test_non_local_can_learn_with_every_norm(norm, rng):
  """A block without any gradient would remain the identity."""
  block = NonLocal(32, norm=norm, rngs=nnx.Rngs(0))
  x, valid = batch(rng, 32)

  def loss(block):
    y = block(FeatureMap(x, valid, 16), train=True).values_BHWC
    return jnp.sum(jnp.where(valid[..., None], y, 0) ** 2)

  y, gradients = jax.jit(lambda block: (loss(block), nnx.grad(loss)(block)))(block)
  np.testing.assert_allclose(y, np.sum(x.astype(np.float64) ** 2), rtol=1e-5)  # the identity
  assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(nnx.state(gradients, nnx.Param)))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
  ("suffix", "norm", "last"),
  [
    ("nl", "frozen_bn", ("project.kernel", "project.bias")),
    ("nl", "sync_bn", ("norm.norm.scale", "norm.norm.bias")),
    ("gc", "frozen_bn", ("expand.kernel", "expand.bias")),
    ("aa", "frozen_bn", ()),
  ],
)
def test_a_frozen_backbone_trains_its_context_blocks(suffix, norm, last, rng):
  """A block that starts as the identity moves its last layer first; the pretrained arrays never move."""
  config = cityscapes.get_config(f"demo,pyramid=none,fpt=none,backbone=resnet18_{suffix}")
  config.model.auxiliary.weight = 0.0
  config.model.backbone.update(dict(width=16, norm=norm, frozen=True))
  config.optim.update(dict(weight_decay=0.0, warmup_steps=0))
  structure = models.structure_of(config)
  arrays = random_arrays(structure.shapes, rng)
  arrays |= {n: jnp.zeros_like(arrays[n]) for n in arrays if ".context." in n and n.endswith(last)}
  names = optim.trainable(config, structure.parameters())
  inside = {n for n in names if n.startswith("backbone.")}
  assert inside and all(".context." in n for n in inside)
  assert not any(".context." in n for n in structure.parameters() - names)

  optimizer = optim.optimizer(config)
  trained = {n: arrays[n] for n in names}
  state = training_state(arrays, names, optimizer.init(trained))
  rest = state["rest"]
  step, key = jax.jit(make_train_step(structure, optimizer, total_steps=2)), jax.random.key(0)
  batch = {
    "image_BHWC": rng.integers(0, 256, (2, 64, 64, 3)).astype(np.float32),
    "label_BHW": rng.integers(0, config.model.num_classes, (2, 64, 64)).astype(np.int32),
    "size_B2": np.array([[64, 64], [64, 51]], np.int32),
  }

  def with_gradient():
    momentum = optax.tree_utils.tree_get(state["optimizer"], "trace")
    assert all(np.isfinite(momentum[n]).all() for n in names)
    return {n for n in inside if momentum[n].any()}

  state, _, _ = step(state, batch, 0, key, False)
  assert with_gradient() == {n for n in inside if not last or n.endswith(last)}
  state, _, _ = step(state, batch, 1, key, False)
  # a softmax does not depend on the bias of its keys
  assert inside - {"backbone.context.phi.bias"} <= with_gradient()
  for n in inside:
    moved = (state["trained"][n] != arrays[n]).any()
    assert moved or not n.endswith(last or "project.kernel"), n
  changed = {n for n in rest if (state["rest"][n] != arrays[n]).any()}
  statistics = {f"backbone.context.norm.norm.{n}" for n in ("mean", "var")}
  assert {n for n in changed if n.startswith("backbone.")} == (
    statistics if norm == "sync_bn" else set()
  )


def test_errors():
  with pytest.raises(ValueError, match="context 'cbam' does not exist; choose one of none, non_lo"):
    ResNet("resnet18", context="cbam", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="needs more than 8 channels, got 8; set a larger backbone"):
    AttentionAugmentedConv(8, 8, rngs=nnx.Rngs(0))
  config = coco_mask.get_config("demo,backbone=efficientnet_lite0")
  config.model.backbone.context = "non_local"
  with pytest.raises(
    ValueError, match="backbone 'efficientnet_lite0' has no context blocks; set context="
  ):
    models.build(config, nnx.Rngs(0))
