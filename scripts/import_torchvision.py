#!/usr/bin/env python3
"""Makes a checkpoint of torchvision's weights: of a ResNet, or of a whole maskrcnn_resnet50_fpn.

    python scripts/import_torchvision.py --weights=resnet50.pth --config=configs/coco_mask.py \\
        --workdir=/runs/r50
    python -m fpt_jax.main --config=configs/coco_mask.py --config.init_from=/runs/r50 \\
        --workdir=/runs/coco_mask --config.data.source=/data/coco

A ResNet's weights fill the backbone, the rest of the model keeps its initial weights. The weights of a
detector fill all of `configs/coco_mask.py:torchvision`, which then detects as torchvision does:

    python scripts/import_torchvision.py --weights=maskrcnn_resnet50_fpn_coco.pth \\
        --config=configs/coco_mask.py:torchvision --workdir=/runs/torchvision
    python -m fpt_jax.main --mode=eval --workdir=/runs/torchvision --config.data.source=/data/coco

Files: .pth (read without torch), .safetensors, .npz.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from absl import flags, logging
from flax import nnx
from ml_collections import config_flags

from fpt_jax import checkpoints, command_line, models
from fpt_jax.errors import UserError
from fpt_jax.models.state import initial_arrays
from fpt_jax.models.torchvision import from_torchvision
from fpt_jax.torch_files import read_state_dict

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config whose model the weights fill.")
_WEIGHTS = flags.DEFINE_string("weights", "", "File of the state dict: .pth, .safetensors or .npz.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder to make, with the checkpoint as step 0.")


def main() -> None:
  config, workdir = _CONFIG.value, _WORKDIR.value
  if config is None or not _WEIGHTS.value:
    raise UserError("--weights=FILE and --config=CONFIG are needed")
  if (checkpoints.folder(workdir) / checkpoints.CONFIG_FILE).exists():
    raise UserError(f"--workdir={workdir} holds a run already; choose another")
  structure = models.structure_of(config)
  imported = from_torchvision(read_state_dict(_WEIGHTS.value), structure.shapes)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(config.seed)))
  arrays |= {name: jax.numpy.asarray(array) for name, array in imported.items()}
  checkpoints.write_config(workdir, config)
  saved = checkpoints.manager(workdir)
  checkpoints.save(saved, 0, arrays)
  checkpoints.finish(saved)
  saved.close()
  logging.info("%d of %d arrays imported into %s", len(imported), len(arrays), workdir)


if __name__ == "__main__":
  command_line.run(main)
