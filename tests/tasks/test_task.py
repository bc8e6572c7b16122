"""Impossible values are reported with their field before anything is compiled."""

import functools
import json

import pytest

from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.optim import schedule, total_steps
from fpt_jax.run.config_file import read_config, write_config
from fpt_jax.tasks.task import check_config


def test_a_field_that_may_be_unset_is_no_wrong_type():
  check_config(cityscapes.get_config("fpt=gt"))  # model.fpt.window, 5 by default


@pytest.mark.parametrize("module", [coco_mask, cityscapes])
@pytest.mark.parametrize(
  ("field", "value", "needed"),
  [
    ("batch_size", 0, "1 or more"),
    ("batch_size", -8, "1 or more"),
    ("train_images", 0, "1 or more"),
    ("seed", -1, "0 or more"),
    ("steps", -1, "0 or more"),
    ("log_every", 0, "1 or more"),
    ("loggers", ("tensorboard",), "some of wandb, mlflow"),
    ("eval.every_steps", 0, "1 or more"),
    ("eval.batch_size", 0, "1 or more"),
    ("checkpoint.every_steps", -5, "1 or more"),
    ("checkpoint.every_minutes", -1.0, "0 or more"),
    ("checkpoint.keep", 0, "1 or more"),
    ("checkpoint.best_mode", "highest", "one of max, min"),
    ("init_from_step", "newest", "a number of training steps, best, or ''"),
    ("checkpoint.best_metric", "AP", "one of (bbox/AP|mIoU), "),
    ("eval.patience", -1, "0 or more"),
    ("data.train_sizes", (0, 5), "positive"),
    ("data.train_sizes", (600, 400), "smaller one first"),
    ("data.canvas_multiple", 0, "1 or more"),
    ("data.prefetch", 0, "1 or more"),
    ("model.dtype", "float16", "one of float32, bfloat16, bf16"),
    ("data.exif", "rotate", "one of apply, ignore"),
    ("model.channel_order", "gbr", "one of rgb, bgr"),
    ("model.pixel_std", (0.1, 0.0, 0.1), "above 0"),
    ("model.fpt.window", 4, "an odd number"),
    ("model.fpt.implementation", "fast", "one of auto, naive, chunked, pallas"),
    ("model.fpt.keep_probability", 0.0, "at most 1"),
    ("optim.schedule", "linear", "one of step, cosine, poly"),
    ("optim.decay_at", (1.5,), "between 0 and 1"),
    ("optim.learning_rate", -0.1, "0 or more"),
    ("optim.base_batch_size", 0, "1 or more"),
    ("optim.bias_rate", -1.0, "0 or more"),
  ],
)
def test_impossible_values_of_both_tasks_are_reported(module, field, value, needed):
  config = module.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=rf"config\.{field}=.* must be .*{needed}"):
    check_config(config)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("data.name", None, "the config has no field data.name"),
    (
      "data.name",
      ["coco"],
      r"config.data.name=\['coco'\] must be of the type of its default, 'coco'",
    ),
    ("data.data_dir", 5, "config.data.data_dir=5 must be of the type"),
    ("data.builder", 5, "config.data.builder=5 must be a group of fields"),
    ("data.flip", 1, "config.data.flip=1 must be of the type of its default, True"),
    ("data.buckets", 3, "config.data.buckets=3 must be of the type"),
    ("model.pyramid.name", 5, "config.model.pyramid.name=5 must be of the type"),
    ("optim.momentum", "0.9", "config.optim.momentum=0.9 must be of the type of its default, 0.9"),
    ("optim.learning_rate", 1, None),
    ("steps", 1.5, "config.steps=1.5 must be of the type of its default, 0"),
  ],
)
def test_wrong_types_in_config_json_are_reported(path, value, message, tmp_path):
  write_config(str(tmp_path), coco_mask.get_config())
  content = json.loads((tmp_path / "config.json").read_text())
  *groups, field = path.split(".")
  part = functools.reduce(dict.__getitem__, groups, content)
  if value is None:
    del part[field]
  else:
    part[field] = value
  (tmp_path / "config.json").write_text(json.dumps(content))
  config = read_config(str(tmp_path))
  if message is None:
    check_config(config)
  else:
    with pytest.raises(UserError, match=message):
      check_config(config)


