"""ResNets under the names of each library, written out independently of the importer, and converted."""

import functools

import numpy as np

from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.weights.families import (
  check_family,
  family_of,
)
from tests.golden.fill import fill


def resnet18(width: int) -> dict[str, np.ndarray]:
  """A state dict with the names of torchvision's and timm's resnet18."""
  shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (10, 8 * width), "fc.bias": (10,)}

  def norm(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    shapes.update({f"{name}.{leaf}": (channels,) for leaf in leaves})
    shapes[f"{name}.num_batches_tracked"] = ()

  norm("bn1", width)
  inputs = width
  for stage in range(4):
    channels = width * 2**stage
    for block in range(2):
      prefix = f"layer{stage + 1}.{block}"
      shapes[f"{prefix}.conv1.weight"] = (channels, inputs, 3, 3)
      shapes[f"{prefix}.conv2.weight"] = (channels, channels, 3, 3)
      norm(f"{prefix}.bn1", channels)
      norm(f"{prefix}.bn2", channels)
      if inputs != channels:
        shapes[f"{prefix}.downsample.0.weight"] = (channels, inputs, 1, 1)
        norm(f"{prefix}.downsample.1", channels)
      inputs = channels
  return {name: fill(name, shape) for name, shape in shapes.items()}


@functools.cache
def structure(arg):
  return models.structure_of(coco_mask.get_config(arg))


def convert(tensors, arg):
  family = family_of(tensors)
  check_family(family, coco_mask.get_config(arg).model.backbone.name)
  return family.convert(tensors, structure(arg).shapes)


def assert_equal(ours, expected):
  assert ours.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(ours[name], array, err_msg=name)


# A ResNet-50 of width 16 under the names of each library, written out independently of the importer.

LETTERS = "abc"

NORMS = ("weight", "bias", "running_mean", "running_var")


def resnet50_layers(width=16):
  """Yields the stage, the block, the layer and the shape of each convolution; 0, 0, 0 is the stem."""
  yield 0, 0, 0, (width, 3, 7, 7)
  inputs = width
  for stage, blocks in enumerate((3, 4, 6, 3), start=1):
    inner = width * 2 ** (stage - 1)
    for block in range(blocks):
      if block == 0:
        yield stage, block, "shortcut", (4 * inner, inputs, 1, 1)
      yield stage, block, 1, (inner, inputs, 1, 1)
      yield stage, block, 2, (inner, inner, 3, 3)
      yield stage, block, 3, (4 * inner, inner, 1, 1)
      inputs = 4 * inner


def torchvision_names(stage, block, layer):
  if stage == 0:
    return "conv1.weight", "bn1.{}"
  if layer == "shortcut":
    return f"layer{stage}.{block}.downsample.0.weight", f"layer{stage}.{block}.downsample.1.{{}}"
  return f"layer{stage}.{block}.conv{layer}.weight", f"layer{stage}.{block}.bn{layer}.{{}}"


def detectron2_names(stage, block, layer):
  if stage == 0:
    return "stem.conv1.weight", "stem.conv1.norm.{}"
  part = layer if layer == "shortcut" else f"conv{layer}"
  return f"res{stage + 1}.{block}.{part}.weight", f"res{stage + 1}.{block}.{part}.norm.{{}}"


def resnet50(names, prefix="", statistics=True):
  """Returns a state dict with the same tensors for each kind of names."""
  tensors = {}
  for stage, block, layer, shape in resnet50_layers():
    kernel, norm = names(stage, block, layer)
    tensors[prefix + kernel] = fill(f"{stage}.{block}.{layer}.kernel", shape)
    for leaf in NORMS if statistics else NORMS[:2]:
      tensors[prefix + norm.format(leaf)] = fill(f"{stage}.{block}.{layer}.{leaf}", shape[:1])
  return tensors


def detectron_resnet50(biases):
  """Returns the blobs of a file like R-50.pkl; `biases` are those of all convolutions."""
  blobs = {"fc1000_w": np.zeros((1000, 512), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
  for stage, block, layer, shape in resnet50_layers():
    name = f"res{stage + 1}_{block}_branch" + (
      "1" if layer == "shortcut" else f"2{LETTERS[int(layer) - 1]}"
    )
    kernel, norm = (name, f"{name}_bn") if stage else ("conv1", "res_conv1_bn")
    of_layer = f"{stage}.{block}.{layer}"
    blobs[f"{kernel}_w"] = fill(f"{of_layer}.kernel", shape)
    blobs[f"{kernel}_w_momentum"] = np.zeros(shape, np.float32)
    if biases is not None:
      blobs[f"{kernel}_b"] = np.full(shape[:1], biases, np.float32)
    blobs[f"{norm}_s"] = fill(f"{of_layer}.weight", shape[:1])
    blobs[f"{norm}_b"] = fill(f"{of_layer}.bias", shape[:1])
  return blobs


R50 = "demo,backbone=resnet50"
