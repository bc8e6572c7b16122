"""What a resumed run may change, how changes are kept, and damaged configs."""

import json

import pytest

from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.run.config_file import (
  changes,
  check_resumable,
  read_config,
  record_changes,
  write_config,
)


def changed(**fields):
  saved, config = coco_mask.get_config("demo"), coco_mask.get_config("demo")
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  return changes(saved, config)


def check(found, **options):
  check_resumable(
    found,
    **dict(old_steps=300, new_steps=300, start=100, same_files=True, workdir="w", allow=False)
    | options,
  )


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"eval__every_steps": 7, "eval__flip": True, "log_every": 1},
    {"checkpoint__every_steps": 7, "checkpoint__keep": 1},
    {"data__source": "/elsewhere", "data__data_dir": "/elsewhere", "data__eval_split": "val[:3]"},
    {"data__num_workers": 3, "data__prefetch": 9, "model__test__score_threshold": 0.5},
    {"init_from": "/weights", "name": "another", "loggers": ("wandb",)},
    {"data__annotations": "a.json", "data__images": "images"},
  ],
)
def test_what_does_not_change_the_training_is_free(fields):
  found = changed(**fields)
  assert set(found) == {name.replace("__", ".") for name in fields}
  check(found)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("seed", 1),
    ("batch_size", 16),
    ("optim__learning_rate", 0.1),
    ("optim__decay_at", (0.5,)),
    ("data__flip", False),
    ("data__train_split", "train[:10]"),
    ("data__builder__train_size", 17),
    ("model__rpn__train__post_nms", 11),
    ("model__dtype", "bfloat16"),
  ],
)
def test_another_training_is_refused_unless_it_is_allowed(field, value):
  found = changed(**{field: value})
  (name,) = found
  assert name == field.replace("__", ".")
  with pytest.raises(UserError, match=rf"100 steps with another config \({name} was .*, now .*\)"):
    check(found)
  check(found, allow=True)


def test_paths_are_free_if_the_files_are_the_same():
  found = changed(data__annotations="b.json", data__images="b")
  check(found)
  with pytest.raises(UserError, match=r"data\.annotations was , now b\.json; data\.images was"):
    check(found, same_files=False)
  with pytest.raises(UserError, match=r"\(the files of data\.train_split have changed\)"):
    check(changed(data__digest="abc"), same_files=False)


def test_more_steps_are_free_and_fewer_are_not():
  check(changed(steps=400), new_steps=400)
  with pytest.raises(UserError, match="steps was 300, now 200"):
    check(changed(steps=200), new_steps=200)
  check(changed(steps=200), new_steps=200, allow=True)
  with pytest.raises(UserError, match="has done 100 steps, and the config has 50"):
    check(changed(steps=50), new_steps=50, allow=True)


def test_fields_of_other_versions_are_not_compared():
  saved, config = coco_mask.get_config("demo"), coco_mask.get_config("demo")
  for tree, name in ((saved, "old_field"), (config, "new_field")):
    with tree.unlocked():
      tree[name] = 1
  assert changes(saved, config) == {}


def test_a_group_in_the_place_of_a_value_is_a_change():
  saved, config = coco_mask.get_config(), coco_mask.get_config()
  config.data.builder.splits = {"train": ("x.json", "images")}
  assert changes(saved, config) == {"data.builder.splits": (None, {"train": ["x.json", "images"]})}


def test_changes_are_appended_to_the_history(tmp_path):
  record_changes(str(tmp_path), {}, 5)
  assert not list(tmp_path.iterdir())
  record_changes(str(tmp_path), changed(seed=3), 5)
  with (tmp_path / "config_history.jsonl").open("ab") as file:
    file.write(b"\xff\n")  # damage is kept as it is
  record_changes(str(tmp_path), changed(log_every=7, eval__flip=True), 9)
  lines = (tmp_path / "config_history.jsonl").read_bytes().splitlines()
  assert lines.pop(1) == b"\xff"
  first, second = map(json.loads, lines)
  assert first["step"] == 5 and first["changed"] == {"seed": {"from": 0, "to": 3}}
  assert second["step"] == 9 and set(second["changed"]) == {"log_every", "eval.flip"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "line 1, column 1: not valid JSON"),
    (b"\xff", "byte 0 is not text"),
    (b"[]", "is not a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b"{}", "data is missing, not a group of fields"),
    ({"model": 3}, "model is 3, not a group of fields"),
    ({"model.fpt": None}, "model.fpt is missing, not a group"),
    ({"model.name": None}, "model.name is missing, not a name"),
    ({"model.name": ["rcnn"]}, 'model.name is \\["rcnn"\\], not a name'),
    ({"a": {"b.c": 1}}, "is not the config of a run"),
  ],
)
def test_damaged_configs_are_reported_in_one_line(content, message, tmp_path):
  if isinstance(content, dict):
    config = json.loads(coco_mask.get_config().to_json())
    for path, value in content.items():
      *groups, field = path.split(".")
      group = config
      for name in groups:
        group = group[name]
      group[field] = value
    content = json.dumps(config).encode()
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=rf"config\.json.*{message}.*; restore the file") as error:
    read_config(str(tmp_path))
  assert "\n" not in str(error.value)
  assert (tmp_path / "config.json").read_bytes() == content


def test_a_full_disk_keeps_the_config(tmp_path, full_disk):
  write_config(str(tmp_path), coco_mask.get_config())
  before = (tmp_path / "config.json").read_bytes()
  with full_disk(100), pytest.raises(UserError, match=r"config\.json cannot be written"):
    write_config(str(tmp_path), coco_mask.get_config())
  assert (tmp_path / "config.json").read_bytes() == before