@pytest.mark.parametrize(
  ("module", "field", "value", "needed"),
  [
    (coco_mask, "data.short_edge", 0, "1 or more"),
    (coco_mask, "data.short_edge", 1001, r"at most config\.data\.long_edge=1000"),
    (coco_mask, "data.train_long_edge", 799, "at least 800"),
    (coco_mask, "model.box_head.beta", 0.0, "more than 0"),
    (coco_mask, "model.rpn.anchor_sizes", ((8.0,), (16.0,)), "5 tuples of positive numbers"),
    (coco_mask, "eval.short_edges", (800, 0), "positive"),
    (coco_mask, "eval.confusion_score", 1.5, "less than 1"),
    (coco_mask, "model.test.score_threshold", 1.5, "less than 1"),
    (coco_mask, "data.max_instances", 0, "1 or more"),
    (cityscapes, "model.hard_pixels", -1, "0 or more"),
    (cityscapes, "data.crop", (0, 5), "two positive numbers"),
    (cityscapes, "data.scale", (0.0, 2.0), "positive factors"),
    (cityscapes, "data.scale", (3.0, 2.0), "smaller one first"),
    (cityscapes, "eval.window", (5,), "two positive numbers"),
    (cityscapes, "eval.overlap", 1.0, "less than 1"),
    (cityscapes, "eval.scales", (), "positive factors"),
  ],
)
def test_impossible_values_of_one_task_are_reported(module, field, value, needed):
  config = module.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=rf"config\.{field}=.* must be .*{needed}"):
    check_config(config)


def test_a_step_to_start_from_needs_a_run():
  config = coco_mask.get_config()
  config.init_from_step = "best"
  with pytest.raises(UserError, match=r"init_from_step='best' needs config\.init_from, the folder"):
    check_config(config)
  config.init_from = "/runs/other"
  check_config(config)


def test_the_best_metric_is_one_of_the_model():
  config = coco_mask.get_config()
  for name in ("segm/AR@100", "bbox/dAP-Cls", "context/accuracy"):
    config.checkpoint.best_metric = name
    check_config(config)
  config.model.mask_head.enabled = False
  config.checkpoint.best_metric = "segm/AP"
  with pytest.raises(UserError, match=r"'segm/AP' must be one of bbox/AP, .*bbox/APl, .*context/"):
    check_config(config)
  config.checkpoint.best_metric = ""
  config.eval.patience = 2
  with pytest.raises(
    UserError, match=r"patience=2 needs config\.checkpoint\.best_metric, such as "
  ):
    check_config(config)
  config = cityscapes.get_config()
  config.checkpoint.best_metric = "IoU/road"
  check_config(config)


def test_a_model_that_does_not_exist_is_reported():
  config = coco_mask.get_config()
  config.model.name = "yolo"
  with pytest.raises(UserError, match="'yolo' does not exist; choose one of rcnn, segmenter"):
    check_config(config)


def test_a_model_of_another_task_is_reported():
  config = coco_mask.get_config()
  config.model.name = "segmenter"
  with pytest.raises(
    UserError, match=r"no field eval\.overlap, which model\.name='segmenter' needs"
  ):
    check_config(config)


def test_a_trained_model_opens_whatever_its_training_was():
  config = coco_mask.get_config()
  config.optim.learning_rate = 0.0
  config.checkpoint.keep = 0
  check_config(config, training=False)
  config.eval.batch_size = 0
  with pytest.raises(UserError, match=r"config\.eval\.batch_size=0"):
    check_config(config, training=False)


def test_short_names_of_dtypes_are_accepted():
  config = coco_mask.get_config()
  config.model.dtype = "bf16"
  check_config(config)
  assert config.model.dtype == "bfloat16"


def test_zero_steps_are_derived_from_the_number_of_images():
  config = coco_mask.get_config()
  config.steps = 0
  check_config(config)
  assert total_steps(config) == 160_000


@pytest.mark.parametrize("module", [coco_mask, cityscapes])
@pytest.mark.parametrize("name", ["step", "cosine", "poly"])
def test_every_schedule_works_with_every_config(module, name):
  config = module.get_config()
  config.optim.schedule = name
  check_config(config)
  rate = schedule(config)
  total = total_steps(config)
  assert rate(total // 2) > rate(total - 1) >= 0
