#!/usr/bin/env python3
"""Times each stage of a training step on its own, forward and backward, or those of a prediction.

    python scripts/profile_step.py --config=configs/coco_mask.py:torchvision --size=320
    python scripts/profile_step.py --config=configs/coco_mask.py:torchvision --size=800 --predict
    python scripts/profile_step.py --config=configs/cityscapes.py:demo --batch=8
    JAX_PLATFORMS=cuda python scripts/profile_step.py --config=configs/coco_mask.py --batch=2

A stage is compiled alone, with the results of the stages before it as its inputs. Backward is the time of a
program with the gradients of the trained parameters and the inputs less that of the forward pass; a stage
that passes no gradient has none. Times are medians of interleaved repetitions. GFLOP are counted from the
formula (`fpt_jax.models.costs`), GB is what XLA's own analysis says that the compiled stage moves, where it
counts the body of a loop once. The shares are of the machine's rate of a large matrix product and of a
large copy, measured in the same run. The weights are random and the batch is noise with a few objects.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.extend.core import Literal
from ml_collections import ConfigDict, config_flags

from fpt_jax import configs, models, optim
from fpt_jax.errors import UserError
from fpt_jax.models import rcnn
from fpt_jax.models.costs import Cost, count
from fpt_jax.models.feature_map import subsample, valid_positions
from fpt_jax.models.preprocess import normalize
from fpt_jax.models.state import Skeleton, initial_arrays, within
from fpt_jax.ops import losses
from fpt_jax.run import command_line
from fpt_jax.tasks.task import check_config, task_of
from scripts import markdown
from scripts.benchmark_configs import filled
from scripts.timing import device, matrix_product, medians, run_of, turns

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config to profile.")
_SIZE = flags.DEFINE_integer("size", 0, "Side of the images, pixels; 0: the config's canvas.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images.", lower_bound=1)
_PREDICT = flags.DEFINE_bool("predict", False, "Profile a prediction instead of a training step.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Repetitions.", lower_bound=1)

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of a training step.

  Attributes:
    name: what it is called in the table.
    run: function of the model and of the results of the stages before, by name.
    inputs: names of these results.
    backward: whether the gradient passes through it.
  """

  name: str
  run: Callable[..., Any]
  inputs: tuple[str, ...]
  backward: bool = True


def main() -> None:
  config = _CONFIG.value
  if config is None:
    raise UserError("--config=FILE is missing, such as configs/coco_mask.py:torchvision")
  check_config(config)
  if _PREDICT.value and config.model.name != "rcnn":
    raise UserError(
      "--predict needs a config of detection, such as configs/coco_mask.py:torchvision"
    )
  task = task_of(config)
  canvas = (_SIZE.value, _SIZE.value) if _SIZE.value else task.canvas(config)
  structure = models.structure_of(config)
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
  shapes = task.batch_shapes(config, _BATCH.value, canvas)
  batch = {name: filled(name, shape) for name, shape in shapes.items()}
  batch["size_B2"] = jnp.broadcast_to(jnp.array(canvas, jnp.int32), (_BATCH.value, 2))
  known: dict[str, Any] = {"batch": batch, "key": jax.random.key(0)}
  trained = optim.trainable(config, structure.parameters())
  passed: set[str] = set()  # the results that gradients pass through
  runs: dict[tuple[str, str], Callable[[], object]] = {}
  work: dict[str, tuple[float, float]] = {}
  stages = prediction_stages(config) if _PREDICT.value else stages_of(config, trained)
  for stage in stages:
    inputs = {name: known[name] for name in stage.inputs}
    programs, known[stage.name], work[stage.name] = compiled(
      stage, structure, arrays, trained, inputs, passed
    )
    if stage.backward:
      passed.add(stage.name)
    runs |= {(stage.name, kind): program for kind, program in programs.items()}
  machine_runs, machine_work = machine(config.model.dtype)
  seconds = medians(turns(runs | machine_runs, _REPETITIONS.value))
  rates = {name: amount / seconds[name, "machine"] for name, amount in machine_work.items()}
  print(
    f"{canvas[0]} x {canvas[1]}, {_BATCH.value} image(s), {config.model.dtype}, {device()}: "
    f"{rates['product'] / 1e9:.0f} GFLOP/s, {rates['copy'] / 1e9:.1f} GB/s\n"
  )
  print(table(stages[-1].name, seconds, work, rates))


def stages_of(config: ConfigDict, trained: set[str]) -> list[Stage]:
  """The stages of the model's losses, in order; the last one is all of them."""
  frozen = not any(within(name, "backbone") for name in trained)
  whole = Stage("whole step", lambda model, batch, key: model.losses(batch, key), ("batch", "key"))
  fpt = [Stage("fpt", lambda model, pyramid, key: model.fpt(pyramid, key=key), ("pyramid", "key"))]
  fpt = fpt if config.model.fpt.enabled else []
  features = "fpt" if fpt else "pyramid"
  make = {"rcnn": detector_stages, "segmenter": segmenter_stages}[config.model.name]
  return [*make(config, fpt, features, frozen), whole]


