"""Every config describes a model with the parts that the paper and the config's docstring name."""

import json
import math
import re

import pytest
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.configs import coco_box, coco_mask, detection, segmentation, variants
from fpt_jax.data import DatasetInfo
from fpt_jax.data.transforms import smallest_canvas
from fpt_jax.errors import UserError
from fpt_jax.models.backbones import BACKBONES
from fpt_jax.models.pyramids import DETECTION_PYRAMIDS, SEGMENTATION_PYRAMIDS
from fpt_jax.tasks.detection.categories import adopt_classes, label_table
from tests.runs import ROOT


def parameters(shapes, prefix):
  return sum(math.prod(s.shape) for n, s in shapes.items() if n.startswith(prefix))


@pytest.mark.parametrize(
  ("module", "arg"),
  [
    (coco_mask, "small"),
    (coco_mask, "tiny"),
    (coco_mask, "torchvision"),
    (coco_mask, "detectron2"),
    (coco_box, ""),
    (coco_box, "demo"),
  ],
)
def test_variants_describe_models(module, arg):
  config = module.get_config(arg)
  # in config.json, tuples become lists
  config = ConfigDict(json.loads(config.to_json()))
  shapes = models.structure_of(config).shapes
  assert (parameters(shapes, "mask_head.") > 0) == (module is coco_mask)
  assert (parameters(shapes, "fpt.") > 0) == (arg not in ("torchvision", "detectron2"))


def test_parameters_of_the_papers_model():
  shapes = models.structure_of(coco_mask.get_config()).shapes
  # 23.5M of ResNet-50 without its classifier, statistics of BatchNorm included
  assert parameters(shapes, "backbone.") == 23_508_032 + 53_120
  channels = 256
  attention = 3 * (channels**2 + channels)  # q, k, v; then w_n
  rendering = 3 * (9 * channels**2 + channels)
  fuse = 9 * 5 * channels**2 + 4 * channels
  expected = 4 * (attention + 2 * channels) + 6 * (attention + 4 * channels)
  expected += 6 * rendering + 4 * fuse
  # and a normalisation of four levels and of the outputs of 16 transformers
  assert parameters(shapes, "fpt.") == expected + (4 + 16) * 4 * channels
  literal = models.structure_of(coco_mask.get_config("literal")).shapes
  assert parameters(literal, "fpt.") == expected


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("backbone.name", "vgg16", "backbone 'vgg16' does not exist"),
    ("backbone.norm", "layer", "norm 'layer' does not exist"),
    ("pyramid.name", "nas", "pyramid 'nas' does not exist"),
    ("head.name", "panet", "head 'panet' does not exist"),
    ("fpt.gate", "relu", "gate 'relu' does not exist"),
    ("fpt.scope", "near", "scope 'near' does not exist"),
    ("fpt.similarity_norm", "layers", "similarity_norm 'layers' does not exist"),
    ("fpt.outside", "mirror", "outside"),
    ("fpt.drop_block_schedule", "cosine", "drop_block_schedule 'cosine' does not exist"),
    ("fpt.wide", True, "wide=True is a baseline without transformers"),
    ("pyramid.init", "fan", "init 'fan' does not exist"),
    ("fpt.grounding_parts", 5, "parts=5"),
    ("name", "yolo", "model 'yolo' does not exist"),
  ],
)
def test_parts_that_do_not_exist_are_reported(field, value, words):
  config = coco_mask.get_config("demo")
  with config.unlocked():
    config.update_from_flattened_dict({f"model.{field}": value})
  with pytest.raises(UserError, match=words):
    models.structure_of(config)


def test_settings_name_all_pyramids():
  assert DETECTION_PYRAMIDS == detection.PYRAMIDS
  assert SEGMENTATION_PYRAMIDS == segmentation.PYRAMIDS
  assert tuple(BACKBONES) == variants.BACKBONES
  for name in DETECTION_PYRAMIDS:
    config = coco_mask.get_config(f"pyramid={name},scope=adjacent,head=augmented").model
    assert (config.pyramid.name, config.fpt.scope, config.head.name) == (
      name,
      "adjacent",
      "augmented",
    )
  for arg in ("pyramid=nas", "scope=near", "head=panet"):
    with pytest.raises(UserError, match=f"{arg} does not exist; choose one of"):
      coco_mask.get_config(arg)


def test_category_ids_with_gaps():
  dataset = DatasetInfo(("cat", "dog"), (7, 90), {"train": 1})
  config = coco_mask.get_config()
  adopt_classes(config, dataset)
  assert config.model.num_classes == 2 and config.model.category_ids == (7, 90)
  assert label_table(config, dataset).tolist() == [0, 1, 2]

  config = coco_mask.get_config("torchvision")
  adopt_classes(config, dataset)
  assert config.model.num_classes == 90
  assert config.model.category_names[6] == "cat" and config.model.category_names[0] == "1"
  assert label_table(config, dataset).tolist() == [0, 7, 90]

  config.model.category_ids = (7,)
  with pytest.raises(UserError, match=r"categories \[90\] that the model does not have"):
    label_table(config, dataset)


def test_smallest_canvas_that_holds_an_image():
  buckets = ((800, 1024), (1024, 800), (800, 800))
  assert smallest_canvas((800, 900), buckets) == (800, 1024)
  assert smallest_canvas((700, 800), buckets) == (800, 800)
  assert smallest_canvas((900, 700), buckets) == (1024, 800)
  assert smallest_canvas((1100, 33), buckets) == (1120, 64)
  assert smallest_canvas((1100, 33), buckets, few=True) == (1280, 64)
  assert smallest_canvas((700, 800), buckets, few=True) == (800, 800)


def test_the_documentation_has_all_words():
  page = (ROOT / "docs" / "configs.md").read_text()
  for module in (detection, segmentation):
    for word in (*module.SIZES, *module.WORDS):
      assert f"`{word}`" in page, word
    for setting in module.SETTINGS:
      assert f"`{setting}=" in page, setting
  for name in variants.FPT_NAMES:
    assert re.search(rf"\W{name}\W", page), name
