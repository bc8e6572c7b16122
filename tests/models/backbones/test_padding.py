"""The features of an image do not depend on its canvas, if a backbone masks the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.backbones import hrnet, wider_resnet
from fpt_jax.models.backbones.efficientnet import EfficientNetLite0
from fpt_jax.models.backbones.hrnet import HRNet
from fpt_jax.models.backbones.resnet import ResNet
from fpt_jax.models.backbones.wider_resnet import WiderResNet
from fpt_jax.models.state import skeleton
from tests.models.oracle import random_arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE, CANVASES = (40, 27), ((64, 32), (96, 64))
BUILDS = {
  "resnet18": functools.partial(ResNet, "resnet18", width=4, output_stride=8),
  "resnet50": functools.partial(ResNet, "resnet50", width=4, stride_in="1x1"),
  "efficientnet_lite0": functools.partial(EfficientNetLite0, output_stride=16),
  "hrnet_w48": functools.partial(HRNet, "hrnet_w48", width=4, output_stride=8),
  "wider_resnet38": functools.partial(WiderResNet, "wider_resnet38", width=2),
}


@pytest.mark.parametrize(
  ("name", "masks_padding"), [*((name, True) for name in BUILDS), ("resnet18", False)]
)
def test_the_canvas_does_not_affect_the_image(name, masks_padding, rng, monkeypatch):
  monkeypatch.setattr(hrnet, "BLOCKS", 1)
  monkeypatch.setattr(hrnet, "MODULES", (1, 1, 1))
  monkeypatch.setattr(wider_resnet, "BLOCKS", (1,) * 6)
  build = functools.partial(BUILDS[name], norm="frozen_bn", masks_padding=masks_padding)
  structure = skeleton(lambda: build(rngs=nnx.Rngs(0)))
  arrays = random_arrays(structure.shapes, rng)  # offsets of normalisations are not 0
  image_HWC = rng.standard_normal((*SIZE, 3)).astype(np.float32)
  run = jax.jit(lambda arrays, image, valid: structure.fill(arrays)(image, valid))
  found = []
  for canvas in CANVASES:
    image_BHWC, valid_BHW = np.zeros((1, *canvas, 3), np.float32), np.zeros((1, *canvas), bool)
    image_BHWC[0, : SIZE[0], : SIZE[1]], valid_BHW[0, : SIZE[0], : SIZE[1]] = image_HWC, True
    levels = run(arrays, jnp.asarray(image_BHWC), jnp.asarray(valid_BHW))
    found.append([np.asarray(x.values_BHWC)[np.asarray(x.valid_BHW)] for x in levels])
  errors = [
    np.abs(one - other).max() / np.abs(one).max() for one, other in zip(*found, strict=True)
  ]
  assert all(len(one) for one in found[0])
  assert (max(errors) < 1e-5) == masks_padding, errors
