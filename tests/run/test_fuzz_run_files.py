"""Whatever the bytes of config.json and metrics.jsonl: they are read, or a UserError says why not."""

import json
import math
import pathlib
import tempfile

import pytest
from hypothesis import strategies as st

from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.run.config_file import read_config
from fpt_jax.run.metrics import losses_and_evaluations, read_metrics
from fpt_jax.tasks.task import check_config
from tests.fuzz import damage, fuzz

CONFIGS = [json.loads(module.get_config().to_json()) for module in (coco_mask, cityscapes)]
LINES = b"".join(
  json.dumps(line).encode() + b"\n"
  for line in ({"step": 1, "total_loss": 2.5, "lr": 1e-3}, {"step": 2, "mIoU": 31.0})
)
EDITS = st.lists(
  st.tuples(
    st.integers(0, 2**16),
    st.integers(0, 9),
    st.binary(max_size=5)
    | st.sampled_from([b"{", b"[", b'"', b"\n", b"null", b"1e999", b"9" * 4400]),
  ),
  max_size=4,
)
VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.sampled_from([10**400, "name", "model", "bf16"])
  | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=5,
)


def _paths(tree: dict, path: tuple = ()) -> list[tuple]:
  inner = [_paths(v, (*path, k)) for k, v in tree.items() if isinstance(v, dict)]
  return [(*path, k) for k in tree] + [p for paths in inner for p in paths]


def _check(name: str, data: bytes, read) -> None:
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, name).write_bytes(data)
    try:
      read(folder)
    except UserError as error:
      assert "Traceback" not in str(error)


def _read_and_check_config(folder: str) -> None:
  check_config(read_config(folder))


def _read_metrics(folder: str) -> None:
  for entry in read_metrics(folder):
    assert all(math.isfinite(float(value)) for value in entry.values())
  losses_and_evaluations(folder)


@pytest.mark.parametrize("config", CONFIGS)
def test_damaged_configs(config):
  whole = json.dumps(config).encode()
  changed = EDITS.map(lambda edits: damage(whole, edits))
  fuzz(changed | st.binary(), lambda data: _check("config.json", data, _read_and_check_config))


@st.composite
def changed_fields(draw) -> bytes:
  config = json.loads(json.dumps(draw(st.sampled_from(CONFIGS))))
  for path in draw(st.lists(st.sampled_from(_paths(config)), min_size=1, max_size=3)):
    group = config
    for name in path[:-1]:
      group = group.get(name) if isinstance(group, dict) else None
    if isinstance(group, dict):
      if draw(st.booleans()):
        group[path[-1]] = draw(VALUES)
      else:
        group.pop(path[-1], None)
  return json.dumps(config).encode()


def test_configs_with_other_values():
  fuzz(changed_fields(), lambda data: _check("config.json", data, _read_and_check_config))


def test_config_files_of_any_json():
  values = VALUES.map(lambda value: json.dumps(value).encode())
  fuzz(values, lambda data: _check("config.json", data, _read_and_check_config))


def test_metrics():
  lines = st.lists(
    st.dictionaries(st.sampled_from(["step", "total_loss", "x"]), VALUES).map(json.dumps)
    | VALUES.map(json.dumps),
    max_size=3,
  ).map(lambda texts: "\n".join(texts).encode())
  changed = EDITS.map(lambda edits: damage(LINES, edits))
  fuzz(lines | changed, lambda data: _check("metrics.jsonl", data, _read_metrics))
