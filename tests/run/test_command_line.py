"""The config flag: benchmarks of an installed package, and mistakes in files and in overrides."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from fpt_jax import configs
from fpt_jax.errors import UserError
from fpt_jax.run.command_line import (
  check_field,
  find_config,
  keep_compiled_programs,
  load_config,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
BENCHMARKS = configs.benchmarks()
PROGRAM = """
from absl import flags
from ml_collections import config_flags
from fpt_jax import configs
from fpt_jax.run import command_line
CONFIG = config_flags.DEFINE_config_file("config")
command_line.run(lambda: print("steps", CONFIG.value.steps), configs.benchmarks())
"""


def run(folder, *flags):
  """Runs a small command with a config flag in a folder; returns its status, output and error lines."""
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "Traceback"))]
  return done.returncode, done.stdout, errors


def test_benchmarks_are_found_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = str(BENCHMARKS["coco_mask"])
  for given, expected in (
    (["--config=configs/coco_mask.py"], [f"--config={file}"]),
    (["--config=configs/coco_mask.py:demo,fpt=st"], [f"--config={file}:demo,fpt=st"]),
    (["--config", "configs/coco_mask.py", "--x=1"], ["--config", file, "--x=1"]),
    (["--config=mine/coco_mask.py"], ["--config=mine/coco_mask.py"]),
    (["--config=configs/none.py"], ["--config=configs/none.py"]),
  ):
    assert find_config(given, BENCHMARKS) == expected
  # a file on disk takes precedence
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "coco_mask.py").write_text("")
  given = ["--config=configs/coco_mask.py"]
  assert find_config(given, BENCHMARKS) == given


def test_a_benchmark_and_a_users_file_in_another_folder(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from fpt_jax.configs import coco_mask\n\n\n"
    "def get_config(arg=''):\n"
    "  config = coco_mask.get_config('demo')\n"
    "  config.steps = 7\n"
    "  return config\n"
  )
  assert run(tmp_path, "--config=configs/coco_mask.py:demo")[:2] == (0, "steps 300\n")
  assert run(tmp_path, "--config=mine.py", "--config.log_every=9")[:2] == (0, "steps 7\n")
  status, _, errors = run(tmp_path, "--config=mine.py", "--config.optim.rate=9")
  assert status == 2 and len(errors) == 1 and "--config has no field optim.rate" in errors[0]


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    ("import nothing_of_this_name", "line 4: No module named 'nothing_of_this_name'"),
    ("config.steps = = 3", "line 4: invalid syntax"),
    ("config.steps = undefined", "line 4: name 'undefined' is not defined"),
    ("config.stepz = 3", "line 4: the config has no field stepz; did you mean steps?"),
    ("config.images = 100", "line 4: config.images is now config.train_images"),
    ("x = config.images", "line 4: config.images is now config.train_images"),
    (
      "config.data.short_edge_min = 9",
      "line 4: config.data.short_edge_min is now config.data.train",
    ),
    (
      "config.model.test.short_edges = (9,)",
      "line 4: config.model.test.short_edges is now config.eva",
    ),
    ("config.model.head = 'augmented'", "line 4: config.model.head is now config.model.head.name"),
    (
      "test = config.model.test; test.flip = True",
      "line 4: config.model.test.flip is now config.eval",
    ),
    ("config.context = 1", "line 4: the config has no field context"),
    ("x = config.model.stepz", "line 4: the config has no field stepz"),
    ("config.eval.short_edges = (1, 2.5)['x']", "line 4: TypeError: tuple indices"),
  ],
)
def test_mistakes_in_a_config_file_are_reported(line, expected, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    "from fpt_jax.configs import coco_mask\ndef get_config():\n"
    f"  config = coco_mask.get_config('demo')\n  {line}\n  return config\n"
  )
  with pytest.raises(UserError) as raised:
    load_config("mine.py")
  assert str(raised.value).startswith(f"--config=mine.py: {expected}"), raised.value


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    ("x = 1\n", "the file has no function get_config"),
    ("def get_config():\n  return 5\n", "get_config must return a config"),
    ("def get_config():\n  pass\n", "get_config must return a config"),
  ],
)
def test_files_without_a_config(content, expected, tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the tests before
  (tmp_path / "mine.py").write_text(content)
  with pytest.raises(UserError, match=expected):
    load_config(str(tmp_path / "mine.py"))


def test_words_that_do_not_exist_are_reported(tmp_path):
  with pytest.raises(UserError, match=r"coco_mask.py:smal: the word 'smal' does not exist; choose"):
    load_config(f"{BENCHMARKS['coco_mask']}:smal")
  with pytest.raises(UserError, match=r"none.py does not exist"):
    load_config(str(tmp_path / "none.py"))


def test_fields_without_a_config_are_reported(tmp_path):
  code, _, (error,) = run(tmp_path, "--config.data.skip_bad")
  assert code == 2 and "--config.data.skip_bad changes a field of a config; it needs" in error


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    ("images", "9", r"--config\.images is now --config\.train_images"),
    ("data.short_edge_min", "9", r"is now --config\.data\.train_sizes"),
    ("model.head", "augmented", r"--config\.model\.head is now --config\.model\.head\.name"),
    ("model.test.flip", None, r"is now --config\.eval\.flip"),
    ("model.test.short_edges", "(9,)", r"is now --config\.eval\.short_edges"),
    ("model", "9", r"--config\.model is a group; set one of its fields: "),
    ("batch", "9", "no field batch; did you mean batch_size"),
    ("model.zzz", "9", r"no field model\.zzz; its fields are "),
    ("steps.x", "9", "steps is a value and has no fields"),
  ],
)
def test_overrides_of_fields_that_do_not_exist_are_reported(path, value, words):
  from fpt_jax.configs import coco_mask

  config = coco_mask.get_config()
  with pytest.raises(UserError, match=words):
    check_field(config, path, value)
  check_field(config, "data.images", "/data")


@pytest.fixture
def cache_folder(monkeypatch):
  """JAX's own setting; it has the value of before afterwards."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  jax.config.update("jax_compilation_cache_dir", None)
  yield lambda: jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_for_each_kind_of_cpu(cache_folder, monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  keep_compiled_programs("~/.cache/fpt_jax")
  folder, _, kind = cache_folder().rpartition("/")
  assert folder == "/home/someone/.cache/fpt_jax" and kind.startswith(f"{platform.machine()}_")


@pytest.mark.parametrize(("folder", "variable"), [("off", ""), ("/a", "/b")])
def test_the_compilation_cache_is_off_or_that_of_jax(folder, variable, cache_folder, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
  keep_compiled_programs(folder)
  assert cache_folder() is None
