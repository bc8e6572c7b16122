"""Every row of the paper's tables 1 to 3 builds, trains and evaluates."""

import json
import math

import numpy as np
import pytest

from fpt_jax import models
from fpt_jax.configs import coco_mask, tables
from fpt_jax.configs.published import PARAMETERS
from fpt_jax.models.backbones import hrnet
from fpt_jax.train import train
from tests.runs import losses_by_step, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

INSTANCES = (tables.TABLE_1, tables.TABLE_2, tables.TABLE_3)
ROWS = {row.arg: row for table in INSTANCES for row in table}
# Rows that together have every word, each transformer alone and all parts at once. What is left out
# repeats them: two transformers of three, and backbones and heads with another neck.
TRAINED = (
  *(f"fpt={name}" for name in ("none", "st", "gt", "rt", "st+gt+rt")),
  "sbn=on,dropblock=off",
  "sbn=off,dropblock=on",
  *(f"backbone=resnet101_{name},fpt=none" for name in ("nl", "gc")),
  "backbone=resnet101_aa",
  "backbone=resnet101,pyramid=fpn,fpt=none",
  "backbone=resnet101,pyramid=bpa,fpt=none",
  "backbone=resnet101,pyramid=bfi,fpt=none,head=zigzag",
  "backbone=resnet101,head=augmented,multiscale",
)
# Not in the tables: another backbone, with the parts of `torchvision_v2`.
OTHERS = {
  "backbone=hrnet_w48,pyramid=fpn,fpt=st": {
    "model__pyramid__norm": "frozen_bn",
    "model__rpn__convs": 2,
    "model__box_head__convs": 2,
    "model__box_head__linears": 1,
    "model__box_head__norm": "frozen_bn",
    "model__mask_head__norm": "frozen_bn",
  },
}


def test_rows_have_the_papers_results():
  assert [len(table) for table in INSTANCES] == [8, 4, 17]
  for row in ROWS.values():
    assert len(row.box) in (1, 6) and (row.mask is None or len(row.mask) == 6), row.name
  # differences that the paper's text gives
  plain, full = tables.TABLE_1[0], tables.TABLE_1[-1]
  assert full.box[0] - plain.box[0] == pytest.approx(6.4)
  assert full.mask[0] - plain.mask[0] == pytest.approx(6.9)
  assert tables.TABLE_3[7].box[0] - tables.TABLE_3[0].box[0] == pytest.approx(8.5)


@pytest.mark.parametrize("arg", ROWS)
def test_row_at_full_size(arg):
  """The model has the row's parts, at the paper's widths, and no others."""
  structure = models.structure_of(coco_mask.get_config(arg))
  assert_size_is_explained("coco_mask", arg, structure)
  shapes = structure.shapes
  parts = {
    "st": "self_transformers",
    "gt": "grounding_transformers",
    "rt": "rendering_transformers",
  }
  asked = dict(s.split("=") for s in arg.split(",") if "=" in s).get("fpt", "st+gt+rt").split("+")
  for short, name in parts.items():
    assert any(n.startswith(f"fpt.{name}") for n in shapes) == (short in asked), name
  millions = sum(math.prod(s.shape) for s in shapes.values()) / 1e6
  assert 35 < millions < 175, millions


def assert_size_is_explained(config, arg, structure):
  """The differences from a published number of parameters account for it, up to its rounding."""
  published = PARAMETERS.get((config, arg))
  if published:
    ours = sum(math.prod(structure.shapes[name].shape) for name in structure.parameters())
    explained = ours / 1e6 + sum(amount for amount, _ in published.differences)
    assert explained == pytest.approx(published.millions, abs=0.006)


def test_the_trained_rows_have_every_word():
  words = {word for arg in ROWS for word in arg.split(",") if "+" not in word}
  assert words <= {word for arg in TRAINED for word in arg.split(",")}
  assert set(TRAINED) <= set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("arg", (*TRAINED, *OTHERS))
def test_row_trains_and_evaluates(arg, tmp_path, monkeypatch):
  monkeypatch.setattr(hrnet, "MODULES", (1, 1, 1))
  monkeypatch.setattr(hrnet, "BLOCKS", 1)
  # ResNet-18 has context blocks in the same places, and takes a twentieth of the time to compile
  fields = dict(OTHERS.get(arg, {}))
  if "_aa" in arg:  # in a narrower backbone, a tenth of the channels is less than one per head
    fields["model__backbone__width"] = 16
  if "head=augmented" in arg:
    fields["model__mask_head__layers"] = 2
  config = tiny_config(
    arg.replace("resnet101", "resnet18"),
    model__backbone__frozen=False,
    data__flip=False,
    data__train_split="train[:4]",
    steps=3,
    **fields,
  )
  metrics = train(config, str(tmp_path))
  losses = losses_by_step(tmp_path)
  assert all(np.isfinite(list(entry.values())).all() for entry in losses.values())
  assert losses[3]["total_loss"] < losses[1]["total_loss"]
  assert {"bbox/AP", "segm/AP"} <= set(metrics)
  assert isinstance(json.loads((tmp_path / "eval/coco_instances_results.json").read_text()), list)
