"""A config that an earlier version wrote is read with the fields of this version."""

import json

import pytest

from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.data.transforms import draw_train_size
from fpt_jax.errors import UserError
from fpt_jax.run.config_file import read_config, write_config
from fpt_jax.tasks.task import check_config

LATER = {
  coco_mask: (
    "data.canvas_multiple", "data.exif", "model.aligned", "model.canonical_size", "model.channel_order",
    "model.backbone.context", "model.pyramid.level_norm", "model.fpt.window", "eval.flip", "eval.short_edges",
    "optim.frozen", "optim.accumulate_steps", "model.remat", "model.remat_parts", "data.cache_dir",
    "checkpoint.every_minutes", "mesh", "data.resize", "model.rpn.round_anchors", "model.rpn.min_side",
    "model.test.min_side", "optim.decay_biases_and_norms", "optim.bias_rate", "model.box_head.beta",
    "optim.name", "optim.beta1", "optim.beta2", "optim.epsilon", "optim.groups", "optim.ema_decay",
    "data.train_long_edge", "data.crop", "data.scale", "data.copy_paste", "data.filter_empty",
    "data.color_jitter", "model.backbone.upsampling", "model.rpn.convs", "model.box_head.convs",
    "model.box_head.linears", "model.box_head.norm", "model.mask_head.norm", "data.format", "name", "loggers",
    "eval.sets", "init_from_step",
  ),
  cityscapes: (
    "data.exif", "data.cache_dir", "data.color_jitter", "model.swaps", "model.class_weights",
    "optim.frozen", "model.remat",
    "model.remat_parts", "model.hard_pixels", "model.hard_probability", "model.head.dropout_of",
    "optim.decay_biases_and_norms", "optim.bias_rate", "model.backbone.upsampling", "model.edges", "name",
    "loggers", "eval.sets", "init_from_step",
  ),
}  # fmt: skip


@pytest.mark.parametrize("module", LATER)
def test_fields_of_later_versions_are_added(module, tmp_path):
  whole = json.loads(module.get_config().to_json())
  older = json.loads(json.dumps(whole))
  for path in LATER[module]:
    *groups, field = path.split(".")
    group = older
    for name in groups:
      group = group[name]
    del group[field]
  (tmp_path / "config.json").write_text(json.dumps(older))
  assert json.loads(read_config(str(tmp_path)).to_json()) == whole


def test_values_of_a_run_are_kept(tmp_path):
  config = coco_mask.get_config("small,backbone=efficientnet_lite0")
  write_config(str(tmp_path), config)
  read = read_config(str(tmp_path))
  assert read.model.pyramid.level_norm == "sync_bn"
  assert read.model.canonical_size == 84.0


def older(module, changes, tmp_path):
  """Reads today's config of a benchmark after its JSON was changed to an earlier form."""
  config = json.loads(module.get_config().to_json())
  for path, value in changes.items():
    *groups, field = path.split(".")
    group = config
    for name in groups:
      group = group[name]
    if value is None:
      del group[field]
    else:
      group[field] = value
  (tmp_path / "config.json").write_text(json.dumps(config))
  return read_config(str(tmp_path))


DETECTION = {
  "train_images": None, "images": 800, "data.train_sizes": None, "data.short_edge_min": 96,
  "model.head": "augmented", "eval.short_edges": None, "model.test.short_edges": [600, 800],
  "eval.flip": None, "model.test.flip": True, "model.pyramid.norm": None, "optim.power": None,
  "data.num_workers": None, "data.prefetch": None, "data.builder": None,
}  # fmt: skip
SEGMENTATION = {
  "train_images": None, "images": 800, "data.train_sizes": None, "data.short_edges": [9, 30],
  "data.scale": None, "data.scale_min": 0.75, "data.scale_max": 1.5,
  "model.head.name": None, "model.head.context": "apnb", "model.head.dropout_of": None,
  "optim.decay_at": None, "optim.decay_factor": None,
}  # fmt: skip


def test_renamed_fields_of_detection(tmp_path):
  config = older(coco_mask, DETECTION, tmp_path)
  assert config.train_images == 800 and "images" not in config
  assert config.data.train_sizes == (96, 800) and "short_edge_min" not in config.data
  assert config.model.head.to_dict() == {"name": "augmented"}
  assert tuple(config.eval.short_edges) == (600, 800) and config.eval.flip
  assert "short_edges" not in config.model.test and "flip" not in config.model.test
  assert config.model.pyramid.norm == "none" and config.data.builder.to_dict() == {}
  check_config(config)
  assert older(coco_mask, DETECTION | {"data.short_edge_min": 0}, tmp_path).data.train_sizes == ()


def test_renamed_fields_of_segmentation(tmp_path):
  config = older(cityscapes, SEGMENTATION, tmp_path)
  assert config.train_images == 800 and config.data.scale == (0.75, 1.5)
  assert config.model.head.name == "apnb" and "context" not in config.model.head
  assert config.model.head.dropout_of == "channels"
  check_config(config)
  plain = older(cityscapes, SEGMENTATION | {"model.head.context": "none"}, tmp_path)
  assert plain.model.head.name == "fcn"


@pytest.mark.parametrize("field", ["name", "context"])
@pytest.mark.parametrize("head", ["oc_base", "oc_pyramid", "oc_asp", "acf"])
def test_heads_that_had_other_layers_are_refused_in_one_line(head, field, tmp_path):
  changes = {"model.head.dropout_of": None, "model.head.name": None, f"model.head.{field}": head}
  with pytest.raises(
    UserError, match=rf"config\.json: the head '{head}' .* has other layers"
  ) as error:
    older(cityscapes, changes, tmp_path)
  assert "\n" not in str(error.value)
  write_config(str(tmp_path), cityscapes.get_config(f"fpt=none,pyramid=none,context={head}"))
  assert read_config(str(tmp_path)).model.head.name == head


def test_logits_of_older_runs_are_enlarged_with_half_pixel_centres(tmp_path):
  assert cityscapes.get_config().model.align_corners
  config = older(cityscapes, {"model.align_corners": None}, tmp_path)
  assert config.model.align_corners is False
  check_config(config)


def test_a_form_of_windows_that_had_a_name_of_its_own(tmp_path):
  config = older(cityscapes, SEGMENTATION | {"model.fpt.implementation": "tiled"}, tmp_path)
  assert config.model.fpt.implementation == "auto"
  check_config(config)


@pytest.mark.parametrize("sizes", [(), (9, 30), (269, 369, 469, 569)])
def test_lists_of_shorter_edges_draw_as_before(sizes, tmp_path):
  config = older(cityscapes, SEGMENTATION | {"data.short_edges": list(sizes)}, tmp_path)
  for bits in range(12 if sizes else 0):
    drawn = draw_train_size(bits, tuple(config.data.train_sizes))
    assert drawn == sizes[bits % len(sizes)]
  assert bool(config.data.train_sizes) == bool(sizes)
