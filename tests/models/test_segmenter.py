"""The whole segmenter: its interface, padding, and which parameters are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models, optim
from fpt_jax.configs import camvid, cityscapes
from fpt_jax.errors import UserError
from fpt_jax.models.segmenter import enlarged
from fpt_jax.models.state import initial_arrays
from tests.models.test_pixel_pyramids import on_canvas, whole

SIZE, CANVAS = (43, 34), (64, 64)


def tiny(arg: str = "", module=cityscapes, **fields):
  """Returns `cityscapes.py:demo,{arg}` with 8 channels, and `fields` set, with "__" for dots."""
  config = module.get_config(f"demo,{arg}")
  config.model.backbone.width = 4
  config.model.pyramid.update(dict(channels=8, kernels=(1, 3, 5, 7)))
  config.model.head.hidden = config.model.auxiliary.hidden = 8
  config.model.fpt.scope = "adjacent"
  for name, value in fields.items():
    *path, last = name.split("__")
    functools.reduce(lambda part, key: part[key], path, config)[last] = value
  return config


def batch_of(rng, size, canvas, classes):
  image = np.zeros((2, *canvas, 3), np.float32)
  label = np.full((2, *canvas), 255, np.int32)
  image[:, : size[0], : size[1]] = rng.integers(0, 256, (2, *size, 3))
  label[:, : size[0], : size[1]] = rng.integers(0, classes, (2, *size))
  label[:, 3, 4:9] = 255
  return {
    "image_BHWC": jnp.asarray(image),
    "label_BHW": jnp.asarray(label),
    "size_B2": jnp.array([size] * 2, jnp.int32),
  }


def test_losses_and_logits(rng):
  config = tiny()
  structure = models.structure_of(config)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
  batch = batch_of(rng, SIZE, CANVAS, config.model.num_classes)

  @jax.jit
  def logits(arrays, image, size):
    return structure.fill(arrays).logits(image, size)

  scores = logits(arrays, batch["image_BHWC"], batch["size_B2"])
  assert scores.shape == (2, *CANVAS, 7) and scores.dtype == jnp.float32
  assert np.isfinite(scores).all()

  @jax.jit
  def gradients(arrays, batch):
    def total(arrays):
      losses = structure.fill(arrays).losses(batch, jax.random.key(0))
      return sum(losses.values()), losses

    return jax.grad(total, has_aux=True)(arrays)

  slopes, losses = gradients(arrays, batch)
  assert set(losses) == {"loss_seg", "loss_aux"}
  # weights of classifiers start near zero: all classes are equally likely
  np.testing.assert_allclose(losses["loss_seg"], np.log(7), atol=0.05)
  np.testing.assert_allclose(losses["loss_aux"], 0.4 * np.log(7), atol=0.05)
  parameters = optim.trainable(config, structure.parameters())
  flat = [n for n in parameters if not np.any(slopes[n]) and not n.endswith("bias")]
  assert not flat and all(np.isfinite(slopes[n]).all() for n in parameters)


def test_hard_pixels_are_of_the_main_loss_alone(rng):
  config = tiny("fpt=none,pyramid=none")
  batch = batch_of(rng, (16, 16), (16, 16), config.model.num_classes)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))

  def losses_of(pixels):
    config.model.hard_pixels, config.model.hard_probability = pixels, 0.0
    structure = models.structure_of(config)
    return jax.jit(lambda arrays: structure.fill(arrays).losses(batch, jax.random.key(0)))(arrays)

  every, hard = losses_of(0), losses_of(20)
  assert hard["loss_seg"] > every["loss_seg"] * 1.001
  np.testing.assert_allclose(hard["loss_aux"], every["loss_aux"], rtol=1e-6)


@pytest.mark.parametrize("arg", ["", "fpt=none,pyramid=none"])
def test_padding_changes_nothing_behind_the_backbone(arg, rng):
  config = tiny(arg, model__align_corners=bool(arg))
  structure = models.structure_of(config)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))

  @jax.jit
  def scores(arrays, c5):
    model = structure.fill(arrays)
    logits = model.logits_of_levels((c5, c5, c5, c5))
    return logits.values_BHWC, enlarged(model.config, logits, (43, 34))

  values = rng.standard_normal((2, 6, 5, 32)).astype(np.float32)
  coarse, alone = scores(arrays, whole(values))
  _, padded = scores(arrays, on_canvas(values, rng, 9, 7))
  np.testing.assert_allclose(padded, alone, atol=1e-5 * np.abs(alone).max())
  stays = np.allclose(alone[:, ::8, ::8], coarse, atol=1e-5 * np.abs(alone).max())
  assert stays == config.model.align_corners


def test_without_auxiliary_loss_and_frozen(rng):
  config = tiny("fpt=none", model__auxiliary__weight=0.0, model__backbone__frozen=True)
  structure = models.structure_of(config)
  assert not any(n.startswith("auxiliary") for n in structure.variables)
  assert not any(n.startswith("backbone") for n in optim.trainable(config, structure.parameters()))
  batch = batch_of(rng, (16, 16), (16, 16), 6)
  found = jax.eval_shape(lambda: models.build(config, nnx.Rngs(0)).losses(batch, jax.random.key(0)))
  assert set(found) == {"loss_seg"}


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("pyramid.name", "fpn", "pyramid 'fpn' does not exist; choose one of ufp, .*none"),
    ("pyramid.name", "none", "pyramid 'none' has one level, and fpt needs several"),
    ("head.name", "standard", "head 'standard' does not exist; choose one of fcn, oc_base, "),
    ("pyramid.kernels", (1, 2, 3, 4), r"kernels=\(1, 2, 3, 4\) must be 4 odd numbers"),
    ("norm", "layer", "norm 'layer' does not exist"),
    ("backbone.output_stride", 4, "output_stride 4 does not exist; choose one of 32, 16, 8"),
  ],
)
def test_parts_that_do_not_exist_are_refused(field, value, message):
  config = camvid.get_config()
  with config.unlocked():
    config.update_from_flattened_dict({f"model.{field}": value})
  with pytest.raises(UserError, match=message):
    models.structure_of(config)
