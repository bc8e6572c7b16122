#!/usr/bin/env python3
"""Times the detection of one image by our Mask R-CNN and by torchvision's, with the same weights.

    python scripts/benchmark_predict.py                        # a drawn image of 480 x 640 at 800/1333
    python scripts/benchmark_predict.py --image photo.jpg --short_edge 400 --long_edge 666
    taskset -c 0 python scripts/benchmark_predict.py           # on one core
    JAX_PLATFORMS=cuda python scripts/benchmark_predict.py --dtype bfloat16

`restore(...).predict` of `configs/coco_mask.py:torchvision` beside the call of maskrcnn_resnet50_fpn: from a
uint8 image to boxes and pasted masks, its resize included. The weights are random, scaled so that the box
head is as sure of its classes as a trained one and finds the 100 detections that both models keep. Times are
medians of interleaved repetitions; the first call includes our compilation. Memory is the growth of the
process's peak in the first call, each in a process of its own, on the CPU only; once with our compilation,
and once more with the program from the compilation cache. It needs torch and torchvision in addition to
requirements.txt.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with torch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np

from fpt_jax.data.records.images import decode_image
from fpt_jax.errors import UserError
from fpt_jax.ops.boxes import iou
from fpt_jax.restored import Restored
from fpt_jax.run.command_line import load_config
from scripts import torchvision_peer
from scripts.process_memory import peak_growth
from scripts.timing import device, medians, turns
from scripts.torchvision_peer import as_tensor, torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPREAD, BACKGROUND = 2.5, 6.0  # standard deviation of class logits, and what background has more

# One prediction; it returns boxes [N, 4] and scores [N].
Predict = Callable[[], tuple[np.ndarray, np.ndarray]]


def main() -> None:
  arguments = parse_arguments()
  image_HWC = image_of(arguments)
  theirs = torchvision_peer.mask_rcnn(arguments.short_edge, arguments.long_edge).eval()
  be_sure_of_classes(theirs, image_HWC)
  makers = {
    "fpt_jax": lambda: our_prediction(theirs, image_HWC, arguments),
    "torchvision": lambda: their_prediction(theirs, image_HWC, arguments),
  }
  if arguments.weigh:
    print(peak_growth(makers[arguments.weigh]()))
    return
  predictions = {name: make() for name, make in makers.items()}
  first, found = {}, {}
  for name, predict in predictions.items():
    begun = time.perf_counter()
    found[name] = predict()
    first[name] = time.perf_counter() - begun
  seconds = medians(turns(predictions, arguments.repetitions))
  height, width = image_HWC.shape[:2]
  print(
    f"Image of {height} x {width} at {arguments.short_edge}/{arguments.long_edge}, {arguments.dtype}, on "
    f"{device()}: {agreement(found['fpt_jax'], found['torchvision'])}.\n"
  )
  columns = {"first call": first, "prediction": seconds}
  torchvision_peer.print_comparison(
    columns, __file__, with_memory=not arguments.no_memory, with_cache=True
  )


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--image", help="an image file; by default one is drawn")
  parser.add_argument("--short_edge", type=int, default=800, help="pixels")
  parser.add_argument("--long_edge", type=int, default=1333, help="pixels, at most")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--no_memory", action="store_true", help="times only")
  parser.add_argument("--weigh", help=argparse.SUPPRESS)
  return parser.parse_args()


def image_of(arguments: argparse.Namespace) -> np.ndarray:
  """The image to predict on, uint8 [H, W, 3]: the file, or rectangles on noise, as large as those of COCO."""
  if arguments.image:
    try:
      return decode_image(pathlib.Path(arguments.image).read_bytes())
    except (OSError, UserError) as error:
      sys.exit(f"error: --image={arguments.image}: {error}")
  rng = np.random.default_rng(0)
  image_HWC = rng.integers(0, 60, (480, 640, 3), np.uint8)
  for _ in range(30):
    top, left = rng.integers(0, (420, 560))
    height, width = rng.integers(20, 200, 2)
    image_HWC[top : top + height, left : left + width] += rng.integers(0, 190, 3, np.uint8)
  return image_HWC


def be_sure_of_classes(model, image_HWC: np.ndarray) -> None:
  """Scales the class logits: most regions are background, and of the others a few classes stand out."""
  logits = []
  predictor = model.roi_heads.box_predictor.cls_score
  hook = predictor.register_forward_hook(lambda module, inputs, output: logits.append(output))
  with torch.no_grad():
    torchvision_peer.on_device(model)([picture(image_HWC)])
  hook.remove()
  factor = SPREAD / logits[0].std(0).mean()
  predictor.weight.detach().mul_(factor)
  predictor.bias.detach().copy_(-factor * logits[0].mean(0))
  predictor.bias.detach()[0] += BACKGROUND


def picture(image_HWC: np.ndarray):
  """An image as torchvision takes it: float32 [3, H, W] in 0..1."""
  return as_tensor(image_HWC).permute(2, 0, 1).float() / 255


def our_prediction(theirs, image_HWC: np.ndarray, arguments) -> Predict:
  config = load_config(str(ROOT / "configs/coco_mask.py:torchvision"))
  config.data.short_edge, config.data.long_edge = arguments.short_edge, arguments.long_edge
  config.model.dtype = arguments.dtype
  restored = Restored(config, 0, *torchvision_peer.ours(theirs, config))

  def predict():
    (found,) = restored.predict([image_HWC])
    return found["boxes_xyxy"], found["scores"]

  return predict


def their_prediction(model, image_HWC: np.ndarray, arguments) -> Predict:
  model = torchvision_peer.on_device(model)

  def predict():
    with torch.no_grad(), torchvision_peer.autocast(arguments.dtype):
      (found,) = model([picture(image_HWC)])
    masks = (found["masks"][:, 0] > 0.5).cpu().numpy()  # as bool [N, H, W], like ours
    assert masks.shape[1:] == image_HWC.shape[:2]
    return found["boxes"].cpu().numpy(), found["scores"].cpu().numpy()

  return predict


def agreement(ours: tuple, theirs: tuple) -> str:
  """How many detections there are, and how many of torchvision's we find."""
  overlaps = np.asarray(iou(jnp.asarray(theirs[0]), jnp.asarray(ours[0])))
  matched = int((overlaps.max(axis=1) > 0.99).sum()) if overlaps.size else 0
  return (
    f"{len(ours[0])} and {len(theirs[0])} detections, {matched} with the same box; scores "
    f"{theirs[1].max(initial=0):.2f} to {theirs[1].min(initial=1):.2f}"
  )


if __name__ == "__main__":
  main()
