"""HRNets: our model with timm's tensors gives timm's outputs; the names of the release for segmentation."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax import models
from fpt_jax.configs import cityscapes
from fpt_jax.errors import UserError
from fpt_jax.models.backbones.hrnet import HRNet
from fpt_jax.models.state import skeleton
from fpt_jax.weights.families import check_family, family_of
from tests.conftest import GOLDEN
from tests.golden.fill import fill

SHAPES = json.loads((GOLDEN / "hrnet_w48.shapes.json").read_text())


@functools.cache
def backbone():
  return skeleton(lambda: HRNet("hrnet_w48", rngs=nnx.Rngs(0)))


def zeros() -> dict[str, np.ndarray]:
  return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def release_head(prefix: str) -> dict[str, np.ndarray]:
  """The head of the release for segmentation, whose first convolution has a bias."""
  shapes = {"0.weight": (720, 720, 1, 1), "3.weight": (19, 720, 1, 1), "3.bias": (19,)}
  shapes |= {f"1.{n}": (720,) for n in ("weight", "bias", "running_mean", "running_var")}
  shapes["0.bias"] = (720,)
  return {f"{prefix}last_layer.{n}": fill(n, shape) for n, shape in shapes.items()}


@pytest.mark.slow
def test_features_are_timms():
  golden = np.load(GOLDEN / "hrnet_w48.npz")
  structure = backbone()
  tensors = {name: fill(name, tuple(shape)) for name, shape in SHAPES.items()}
  arrays = family_of(tensors).convert(tensors, structure.shapes)
  image_BHWC = jnp.asarray(golden["image_BHWC"])
  # without jit: the network has a hundred blocks of a few shapes, and compiles for minutes as a whole
  levels = structure.fill(arrays)(image_BHWC, jnp.ones(image_BHWC.shape[:3], bool))
  for i, level in enumerate(levels):
    theirs = golden[f"branch{i}_BHWC_step4"]
    ours = np.asarray(level.values_BHWC[..., ::4])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()  # about 1e-6


def test_the_release_for_segmentation_fills_the_row_of_table_5():
  """Its names begin with "model."; a bias in front of the normalisation of the head is subtracted there."""
  tensors = {f"model.{name}": value for name, value in zeros().items()}
  head = release_head("model.")
  tensors |= head | {"loss.criterion.weight": np.zeros(19)}
  family = family_of(tensors)
  check_family(family, "hrnet_w48")
  shapes = models.structure_of(cityscapes.get_config("head=hrnet")).shapes
  arrays = family.convert(tensors, shapes)
  assert arrays.keys() == shapes.keys()
  classify = head["model.last_layer.3.weight"][:, :, 0, 0].T
  np.testing.assert_array_equal(arrays["head.classify.kernel"][0, 0], classify)
  x = np.random.default_rng(0).standard_normal(720)
  convolved = head["model.last_layer.0.weight"][:, :, 0, 0] @ x
  normed = [
    (y - mean) / np.sqrt(var + 1e-5)
    for y, mean, var in (
      (
        convolved + head["model.last_layer.0.bias"],
        head["model.last_layer.1.running_mean"],
        head["model.last_layer.1.running_var"],
      ),
      (convolved, arrays["head.mix.norm.norm.mean"], arrays["head.mix.norm.norm.var"]),
    )
  ]
  np.testing.assert_allclose(normed[1], normed[0], atol=1e-5)


def test_imagenet_weights_fill_the_backbone_of_a_model():
  tensors = zeros()
  check_family(family_of(tensors), "hrnet_w48")
  shapes = {f"backbone.{name}": shape for name, shape in backbone().shapes.items()}
  head = {"head.mix.conv.kernel": next(iter(shapes.values()))}
  assert family_of(tensors).convert(tensors, shapes | head).keys() == shapes.keys()


def test_wrong_tensors_are_named():
  tensors = zeros()
  tensors["conv2.weight"] = np.zeros((64, 64, 5, 5))
  del tensors["stage4.2.fuse_layers.3.1.1.0.weight"]
  tensors["stage5.0.branches.0.0.conv1.weight"] = np.zeros(1)
  with pytest.raises(UserError) as error:
    family_of(tensors).convert(tensors, backbone().shapes)
  for text in (
    "conv2.weight is (64, 64, 5, 5) and does not fit stem.1.conv.kernel (3, 3, 64, 64)",
    "stage4.2.fuse_layers.3.1.1.0.weight is missing",
    "stage5.0.branches.0.0.conv1.weight has no place",
  ):
    assert text in str(error.value)
  with pytest.raises(UserError, match="of an HRNet, but the config's backbone is resnet50"):
    check_family(family_of(tensors), "resnet50")
