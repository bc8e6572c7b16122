"""torchvision's Mask R-CNN with random weights, which benchmarks compare ours with."""

import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.models.state import Skeleton
from fpt_jax.weights.torchvision import from_torchvision
from scripts import markdown
from scripts.timing import number_printed_by
from scripts.torch_device import torch_device

try:
  import torch
  from torchvision.models import resnet50
  from torchvision.models.detection import MaskRCNN
  from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
  from torchvision.ops.misc import FrozenBatchNorm2d
except ImportError as missing:
  sys.exit(f"error: {missing}; pip install torch torchvision to compare with them")

CLASSES = 91
DEVICE = torch_device(torch)


def mask_rcnn(short_edge: int, long_edge: int, *, train_backbone: bool = False) -> MaskRCNN:
  """maskrcnn_resnet50_fpn with random weights whose activations stay as small as trained ones.

  Args:
    short_edge, long_edge: edges of a resized image, pixels.
    train_backbone: whether the backbone has gradients.
  """
  torch.manual_seed(0)
  body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
  for name, buffer in body.named_buffers():
    if name.endswith("bn3.weight"):
      buffer.fill_(0.2)
  backbone = _resnet_fpn_extractor(body, 5 if train_backbone else 0)
  return MaskRCNN(backbone, CLASSES, min_size=short_edge, max_size=long_edge)


def on_device(model: MaskRCNN) -> MaskRCNN:
  """The model on the device, in the layout that is fast there."""
  return model if DEVICE == "cpu" else model.to(DEVICE, memory_format=torch.channels_last)


def autocast(dtype: str) -> Any:
  """The context in which torch computes in a dtype."""
  return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")


def as_tensor(array) -> torch.Tensor:
  """An array of NumPy on the device."""
  return torch.from_numpy(array).to(DEVICE)


def ours(theirs: MaskRCNN, config: ConfigDict) -> tuple[Skeleton, dict[str, jax.Array]]:
  """Our model of `configs/coco_mask.py:torchvision` and its arrays, with the weights of theirs."""
  structure = models.structure_of(config)
  state_dict = {name: tensor.cpu().numpy() for name, tensor in theirs.state_dict().items()}
  arrays = from_torchvision(state_dict, structure.shapes)
  return structure, {name: jnp.asarray(array) for name, array in arrays.items()}


def print_comparison(
  columns: Mapping[str, Mapping[str, float]],
  script: str,
  *,
  with_memory: bool,
  with_cache: bool = False,
) -> None:
  """Prints a table of "fpt_jax" and "torchvision", and the ratio of the figures in its last column.

  Args:
    columns: seconds of both by the title of the column.
    script: the benchmark, which prints MB with its own arguments and `--weigh NAME`.
    with_memory: whether to add a column of the memory that each needs, on a CPU only.
    with_cache: whether to add another one, of processes that find their compiled programs in a cache.
  """
  weighs = with_memory and DEVICE == "cpu"
  *_, last = columns.values()
  titles = ["memory", *(["memory, compiled before"] if with_cache else [])] if weighs else []
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} if with_cache else {}
    for name in last:
      arguments = (*sys.argv[1:], "--weigh", name)
      weights = [number_printed_by(script, *arguments, **environment) for _ in titles]
      rows.append([name, *(f"{seconds[name]:.3f} s" for seconds in columns.values())])
      rows[-1] += [f"{megabytes:.0f} MB" for megabytes in weights]
  print(markdown.table(["", *columns, *titles], rows))
  print(f"\nRatio {last['fpt_jax'] / last['torchvision']:.2f}", flush=True)