def detector_backbone(model, batch, *, train: bool):
  image_BHWC = batch["image_BHWC"]
  valid_BHW = valid_positions(batch["size_B2"], *image_BHWC.shape[1:3])
  normalized_BHWC = normalize(model.config, image_BHWC, valid_BHW)
  return model.backbone_levels(normalized_BHWC, valid_BHW, train=train)


def with_last(levels):
  """P2 to P6, of the levels P2 to P5 that the stages pass on."""
  return (*levels, subsample(levels[-1]))


def rpn_of(model, levels):
  return model.rpn(with_last(levels))


def anchors(model, levels, batch):
  return model.rpn.anchors(with_last(levels), batch["image_BHWC"].shape[1:3])


def proposals_of(model, rpn, levels, batch, *, train: bool):
  boxes_BN4, _, valid_BN = model.rpn.propose(
    *rpn, anchors(model, levels, batch), batch["size_B2"], train=train
  )
  return boxes_BN4, valid_BN


def pooled(model, levels, boxes_BR4, valid_BR):
  return model.pool(with_last(levels), boxes_BR4, valid_BR, model.config.box_head)


def box_head_of(model, pooled):
  return model.box_head(pooled)


def detector_stages(config: ConfigDict, fpt: list[Stage], features: str, frozen: bool):
  def rpn_losses(model, rpn, levels, batch, key):
    grids = anchors(model, levels, batch)
    sample = model.rpn.sample(grids, batch["gt_boxes_BG4"], batch["gt_valid_BG"], key)
    return model.rpn.losses(with_last(levels), *rpn, grids, sample)

  def pooled_regions(model, levels, regions):
    return pooled(model, levels, regions["boxes_BR4"], regions["valid_BR"])

  def box_losses(model, box_head, regions):
    labels, targets, valid = (regions[n] for n in ("labels_BR", "targets_BR4", "valid_BR"))
    logits, deltas = box_head
    return losses.box_losses(logits, deltas, labels, targets, valid, model.config.box_head.beta)

  def masks(model, levels, batch, regions):
    return model.mask_loss(with_last(levels), batch, regions)

  mask = [Stage("masks", masks, (features, "batch", "regions"))]
  return [
    Stage(
      "backbone",
      functools.partial(detector_backbone, train=True),
      ("batch",),
      backward=not frozen,
    ),
    Stage("pyramid", lambda model, levels: model.pyramid_of(levels, train=True), ("backbone",)),
    *fpt,
    Stage("rpn", rpn_of, (features,)),
    Stage("rpn losses", rpn_losses, ("rpn", features, "batch", "key")),
    Stage(
      "proposals",
      functools.partial(proposals_of, train=True),
      ("rpn", features, "batch"),
      backward=False,
    ),
    Stage(
      "regions",
      lambda model, proposals, batch, key: model.sample_regions(*proposals, batch, key),
      ("proposals", "batch", "key"),
      backward=False,
    ),
    Stage("RoIAlign", pooled_regions, (features, "regions")),
    Stage("box head", box_head_of, ("RoIAlign",)),
    Stage("box losses", box_losses, ("box head", "regions")),
    *(mask if config.model.mask_head.enabled else []),
  ]


def prediction_stages(config: ConfigDict) -> list[Stage]:
  """The stages of a detector's prediction, but for the resize and the pasting of masks; the last is all."""

  def detections(model, proposals, box_head, batch):
    candidates = jax.vmap(model.select_candidates)(*proposals, *box_head, batch["size_B2"])
    return rcnn.suppress(candidates, model.config.test)

  def masks(model, levels, detections):
    return model.masks(with_last(levels), detections)

  def whole(model, batch):
    return model.detect(batch["image_BHWC"], batch["size_B2"])

  last = "fpt" if config.model.fpt.enabled else "pyramid"
  stages: list[tuple[str, Callable[..., Any], tuple[str, ...]]] = [
    ("backbone", functools.partial(detector_backbone, train=False), ("batch",)),
    ("pyramid", lambda model, levels: model.pyramid_of(levels, train=False), ("backbone",)),
    *([("fpt", lambda model, levels: model.fpt(levels), ("pyramid",))] if last == "fpt" else []),
    ("rpn", rpn_of, (last,)),
    ("proposals", functools.partial(proposals_of, train=False), ("rpn", last, "batch")),
    ("RoIAlign", lambda model, levels, found: pooled(model, levels, *found), (last, "proposals")),
    ("box head", box_head_of, ("RoIAlign",)),
    ("detections", detections, ("proposals", "box head", "batch")),
    *([("masks", masks, (last, "detections"))] if config.model.mask_head.enabled else []),
    ("whole prediction", whole, ("batch",)),
  ]
  return [Stage(name, run, inputs, backward=False) for name, run, inputs in stages]


