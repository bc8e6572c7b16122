"""A config that an earlier version wrote is read with the fields of this version."""

import json

import pytest

from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.run.config_file import read_config, write_config

LATER = {
  coco_mask: (
    "data.canvas_multiple", "model.aligned", "model.canonical_size", "model.channel_order",
    "model.backbone.context", "model.pyramid.level_norm", "model.fpt.window", "eval.flip", "eval.short_edges",
    "optim.frozen",
  ),
  cityscapes: ("model.swaps", "model.class_weights", "optim.frozen"),
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
