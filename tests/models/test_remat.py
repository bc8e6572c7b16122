"""Rematerialisation changes what is kept for the backward pass, and no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import camvid, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.backbones.resnet import BasicBlock, Context
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.remat import PARTS, POLICIES, policy_of, recomputed
from fpt_jax.models.state import arrays_of, initial_arrays, skeleton
from fpt_jax.tasks.task import check_config, task_of
from tests.runs import tiny_config, tiny_segmentation_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

RECOMPUTING = [policy for policy in POLICIES if policy != "none"]


def differentiated(structure, total, trained):
  """Returns the function (arrays, *inputs) -> (gradients, loss, other arrays), as in a training step."""

  def run(arrays, *inputs):
    rest = {n: a for n, a in arrays.items() if n not in trained}

    def of_trained(arrays):
      model = structure.fill(arrays | rest)
      loss = total(model, *inputs)
      updated = arrays_of(model)
      return loss, (loss, {n: updated[n] for n in rest})

    gradients, (loss, rest) = jax.grad(of_trained, has_aux=True)({n: arrays[n] for n in trained})
    return gradients, loss, rest

  return run


def assert_same(found, expected):
  for ours, theirs in zip(found, expected, strict=True):
    # gradients of a bias before a normalisation are rounding alone
    least = 1e-2 * max(np.abs(array).max() for array in jax.tree.leaves(theirs))
    for name, array in jax.tree_util.tree_leaves_with_path(theirs):
      scale = max(np.abs(array).max(), least)
      ours_at = dict(jax.tree_util.tree_leaves_with_path(ours))[name]
      np.testing.assert_allclose(ours_at / scale, array / scale, atol=5e-5, err_msg=str(name))


def test_transformers_and_residual_blocks_give_the_same(rng):
  """A residual block and FPT on two levels, with statistics of the batch and DropBlock."""

  class Network(nnx.Module):
    def __init__(self, remat):
      options = dict(rngs=nnx.Rngs(0))
      common = dict(stride=2, dilations=(1, 1), context=Context("none", False), norm="sync_bn")
      self.block = BasicBlock(8, 8, options=options, **common)
      self.fpt = FeaturePyramidTransformer(
        (8, 8), channels=8, drop_block_size=2, remat=remat, **options
      )
      self.remat = remat

    def __call__(self, x_BHWC, valid_BHW, key):
      fine = FeatureMap(x_BHWC, valid_BHW, 1)
      coarse = recomputed(lambda block, x: block(x, train=True), self.remat)(self.block, fine)
      levels = self.fpt((fine, coarse), key=key)
      return sum(jnp.sum(jnp.sin(level.masked())) for level in levels)

  x_BHWC = jnp.asarray(rng.standard_normal((2, 6, 5, 8)), jnp.float32)
  valid_BHW = jnp.ones((2, 6, 5), bool).at[1, :, 3:].set(False)
  inputs = (x_BHWC, valid_BHW, jax.random.key(1))
  results, kept, arrays = {}, {}, initial_arrays(lambda: Network("none"))
  for policy in POLICIES:
    structure = skeleton(lambda policy=policy: Network(policy))
    assert structure.shapes.keys() == arrays.keys()  # a checkpoint fits all of them
    run = differentiated(structure, lambda m, *x: m(*x), structure.parameters())
    results[policy] = jax.jit(run)(arrays, *inputs)
    kept[policy] = kept_bytes(lambda arrays, s=structure: s.fill(arrays)(*inputs), arrays)
  assert kept["nothing_saveable"] < 0.8 * kept["dots_saveable"] < 0.7 * kept["none"]
  statistics = results["none"][2]
  assert len(statistics) > 20 and all((statistics[n] != arrays[n]).any() for n in statistics)
  for policy in RECOMPUTING:
    assert_same(results[policy], results["none"])


def kept_bytes(total, arrays):
  """Bytes of the arrays that `total(arrays)` keeps for its backward pass; nothing is computed."""
  kept = jax.eval_shape(lambda arrays: jax.vjp(total, arrays)[1], arrays)
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(kept)
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )


@pytest.mark.parametrize(
  ("module", "arg"), [(coco_mask, "demo,fpt=none"), (camvid, "small,fpt=none")]
)
def test_models_keep_fewer_bytes(module, arg):
  """Most of them are activations of the backbone, which is trained here."""
  config, kept = module.get_config(arg), {}
  config.model.backbone.update(dict(frozen=False, norm="sync_bn"))
  task = task_of(config)
  shapes = task.batch_shapes(config, 2, task.canvas(config))
  batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  for config.model.remat in ("none", "nothing_saveable"):
    structure = models.structure_of(config)

    def total(arrays, structure=structure):
      return sum(structure.fill(arrays).losses(batch, jax.random.key(0)).values())

    kept[config.model.remat] = kept_bytes(total, structure.shapes)
  assert kept["nothing_saveable"] < 0.5 * kept["none"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_config, tiny_segmentation_config])
def test_whole_models_give_the_same(make, rng):
  config, results = make(), {}
  config.model.backbone.update(dict(frozen=False, norm="sync_bn"))
  task = task_of(config)
  shapes = task.batch_shapes(config, 2, task.canvas(config))
  batch = {n: jnp.ones(s.shape, s.dtype) for n, s in shapes.items()}
  batch["image_BHWC"] = jnp.asarray(255 * rng.random(shapes["image_BHWC"].shape, np.float32))
  batch["size_B2"] = jnp.array([[64, 64], [50, 40]], jnp.int32)
  if "gt_boxes_BG4" in batch:
    corners_BG2 = jnp.asarray(30 * rng.random((*batch["gt_valid_BG"].shape, 2), np.float32))
    batch["gt_boxes_BG4"] = jnp.concatenate([corners_BG2, corners_BG2 + 9], axis=-1)
  for config.model.remat in ("none", "nothing_saveable"):
    structure = models.structure_of(config)
    arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
    run = differentiated(
      structure,
      lambda model, batch, key: sum(model.losses(batch, key, progress=0.5).values()),
      structure.parameters(),
    )
    results[config.model.remat] = jax.jit(run)(arrays, batch, jax.random.key(0))
  assert_same(results["nothing_saveable"], results["none"])


def test_policies_of_parts():
  config = coco_mask.get_config("demo")
  config.model.remat, config.model.remat_parts = "dots_saveable", ("backbone", "heads")
  check_config(config)
  policies = {part: policy_of(config.model, part) for part in PARTS}
  expected = dict(backbone="dots_saveable", pyramid="none", fpt="none", heads="dots_saveable")
  assert policies == expected
  model = nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0)))
  assert (model.backbone.remat, model.fpt.remat) == ("dots_saveable", "none")
  config.model.remat_parts = ("neck",)
  with pytest.raises(UserError, match=r"remat_parts=\('neck',\) must be some of backbone, pyramid"):
    check_config(config)
  config.model.remat = "all"
  with pytest.raises(UserError, match="remat='all' must be one of none, dots_saveable, nothing"):
    check_config(config)
