"""Every row of the paper's tables 4 and 5 describes a network; its parts are those the row names."""

import importlib
import math

import jax
import pytest
from flax import nnx

from configs import cityscapes, image_folder, tables
from fpt_jax import models, optim
from tests.models.test_segmenter import tiny


def config_of(row, words=""):
  return importlib.import_module(f"configs.{row.config}").get_config(words + row.arg)


def test_rows_have_the_papers_figures():
  assert len(tables.TABLE_4) == 8 and len(tables.TABLE_5) == 4 * 10
  # what the text says of them
  first, last = tables.TABLE_4[0].miou, tables.TABLE_4[-1].miou
  assert [b - a for a, b in zip(first, last, strict=True)] == pytest.approx([1.4, 2.6])
  by_name = {row.name: row.miou[0] for row in tables.TABLE_5}
  gains = [by_name[f"UFP+FPT, {d}"] - by_name[f"UFP+OC, {d}"] for d in tables.DATA_SETS]
  assert gains == pytest.approx([1.6, 1.2, 1.7, 1.8])
  assert {name for name, *_ in tables.NOT_BUILT} == {"HRNet", "GSCNN"}


@pytest.mark.parametrize("arg", {row.arg: None for row in tables.TABLE_4 + tables.TABLE_5})
def test_row_at_full_size(arg):
  shapes = models.structure_of(cityscapes.get_config(arg)).shapes
  asked = dict(setting.split("=") for setting in arg.split(",") if setting)
  fpt = asked.get("fpt", "none" if "head" in asked else "lgt+st+rt").split("+")
  for short, part in (("st", "self"), ("lgt", "grounding"), ("rt", "rendering")):
    assert any(n.startswith(f"fpt.{part}_transformers") for n in shapes) == (short in fpt)
  assert any(".context" in n for n in shapes) == ("oc" in arg)
  millions = sum(math.prod(s.shape) for s in shapes.values()) / 1e6
  assert 54 < millions < 95, millions


@pytest.mark.parametrize("arg", {row.arg: None for row in tables.TABLE_5})
def test_row_trains_and_infers_in_shapes(arg):
  config = tiny(arg, data__crop=(33, 41))
  batch = {
    "image_BHWC": jax.ShapeDtypeStruct((2, 33, 41, 3), "float32"),
    "label_BHW": jax.ShapeDtypeStruct((2, 33, 41), "int32"),
    "size_B2": jax.ShapeDtypeStruct((2, 2), "int32"),
  }

  def run(batch):
    model = models.build(config, nnx.Rngs(0))
    losses = model.losses(batch, jax.random.key(0))
    return losses, model.logits(batch["image_BHWC"], batch["size_B2"])

  losses, logits = jax.eval_shape(run, batch)
  assert set(losses) == {"loss_seg", "loss_aux"} and logits.shape == (2, 33, 41, 6)
  assert all(value.shape == () for value in losses.values())


def test_data_sets_differ_in_classes_alone_and_have_the_papers_recipe():
  recipes = {}
  for row in tables.TABLE_5:
    config, other = config_of(row), cityscapes.get_config(row.arg)
    classes = config.model.num_classes
    assert classes == {"cityscapes": 19, "ade20k": 150, "lip": 20, "voc2012": 21}[row.config]
    config.model.num_classes = 19
    assert config.model.to_dict() == other.model.to_dict()
    o = config.optim
    recipes[row.config] = (config.data.crop[0], optim.total_steps(config), o.learning_rate)
    recipes[row.config] += (o.weight_decay, config.data.scale_min, config.data.scale_max)
  assert recipes == {
    "cityscapes": (969, 120 * 2975 // 8, 0.01, 5e-4, 0.5, 2.0),
    "ade20k": (569, 120 * 20_210 // 16, 0.02, 1e-4, 0.5, 2.0),
    "lip": (573, round(50 * 30_462 / 8), 0.01, 5e-4, 0.5, 2.0),
    "voc2012": (521, 80 * 1464 // 8, 0.01, 5e-4, 0.5, 2.0),
  }


def test_words():
  demo = image_folder.get_config("demo")
  assert demo.data.name == "context_shapes" and not demo.model.backbone.frozen
  small = image_folder.get_config("small,fpt=gt")
  assert small.model.backbone.name == "efficientnet_lite0" and small.model.backbone.frozen
  assert small.model.fpt.window is None and not small.model.fpt.self_transformer


@pytest.mark.parametrize(
  ("arg", "told"),
  [
    ("head=hrnet", "head=hrnet: HRNetV2 is a backbone of its own and is not built here"),
    ("head=gscnn", "head=gscnn: GSCNN .* is not built here"),
    ("head=fancy", "head=fancy does not exist: 'fancy' is none of fcn, ocnet, cfnet, afnb"),
    ("torchvision", "variant 'torchvision' does not exist; choose one of small, demo"),
  ],
)
def test_what_does_not_exist_is_told(arg, told):
  with pytest.raises(ValueError, match=told):
    cityscapes.get_config(arg)