def segmenter_stages(config: ConfigDict, fpt: list[Stage], features: str, frozen: bool):
  def loss(model, head, batch):
    labels_BHW = batch["label_BHW"]
    logits_BHWK = models.segmenter.enlarged(model.config, head, labels_BHW.shape[1:])
    hard = {name: model.config[name] for name in ("hard_pixels", "hard_probability")}
    return losses.segmentation_loss(logits_BHWK, labels_BHW, model.config.class_weights, **hard)

  return [
    Stage(
      "backbone",
      lambda model, batch: model.backbone_levels(batch["image_BHWC"], batch["size_B2"], train=True),
      ("batch",),
      backward=not frozen,
    ),
    Stage("pyramid", lambda model, levels: model.pyramid(levels, train=True), ("backbone",)),
    *fpt,
    Stage("head", lambda model, levels, key: model.head(levels, key=key), (features, "key")),
    Stage("loss", loss, ("head", "batch")),
  ]


def compiled(
  stage: Stage,
  structure: Skeleton,
  arrays: Arrays,
  trained: set[str],
  inputs: dict[str, Any],
  passed: set[str],
) -> tuple[dict[str, Callable[[], object]], Any, tuple[float, float]]:
  """The compiled programs of a stage by kind, its result, and its floating-point operations and bytes."""

  def forward(arrays, inputs):
    return stage.run(structure.fill(arrays), *(inputs[name] for name in stage.inputs))

  def gradient(arrays, inputs):
    """Gradients of the trained parameters and of what earlier stages have computed."""
    parameters = {n: arrays[n] for n in trained & read}
    computed = {name: inputs[name] for name in inputs if name in passed}
    leaves, tree = jax.tree.flatten(computed)
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]

    def total(parameters, values):
      replaced = list(leaves)
      for place, value in zip(places, values, strict=True):
        replaced[place] = value
      result = forward({**arrays, **parameters}, inputs | jax.tree.unflatten(tree, replaced))
      floats = [x for x in jax.tree.leaves(result) if is_float(x)]
      return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in floats)

    return jax.grad(total, argnums=(0, 1))(parameters, [leaves[place] for place in places])

  # The gradients of all others are zeros, which would take time to write.
  read = arrays_read(forward, arrays, inputs)
  kinds = {"forward": forward} | ({"both": gradient} if stage.backward else {})
  programs = {kind: jax.jit(f).lower(arrays, inputs).compile() for kind, f in kinds.items()}
  last = list(kinds)[-1]
  shapes = jax.eval_shape(lambda: inputs)
  cost = sum(count(kinds[last], structure, shapes).values(), Cost())
  moved = (programs[last].cost_analysis() or {}).get("bytes accessed", 0.0)
  runs = {kind: run_of(program, arrays, inputs) for kind, program in programs.items()}
  return runs, runs["forward"](), (2.0 * (cost.multiply_adds + cost.attention), moved)


def arrays_read(forward: Callable, arrays: Arrays, inputs: dict[str, Any]) -> set[str]:
  """The names of the arrays that a stage reads."""
  jaxpr = jax.make_jaxpr(forward)(arrays, inputs).jaxpr
  # variables can be hashed, the literals beside them cannot
  used = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)}
  # dicts are flattened in the order of their names
  return {name for name, v in zip(sorted(arrays), jaxpr.invars, strict=False) if v in used}


def is_float(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def machine(dtype: str) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[str, float]]:
  """A large matrix product and a large copy, and their operations and bytes."""
  product, operations = matrix_product(dtype)
  x = jnp.zeros(1 << 26, jnp.float32)
  copy = run_of(jax.jit(lambda x: x + 1).lower(x).compile(), x)
  runs = {("product", "machine"): product, ("copy", "machine"): copy}
  return runs, {"product": operations, "copy": 2.0 * x.nbytes}


def table(whole_name: str, seconds, work, rates) -> str:
  """The Markdown table of the stages; shares are of that with this name."""
  header = ["stage", "forward", "backward", "share", "GFLOP", "of the product rate", "GB"]
  rows = []
  whole = seconds.get((whole_name, "both"), seconds[whole_name, "forward"])
  for name, (operations, moved) in work.items():
    forward = seconds[name, "forward"]
    both = seconds.get((name, "both"), forward)
    rows.append(
      [
        name,
        f"{1e3 * forward:.1f} ms",
        f"{1e3 * (both - forward):.1f} ms" if (name, "both") in seconds else "-",
        f"{both / whole:.0%}",
        f"{operations / 1e9:.1f}",
        f"{operations / both / rates['product']:.0%}",
        f"{moved / 1e9:.2f}",
        f"{moved / both / rates['copy']:.0%}",
      ]
    )
  return markdown.table([*header, "of the copy rate"], rows)


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
