"""Every row of the paper's tables 4 and 5 describes a network with the parts that the row names."""

import importlib
import math
import os
import tempfile

import numpy as np
import pytest
from ml_collections import ConfigDict

from fpt_jax import models, optim
from fpt_jax.configs import cityscapes, image_folder, tables
from fpt_jax.errors import UserError
from fpt_jax.models.backbones import hrnet, wider_resnet
from fpt_jax.train import train
from tests.configs.test_tables import assert_size_is_explained
from tests.models.test_segmenter import tiny
from tests.runs import losses_by_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config_of(row):
  return importlib.import_module(f"fpt_jax.configs.{row.config}").get_config(row.arg)


def test_rows_have_the_papers_results():
  assert len(tables.TABLE_4) == 8 and len(tables.TABLE_5) == 4 * 12
  # differences that the paper's text gives
  first, last = tables.TABLE_4[0].miou, tables.TABLE_4[-1].miou
  assert [b - a for a, b in zip(first, last, strict=True)] == pytest.approx([1.4, 2.6])
  by_name = {row.name: row.miou[0] for row in tables.TABLE_5}
  gains = [by_name[f"UFP+FPT, {d}"] - by_name[f"UFP+OC, {d}"] for d in tables.DATA_SETS]
  assert gains == pytest.approx([1.6, 1.2, 1.7, 1.8])


@pytest.mark.parametrize("arg", [row.arg for row in tables.TABLE_5[:12]])
def test_row_at_full_size(arg):
  """The model has the row's parts, at the paper's widths, and no others."""
  structure = models.structure_of(cityscapes.get_config(arg))
  assert_size_is_explained("cityscapes", arg, structure)
  shapes = structure.shapes
  assert_transformers(arg, shapes)
  assert any(".context" in n for n in shapes) == ("oc" in arg)
  millions = sum(math.prod(s.shape) for s in shapes.values()) / 1e6
  assert 52 < millions < 140, millions


@pytest.mark.parametrize("arg", [row.arg for row in tables.TABLE_4])
def test_rows_of_the_ablation(arg):
  assert_transformers(arg, models.structure_of(tiny(arg, model__fpt__scope="all")).shapes)


def assert_transformers(arg, shapes):
  asked = dict(setting.split("=") for setting in arg.split(","))
  fpt = asked.get("fpt", "none" if "head" in asked else "lgt+st+rt").split("+")
  for short, part in (("st", "self"), ("lgt", "grounding"), ("rt", "rendering")):
    found = [n for n in shapes if n.startswith(f"fpt.{part}_transformers") and n.endswith("bias")]
    assert len(found) == (short in fpt) * {"st": 4, "lgt": 6, "rt": 6}[short] * 3


# Rows that together have every word: each transformer alone, and the last row of table 4, which is UFP+FPT
# of table 5; of the data sets other than Cityscapes the row with all parts, because they differ in their
# classes only (see test_data_sets_differ_in_classes_only_and_have_the_papers_recipe).
ALONE = ("fpt=none", "fpt=st", "fpt=lgt", "fpt=rt")
TRAINED = (
  *(row for row in tables.TABLE_4 if row.arg in ALONE),
  *(
    row for row in tables.TABLE_5 if row.config == "cityscapes" or row.arg == tables.TABLE_5[11].arg
  ),
  *(
    tables.Row(name, f"head={name}", None, None, config="cityscapes")
    for name in ("pspnet", "deeplabv3")
  ),
)


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINED, ids=lambda r: f"{r.config}:{r.arg}")
def test_row_trains_and_evaluates(row, tmp_path, monkeypatch):
  """Trains the `demo` of the row's file, made smaller still."""
  monkeypatch.setattr(hrnet, "MODULES", (1, 1, 1))
  monkeypatch.setattr(hrnet, "BLOCKS", 1)
  monkeypatch.setattr(wider_resnet, "BLOCKS", (1,) * 6)
  config = tiny(row.arg, module=importlib.import_module(f"fpt_jax.configs.{row.config}"))
  config.data.builder = ConfigDict({"train_size": 24, "val_size": 4, "image_size": 64})
  config.data.data_dir = os.path.join(tempfile.gettempdir(), "fpt_jax_test_data")
  config.data.update(dict(crop=(64, 64), buckets=((64, 64),), train_split="train[:4]"))
  config.data.flip = False
  config.update(dict(steps=3, log_every=1, batch_size=4))
  rate = 0.001 if "gscnn" in row.arg else 0.02  # one of its losses has a weight of 20
  config.optim.update(dict(base_batch_size=4, warmup_steps=0, learning_rate=rate))
  config.eval.update(dict(every_steps=100, batch_size=4))
  metrics = train(config, str(tmp_path))
  losses = losses_by_step(tmp_path)
  assert all(np.isfinite(list(entry.values())).all() for entry in losses.values())
  # at first, no edge is predicted, and GSCNN's loss of the pixels on predicted edges is 0
  first, last = (losses[i]["total_loss"] - losses[i].get("loss_seg_edge", 0.0) for i in (1, 3))
  assert last < first
  assert 0 <= metrics["mIoU"] <= 100


def test_published_parameters_of_pspnet():
  """67.95 M with the auxiliary head and all BatchNorms."""
  shapes = models.structure_of(cityscapes.get_config("head=pspnet")).shapes
  counted = sum(math.prod(s.shape) for n, s in shapes.items() if not n.endswith((".mean", ".var")))
  assert counted / 1e6 == pytest.approx(67.95, rel=1e-4)


