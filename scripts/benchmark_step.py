#!/usr/bin/env python3
"""Times one training step of our Mask R-CNN and of torchvision's, with the same weights and images.

    python scripts/benchmark_step.py                      # 320 x 320, one image, backbone frozen
    python scripts/benchmark_step.py --size 640 --train_backbone
    JAX_PLATFORMS=cuda python scripts/benchmark_step.py --size 800 --batch 4 --dtype bfloat16

`configs/coco_mask.py:torchvision` and maskrcnn_resnet50_fpn as its pretrained weights are used: frozen
BatchNorm, losses and gradients of all trained parameters. It needs torch and torchvision in addition to
requirements.txt. Times are medians of interleaved repetitions. Memory is the growth of the process's peak,
each in a process of its own. Both run on the CPU, or on a GPU with JAX_PLATFORMS=cuda. There, memory is not
measured, float32 products are those of TF32 in both libraries, torch's layout is channels_last, and
`--dtype bfloat16` is its autocast.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from fpt_jax import optim
from fpt_jax.run.command_line import load_config
from scripts import torchvision_peer
from scripts.process_memory import peak_growth
from scripts.timing import device, medians, turns
from scripts.torchvision_peer import CLASSES, as_tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent

BITMAP = 112

Step = Callable[[], dict[str, float]]


def main() -> None:
  arguments = parse_arguments()
  size, train = arguments.size, arguments.train_backbone
  theirs = torchvision_peer.mask_rcnn(size, size, train_backbone=train).train()
  scene = draw_scene(arguments)
  makers = {
    "fpt_jax": lambda: our_step(theirs, scene, arguments),
    "torchvision": lambda: their_step(theirs, scene, arguments),
  }
  if arguments.weigh:
    print(peak_growth(makers[arguments.weigh]()))
    return
  steps = {name: make() for name, make in makers.items()}
  losses = {name: step() for name, step in steps.items()}
  seconds = medians(turns(steps, arguments.repetitions, warm_ups=2))
  trained = "all layers trained" if train else "backbone frozen"
  print(
    f"{arguments.batch} image(s) of {size} x {size}, {trained}, {arguments.dtype}, on {device()}.",
    "Losses of both:",
    ", ".join(
      f"{loss} {' and '.join(f'{losses[name][loss]:.3g}' for name in steps)}"
      for loss in sorted(losses["torchvision"])
    ),
    end=".\n\n",
  )
  columns = {"step": seconds}
  torchvision_peer.print_comparison(columns, __file__, with_memory=not arguments.no_memory)


def parse_arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", type=int, default=320, help="side of an image, pixels")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--objects", type=int, default=8, help="instances per image")
  parser.add_argument("--train_backbone", action="store_true", help="gradients of all layers")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--repetitions", type=int, default=7)
  parser.add_argument("--no_memory", action="store_true", help="times only")
  parser.add_argument("--weigh", help=argparse.SUPPRESS)
  return parser.parse_args()


def draw_scene(arguments) -> list[dict[str, np.ndarray]]:
  """Images [H, W, 3] in 0..1 with boxes, labels and elliptic masks [G, H, W]."""
  rng = np.random.default_rng(0)
  size, scene = arguments.size, []
  rows, columns = np.mgrid[:size, :size] + 0.5
  for _ in range(arguments.batch):
    sides_G2 = rng.uniform(0.1, 0.5, (arguments.objects, 2)) * size
    corners_G2 = rng.uniform(0, 1, (arguments.objects, 2)) * (size - sides_G2)
    boxes_G4 = np.concatenate([corners_G2, corners_G2 + sides_G2], axis=1).astype(np.float32)
    x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes_G4.T)
    across = (columns - (x0 + x1) / 2) / (x1 - x0)
    down = (rows - (y0 + y1) / 2) / (y1 - y0)
    scene.append(
      {
        "image_HWC": rng.random((size, size, 3), np.float32),
        "boxes_G4": boxes_G4,
        "labels_G": rng.integers(1, CLASSES, arguments.objects),
        "masks_GHW": (across**2 + down**2 <= 0.25).astype(np.uint8),
      }
    )
  return scene


def our_step(theirs, scene, arguments) -> Step:
  """Losses and gradients, compiled."""
  config = load_config(str(ROOT / "configs/coco_mask.py:torchvision"))
  config.model.backbone.frozen = not arguments.train_backbone
  config.model.dtype = arguments.dtype
  structure, arrays = torchvision_peer.ours(theirs, config)
  trained = {n: arrays[n] for n in optim.trainable(config, structure.parameters())}
  batch = jax.device_put(our_batch(scene, config.data.max_instances))

  def losses_and_gradients(trained, arrays, batch, key):
    def total(trained):
      losses = structure.fill(arrays | trained).losses(batch, key)
      return sum(losses.values()), losses

    return jax.grad(total, has_aux=True)(trained)

  arguments = (trained, arrays, batch, jax.random.key(0))
  compiled = jax.jit(losses_and_gradients).lower(*arguments).compile()
  renamed = {
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
  }

  def step():
    _, losses = jax.block_until_ready(compiled(*arguments))
    return {theirs: float(losses[ours]) for theirs, ours in renamed.items()}

  return step


def our_batch(scene, max_instances: int) -> dict[str, np.ndarray]:
  """The scene as our data pipeline would give it, ground truth padded to `max_instances`."""
  image_BHWC = np.stack([255 * image["image_HWC"] for image in scene])
  size = image_BHWC.shape[1:3]
  count = len(scene[0]["labels_G"])
  pad = [(0, 0), (0, max_instances - count)]
  # an ellipse that fills its box, as a bitmap of the box
  axis_m = (np.arange(BITMAP) + 0.5) / BITMAP - 0.5
  bitmap_mm = (axis_m[:, None] ** 2 + axis_m[None] ** 2 <= 0.25).astype(np.uint8)
  masks_BGmm = np.broadcast_to(bitmap_mm, (len(scene), count, BITMAP, BITMAP))
  return {
    "image_BHWC": image_BHWC,
    "size_B2": np.broadcast_to(np.array(size, np.int32), (len(scene), 2)),
    "gt_boxes_BG4": np.pad(np.stack([image["boxes_G4"] for image in scene]), [*pad, (0, 0)]),
    "gt_labels_BG": np.pad(np.stack([i["labels_G"] for i in scene]).astype(np.int32), pad),
    "gt_masks_BGmm": np.pad(masks_BGmm, [*pad, (0, 0), (0, 0)]),
    "gt_valid_BG": np.broadcast_to(np.arange(max_instances) < count, (len(scene), max_instances)),
  }


def their_step(model, scene, arguments) -> Step:
  images = [as_tensor(image["image_HWC"]).permute(2, 0, 1).contiguous() for image in scene]
  targets = [
    {
      "boxes": as_tensor(image["boxes_G4"]),
      "labels": as_tensor(image["labels_G"]),
      "masks": as_tensor(image["masks_GHW"]),
    }
    for image in scene
  ]
  model = torchvision_peer.on_device(model)

  def step():
    model.zero_grad(set_to_none=True)
    with torchvision_peer.autocast(arguments.dtype):
      losses = model(images, targets)
    sum(losses.values()).backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}

  return step


if __name__ == "__main__":
  main()
