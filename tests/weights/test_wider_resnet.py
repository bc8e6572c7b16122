"""WiderResNet-38 from a file with the names of In-Place Activated BatchNorm's release."""

import numpy as np
import pytest
from flax import nnx

from fpt_jax.errors import UserError
from fpt_jax.models.backbones.wider_resnet import WiderResNet
from fpt_jax.models.state import skeleton
from fpt_jax.weights.families import check_family, family_of, without_prefix
from tests.golden.fill import fill

WIDTH = 2
MODULES = {  # blocks, and channels of their convolutions with a stem of 64
  "mod2": (3, (128, 128)),
  "mod3": (3, (256, 256)),
  "mod4": (6, (512, 512)),
  "mod5": (3, (512, 1024)),
  "mod6": (1, (512, 1024, 2048)),
  "mod7": (1, (1024, 2048, 4096)),
}


def tensors() -> dict[str, np.ndarray]:
  """The release's tensors of a network with a stem of 2 channels, below the prefix of a parallel module."""
  shapes, channels = {"mod1.conv1.weight": (WIDTH, 3, 3, 3)}, WIDTH

  def norm(name, channels):
    shapes.update(
      {f"{name}.{n}": (channels,) for n in ("weight", "bias", "running_mean", "running_var")}
    )

  for module, (blocks, widths) in MODULES.items():
    widths = [w * WIDTH // 64 for w in widths]
    sides = (3, 3) if len(widths) == 2 else (1, 3, 1)
    for b in range(1, blocks + 1):
      block = f"{module}.block{b}"
      norm(f"{block}.bn1", channels)
      if b == 1 and channels != widths[-1]:
        shapes[f"{block}.proj_conv.weight"] = (widths[-1], channels, 1, 1)
      for i, (width, side) in enumerate(zip(widths, sides, strict=True), start=1):
        if i > 1:
          norm(f"{block}.convs.bn{i}", channels)
        shapes[f"{block}.convs.conv{i}.weight"] = (width, channels, side, side)
        channels = width
  norm("bn_out", channels)
  shapes |= {"fc.weight": (10, channels), "fc.bias": (10,)}
  return {f"module.{name}": fill(name, shape) for name, shape in shapes.items()}


def structure():
  return skeleton(lambda: WiderResNet("wider_resnet38", width=WIDTH, rngs=nnx.Rngs(0)))


def test_the_release_fills_the_backbone():
  given = without_prefix(tensors())
  family = family_of(given)
  check_family(family, "wider_resnet38")
  shapes = {f"backbone.{name}": shape for name, shape in structure().shapes.items()}
  head = {"head.classify.kernel": next(iter(shapes.values()))}
  arrays = family.convert(given, shapes | head)
  assert arrays.keys() == shapes.keys()
  for ours, theirs in {
    "conv1.kernel": "mod1.conv1.weight",
    "stages.0.0.shortcut.kernel": "mod2.block1.proj_conv.weight",
    "stages.2.5.convs.1.kernel": "mod4.block6.convs.conv2.weight",
    "stages.3.1.norms.0.norm.scale": "mod5.block2.bn1.weight",
    "stages.4.0.norms.1.norm.mean": "mod6.block1.convs.bn2.running_mean",
    "stages.5.0.norms.2.norm.var": "mod7.block1.convs.bn3.running_var",
    "stages.5.0.convs.2.kernel": "mod7.block1.convs.conv3.weight",
  }.items():
    tensor = given[theirs]
    wanted = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
    np.testing.assert_array_equal(arrays[f"backbone.{ours}"], wanted)


def test_wrong_tensors_are_named():
  given = without_prefix(tensors())
  given["mod3.block2.convs.conv1.weight"] = np.zeros((8, 8, 1, 1))
  del given["mod7.block1.bn1.weight"]
  given["mod8.block1.bn1.weight"] = np.zeros(1)
  with pytest.raises(UserError) as error:
    family_of(given).convert(given, structure().shapes)
  for text in (
    "mod3.block2.convs.conv1.weight is (8, 8, 1, 1) and does not fit stages.1.1.convs.0.kernel (3, 3, 8, 8)",
    "mod7.block1.bn1.weight is missing",
    "mod8.block1.bn1.weight has no place",
  ):
    assert text in str(error.value)
  with pytest.raises(UserError, match="of a WiderResNet, but the config's backbone is resnet50"):
    check_family(family_of(given), "resnet50")