def test_fpt_on_hrnet(monkeypatch):
  """The pyramid of FPT is computed from all branches at stride 8; the auxiliary head is on stride 16."""
  monkeypatch.setattr(hrnet, "MODULES", (1, 1, 1))
  monkeypatch.setattr(hrnet, "BLOCKS", 1)
  config = cityscapes.get_config("demo,backbone=hrnet_w48")
  shapes = models.structure_of(config).shapes
  assert config.model.backbone.width == 16 and not config.model.backbone.frozen
  assert shapes["pyramid.reduce.conv.kernel"].shape[2] == 12 * (1 + 2 + 4 + 8)
  assert shapes["auxiliary.mix.conv.kernel"].shape[2] == 12 * 4


def test_fpt_on_wider_resnet(monkeypatch):
  """The pyramid of FPT is computed from B7, the auxiliary logits from B5."""
  monkeypatch.setattr(wider_resnet, "BLOCKS", (1,) * 6)
  config = cityscapes.get_config("demo,backbone=wider_resnet38")
  shapes = models.structure_of(config).shapes
  assert config.model.backbone.width == 16 and not config.model.backbone.frozen
  assert shapes["pyramid.reduce.conv.kernel"].shape[2] == 16 * 64
  assert shapes["auxiliary.mix.conv.kernel"].shape[2] == 16 * 16


def test_parameters_of_gscnn():
  """105.06 M, 0.108 M, 30.41 M and 1.70 M, counted from the layers of the release."""
  config = cityscapes.get_config("head=gscnn")
  config.model.backbone.norm = "sync_bn"
  structure = models.structure_of(config)
  parts = dict.fromkeys(("backbone", "shape_stream", "aspp", "decoder"), 0)
  for name in structure.parameters():
    part, inner = name.split(".")[:2]
    if part == "head":
      part = "aspp" if inner in ("parallel", "image", "edge") else "decoder"
    parts[part] += math.prod(structure.shapes[name].shape)
  assert [n / 1e6 for n in parts.values()] == pytest.approx([105.06, 0.108, 30.41, 1.70], rel=3e-3)
  assert sum(parts.values()) / 1e6 == pytest.approx(137.28, rel=1e-4)


def test_data_sets_differ_in_classes_only_and_have_the_papers_recipe():
  recipes = {}
  for row in tables.TABLE_5:
    config, other = config_of(row), cityscapes.get_config(row.arg)
    classes = config.model.num_classes
    assert classes == {"cityscapes": 19, "ade20k": 150, "lip": 20, "voc2012": 21}[row.config]
    config.model.num_classes = 19
    if row.config == "lip":
      assert not config.model.align_corners
      config.model.align_corners = other.model.align_corners
    assert config.model.to_json() == other.model.to_json()
    o = config.optim
    recipes[row.config] = (config.data.crop[0], optim.total_steps(config), o.learning_rate)
    recipes[row.config] += (o.weight_decay, *config.data.scale)
  assert recipes == {
    "cityscapes": (969, 120 * 2975 // 8, 0.01, 5e-4, 0.5, 2.0),
    "ade20k": (569, 120 * 20_210 // 16, 0.02, 1e-4, 0.5, 2.0),
    "lip": (573, round(50 * 30_462 / 8), 0.01, 5e-4, 0.5, 2.0),
    "voc2012": (521, 80 * 1464 // 8, 0.01, 5e-4, 0.5, 2.0),
  }


@pytest.mark.parametrize(
  "name", ["ade20k", "camvid", "cityscapes", "image_folder", "lip", "voc2012"]
)
def test_corners_are_aligned_where_the_crop_is_8_n_plus_1(name):
  module = importlib.import_module(f"fpt_jax.configs.{name}")
  for arg in ("", "small", "demo", "head=ocnet", "fpt=none,context=apnb"):
    config = module.get_config(arg)
    exact = {edge % 8 for edge in config.data.crop} == {1}
    assert config.model.align_corners == exact, arg
    assert all({e % 8 for e in bucket} == {1} for bucket in config.data.buckets) or not exact
  for arg in ("head=fcn", "head=deeplabv3", "head=hrnet"):  # those of torchvision, and of HRNet
    assert not module.get_config(arg).model.align_corners


def test_words_of_image_folder():
  demo = image_folder.get_config("demo")
  assert demo.data.name == "context_shapes" and not demo.model.backbone.frozen
  small = image_folder.get_config("small,fpt=gt")
  assert small.model.backbone.name == "efficientnet_lite0"
  parameters = models.structure_of(small).parameters()
  backbone = {n for n in parameters if n.startswith("backbone.")}
  kept = backbone - optim.trainable(small, parameters)
  levels = {
    4: "backbone.blocks.4.project.kernel",
    5: "backbone.blocks.5.expand.kernel",
  }  # the end of C3
  assert levels[4] in kept and levels[5] in backbone - kept
  assert not image_folder.get_config("small,backbone=resnet50").optim.frozen
  assert small.model.fpt.window is None and not small.model.fpt.self_transformer


@pytest.mark.parametrize(
  ("arg", "words"),
  [
    ("head=hrnet,backbone=resnet50", "the settings head=hrnet and backbone exclude each other"),
    ("head=hrnet,fpt=st", "the settings head and fpt exclude each other"),
    ("head=gscnn,backbone=resnet50", "the settings head=gscnn and backbone exclude each other"),
    ("head=fancy", "head=fancy does not exist; choose one of fcn, ocnet, cfnet, afnb, pspnet"),
    ("torchvision", "the word 'torchvision' does not exist; choose one of small, demo"),
  ],
)
def test_networks_that_do_not_exist_are_reported(arg, words):
  with pytest.raises(UserError, match=words):
    cityscapes.get_config(arg)
