"""The words after the colon give the same config in any order; impossible ones are rejected."""

import itertools
import json

import pytest

from fpt_jax.configs import ade20k, benchmarks, camvid, cityscapes, coco_box, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.fpt import LITERAL
from fpt_jax.models.preprocess import EFFICIENTNET_LITE, IMAGENET
from fpt_jax.run.config_file import read_config
from fpt_jax.tasks.task import check_config


@pytest.mark.parametrize(
  ("module", "words"),
  [
    (coco_mask, ("multiscale", "small", "fpt=st+gt")),
    (coco_mask, ("backbone=efficientnet_lite0", "tiny", "fpt=none")),
    (coco_mask, ("torchvision", "backbone=resnet101", "multiscale")),
    (coco_mask, ("detectron2", "backbone=resnet101", "multiscale")),
    (cityscapes, ("weights=detectron", "backbone=resnet101_gc", "fpt=st")),
    (coco_box, ("demo", "backbone=resnet34_gc", "pyramid=fpn", "head=augmented")),
    (cityscapes, ("small", "backbone=resnet50", "fpt=lgt+rt")),
    (camvid, ("demo", "sbn=off", "dropblock=off", "pyramid=ppm")),
    (coco_mask, ("literal", "pyramid=fpn", "demo")),
    (cityscapes, ("fpt=fuse", "literal", "small")),
    (ade20k, ("small", "context=oc_base", "fpt=none")),
  ],
)
def test_words_give_the_same_config_in_any_order(module, words):
  configs = {
    module.get_config(",".join(order)).to_json() for order in itertools.permutations(words)
  }
  assert len(configs) == 1


@pytest.mark.parametrize("module", [coco_mask, cityscapes])
def test_literal_is_what_older_versions_computed(module, tmp_path):
  config = module.get_config("literal")
  older = json.loads(config.to_json())
  for field in (*LITERAL, "output_norm_scale", "wide"):
    del older["model"]["fpt"][field]
  older["model"]["fpt"]["gate"] = "identity"
  older["model"]["pyramid"].pop("init", None)
  (tmp_path / "config.json").write_text(json.dumps(older))
  assert json.loads(read_config(str(tmp_path)).to_json()) == json.loads(config.to_json())
  assert all(
    module.get_config().model.fpt[name] != LITERAL[name] for name in ("gate", "output_norm")
  )


@pytest.mark.parametrize("module", [coco_mask, cityscapes])
def test_baselines_have_no_transformer(module):
  for value, enabled, wide in (
    ("none", False, False),
    ("fuse", True, False),
    ("fuse_wide", True, True),
  ):
    fpt = module.get_config(f"fpt={value}").model.fpt
    assert (fpt.enabled, fpt.wide) == (enabled, wide)
    assert not (fpt.self_transformer or fpt.grounding_transformer or fpt.rendering_transformer)
  assert not module.get_config("fpt=st").model.fpt.wide


def test_multiscale_has_panets_sizes_and_is_relative_to_the_size():
  data = coco_mask.get_config("multiscale").data
  assert data.train_sizes == (400, 600, 800, 1000, 1200) and data.train_long_edge == 1400
  data = coco_mask.get_config("multiscale,small").data
  assert data.train_sizes == (96, 144, 192, 240, 288) and data.train_long_edge == 336


def test_a_backbone_sets_its_preprocessing():
  config = camvid.get_config("backbone=resnet50")
  model = config.model
  assert (model.pixel_mean, model.pixel_std) == (IMAGENET.pixel_mean, IMAGENET.pixel_std)
  assert model.backbone.norm == "frozen_bn" and model.backbone.frozen
  assert config.optim.frozen == ()
  config = coco_mask.get_config("small,backbone=efficientnet_lite0")
  assert config.model.pixel_mean == EFFICIENTNET_LITE.pixel_mean
  assert config.model.backbone.frozen and config.model.pyramid.level_norm == "sync_bn"
  # a benchmark's own backbone changes nothing
  assert camvid.get_config("backbone=efficientnet_lite0") == camvid.get_config()


@pytest.mark.parametrize(
  ("module", "arg", "words"),
  [
    (coco_mask, "tinyy", "the word 'tinyy' does not exist; choose one of small, tiny"),
    (coco_mask, "fpn=st", "the setting 'fpn' does not exist; choose one of backbone"),
    (coco_mask, "small,demo", "small and demo exclude each other"),
    (coco_mask, "fpt=st,fpt=gt", "fpt=st and fpt=gt exclude each other"),
    (coco_mask, "fpt=st+xt", "fpt=xt does not exist; choose one of none, fuse"),
    (coco_mask, "fpt=none+st", "fpt=none.st: its parts exclude each other"),
    (coco_mask, "fpt=fuse+st", "fpt=fuse.st: its parts exclude each other"),
    (coco_mask, "backbone=resnet50_xx", "backbone=resnet50_xx does not exist"),
    (coco_mask, "backbone=efficientnet_lite0_gc", "does not exist"),
    (coco_mask, "pyramid=ufp", "pyramid=ufp does not exist; choose one of bfp, fpn, bpa, bfi"),
    (cityscapes, "pyramid=bfp", "pyramid=bfp does not exist; choose one of ufp, ppm"),
    (cityscapes, "context=oc", "context=oc does not exist; choose one of none, oc_base"),
    (cityscapes, "head=fcn,pyramid=ppm", "head and pyramid exclude each other"),
    (cityscapes, "sbn=maybe", "sbn=maybe does not exist; choose one of on, off"),
  ],
)
def test_unknown_words_are_reported(module, arg, words):
  with pytest.raises(UserError, match=words):
    module.get_config(arg)


def test_configs_are_locked():
  config = coco_mask.get_config("demo")
  with pytest.raises(AttributeError, match="optim2"):
    config.optim2 = 1
  with pytest.raises(AttributeError, match="learning_rat"):
    config.optim.learning_rat = 1.0


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_every_benchmark_has_valid_values(name):
  module = __import__(f"fpt_jax.configs.{name}", fromlist=["get_config"])
  for arg in ("", "small", "demo"):
    config = module.get_config(arg)
    check_config(config)
    json.loads(config.to_json())
