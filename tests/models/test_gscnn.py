"""GSCNN: its gate, shape stream and head against float64 NumPy, padding, and what its losses see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models, optim
from fpt_jax.configs import cityscapes
from fpt_jax.errors import UserError
from fpt_jax.models.backbones import wider_resnet
from fpt_jax.models.feature_map import FeatureMap, valid_positions
from fpt_jax.models.heads.gated_shape import EdgeAwareHead, GatedConv, ShapeStream
from fpt_jax.models.state import skeleton
from tests.models.backbones.test_hrnet import upsample
from tests.models.oracle import assert_equals_reference, batch_norm, random_arrays
from tests.models.test_pixel_contexts import conv_norm, linear
from tests.models.test_segmenter import batch_of, tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

STRIDES, CHANNELS = (1, 2, 4, 8), (4, 3, 2, 3)
SIZE, CANVAS = (9, 11), (16, 16)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
  """One block per stage, so that a network compiles in seconds."""
  monkeypatch.setattr(wider_resnet, "BLOCKS", (1,) * 6)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gate(a, name, s, r):
  y = batch_norm(np.concatenate([s, r], axis=-1), a, f"{name}norm")
  y = np.maximum(linear(a, f"{name}hidden", y), 0)
  alpha = sigmoid(conv_norm(a, f"{name}attend", y, relu=False))
  return linear(a, f"{name}out", s * (1 + alpha))


def test_the_gate(rng):
  structure = skeleton(lambda: GatedConv(4, norm="frozen_bn", rngs=nnx.Rngs(0)))
  x_HWC = rng.standard_normal((4, 5, 5)).astype(np.float32)

  def ours(arrays, x_HWC):
    s = FeatureMap(x_HWC[None, ..., :4], jnp.ones((1, 4, 5), bool), 1)
    return structure.fill(arrays)(s, x_HWC[None, ..., 4:], train=False).values_BHWC[0]

  def formula(a, x):
    return gate(a, "", x[..., :4], x[..., 4:])

  given = random_arrays(structure.shapes, rng)
  assert_equals_reference(ours, formula, given, x_HWC, True, rng, step=1e-7)


def enlarge(x_HWC, factor, size):
  return upsample(x_HWC[None], factor, size, "bilinear")[0]


def shape_stream(a, maps, canny):
  x, size = maps[0], maps[0].shape[:2]
  for i, (stride, coarse) in enumerate(zip(STRIDES[1:], maps[1:], strict=True)):
    y = conv_norm(a, f"blocks.{i}.conv2", conv_norm(a, f"blocks.{i}.conv1", x), relu=False)
    x = linear(a, f"narrow.{i}", np.maximum(x + y, 0))
    r = enlarge(linear(a, f"squeeze.{i}", coarse), stride, size)
    x = gate(a, f"gates.{i}.", x, r)
  logits = linear(a, "classify", x)
  both = np.concatenate([sigmoid(logits), canny[..., None]], axis=-1)
  return np.concatenate([logits, sigmoid(linear(a, "fuse", both))], axis=-1)


def levels(rng, size, canvas):
  """One map per stride with other values on the padding."""
  valid = np.asarray(valid_positions(jnp.array([size]), *canvas))
  maps = []
  for stride, channels in zip(STRIDES, CHANNELS, strict=True):
    seen = valid[:, ::stride, ::stride]
    values = np.where(seen[..., None], rng.standard_normal((*seen.shape, channels)), 7)
    maps.append(FeatureMap(values.astype(np.float32), seen, stride))
  return maps


def cropped(x: FeatureMap):
  rows, columns = (-(-n // x.stride) for n in SIZE)
  return np.asarray(x.values_BHWC, np.float64)[0, :rows, :columns]


def test_the_shape_stream_and_its_padding(rng):
  structure = skeleton(lambda: ShapeStream(CHANNELS, norm="frozen_bn", rngs=nnx.Rngs(0)))
  maps = levels(rng, SIZE, CANVAS)
  canny = rng.random((1, *CANVAS)) < 0.3
  full = jnp.asarray(maps[0].values_BHWC)

  def run(arrays, x_HWC):
    first = maps[0].with_values(full.at[0, : SIZE[0], : SIZE[1]].set(x_HWC))
    found = structure.fill(arrays)((first, *maps[1:]), jnp.asarray(canny), train=False)
    return jnp.concatenate([x.values_BHWC[0, : SIZE[0], : SIZE[1]] for x in found], axis=-1)

  others = [cropped(x) for x in maps[1:]]

  def formula(a, x):
    return shape_stream(a, [x, *others], canny[0, : SIZE[0], : SIZE[1]].astype(float))

  given = random_arrays(structure.shapes, rng)
  x_HWC = cropped(maps[0]).astype(np.float32)
  assert_equals_reference(run, formula, given, x_HWC, True, rng, step=1e-7)


def test_the_head_and_its_padding(rng):
  full, fine, _, coarse = levels(rng, SIZE, CANVAS)
  edges = full.with_values(rng.random((1, *CANVAS, 1)).astype(np.float32))
  common = dict(hidden=4, output_stride=8, num_classes=3, dropout=0.0, norm="frozen_bn")

  def build():
    return EdgeAwareHead(CHANNELS[1], CHANNELS[3], **common, rngs=nnx.Rngs(0))

  structure = skeleton(build)
  arrays = random_arrays(structure.shapes, rng)

  @jax.jit
  def run(arrays, fine, coarse, edges):
    return structure.fill(arrays)(fine, coarse, edges, key=None)

  found = run(arrays, fine, coarse, edges)
  a = {n: np.asarray(v, np.float64) for n, v in arrays.items()}
  x, detail, edge = cropped(coarse), cropped(fine), cropped(edges)[::8, ::8]
  mean = np.broadcast_to(x.mean(axis=(0, 1)), x.shape)
  branches = [
    conv_norm(a, f"parallel.branches.{i}", x, dilation=rate)
    for i, rate in enumerate((1, 12, 24, 36))
  ]
  first = [conv_norm(a, "image", mean), conv_norm(a, "edge", edge)]
  y = linear(a, "project", np.concatenate([*first, *branches], axis=-1))
  parts = [linear(a, "fine", detail), enlarge(y, 4, detail.shape[:2])]
  y = np.concatenate(parts, axis=-1)
  for i in range(2):
    y = conv_norm(a, f"smooth.{i}", y)
  want = linear(a, "classify", y)
  assert found.stride == 2
  np.testing.assert_allclose(cropped(found), want, atol=2e-5 * np.abs(want).max())


def test_losses(rng):
  config = tiny("head=gscnn", model__edges__threshold=0.0)  # every pixel is on a predicted edge
  structure = models.structure_of(config)
  arrays = random_arrays(structure.shapes, rng)
  batch = batch_of(rng, (30, 27), (32, 32), config.model.num_classes)
  blocks = batch["label_BHW"][:, ::10, ::10].repeat(10, axis=1).repeat(10, axis=2)[:, :32, :32]
  batch["label_BHW"] = jnp.where(batch["label_BHW"] < 7, blocks, 255)

  @jax.jit
  def gradients(arrays, batch):
    def total(arrays):
      losses = structure.fill(arrays).losses(batch, jax.random.key(0))
      return sum(losses.values()), losses

    return jax.grad(total, has_aux=True)(arrays)

  slopes, losses = gradients(arrays, batch)
  assert set(losses) == {"loss_seg", "loss_edge", "loss_seg_edge", "loss_gradient"}
  assert losses["loss_edge"] > 0 and losses["loss_gradient"] > 0
  np.testing.assert_allclose(losses["loss_seg_edge"], losses["loss_seg"], rtol=1e-6)
  parameters = optim.trainable(config, structure.parameters())
  flat = [n for n in parameters if not np.any(slopes[n]) and not n.endswith("bias")]
  assert not flat and all(np.isfinite(slopes[n]).all() for n in parameters)

  # what lies on the padding of the images is seen by nothing, not even by Canny
  inside = np.asarray(valid_positions(batch["size_B2"], 32, 32))[..., None]
  changed = jnp.where(inside, batch["image_BHWC"], 200.0)
  again = gradients(arrays, batch | {"image_BHWC": changed})[1]
  assert again == losses


def test_bfloat16_has_losses_in_float32():
  config = tiny("head=gscnn", model__dtype="bfloat16")
  batch = batch_of(np.random.default_rng(0), (16, 16), (16, 16), 7)

  def run():
    model = models.build(config, nnx.Rngs(0))
    stages = model.backbone_levels(batch["image_BHWC"], batch["size_B2"])
    return model.losses(batch, jax.random.key(0)), model.maps(batch["image_BHWC"], stages)

  losses, maps = nnx.eval_shape(run)
  assert {loss.dtype for loss in losses.values()} == {jnp.dtype("float32")}
  assert {x.values_BHWC.dtype for x in maps} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  ("arg", "fields", "message"),
  [
    ("", {"head.name": "gscnn"}, "head 'gscnn' is on the stages of the backbone; set pyramid.name"),
    ("head=gscnn", {"auxiliary.weight": 0.4}, "head 'gscnn' has no auxiliary loss; set auxiliary"),
    (
      "head=gscnn",
      {"backbone.name": "resnet50"},
      "head 'gscnn' needs the stages of the backbone 'wider_resnet38', got 'resnet50'",
    ),
    ("head=gscnn", {"head.dropout_of": "rows"}, "dropout_of 'rows' does not exist"),
  ],
)
def test_parts_that_do_not_fit_are_refused(arg, fields, message):
  config = cityscapes.get_config(arg)
  config.update_from_flattened_dict({f"model.{name}": value for name, value in fields.items()})
  with pytest.raises(UserError, match=message):
    models.structure_of(config)
