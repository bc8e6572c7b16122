"""The command line reports every mistake in one line, and writes pictures and JSON for every image."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT, command, config_file, error_lines, succeed

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEMO = "--config=configs/coco_mask.py:demo"


def test_the_start_loads_only_what_it_needs():
  """These packages take seconds to import; they are loaded where they are used."""
  heavy = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "jax.experimental.pallas")
  program = f"import sys, fpt_jax.main; print([name for name in {heavy} if name in sys.modules])"
  assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "[]\n"


def test_pictures_are_drawn_in_a_fresh_process():
  """With nothing loaded but what the command line loads."""
  program = (
    "import fpt_jax.main, numpy as np; from fpt_jax.tasks import pictures; "
    "picture = pictures.draw_confusion(np.ones((2, 2), int), ('a', 'b'), 'pixels'); "
    "from fpt_jax.tasks import attention_pictures as drawn; axis = drawn.figures.Figure().subplots(); "
    "axis.add_patch(drawn.patches.Rectangle((0, 0), 1, 1)); print(picture.dtype, picture.ndim)"
  )
  assert (
    subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "uint8 3\n"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((DEMO, "--config.optim.learning_rat=1"), ("optim.learning_rat;", "mean learning_rate?")),
    ((DEMO, "--config.batch=3"), ("no field batch;", "mean batch_size?")),
    (
      (DEMO, "--config.model.fpt.zzz=3"),
      ("no field model.fpt.zzz;", "its fields are drop_block_schedule, drop_block_size, enabled, "),
    ),
    ((DEMO, "--config.model.name.x=3"), ("model.name is a value",)),
    (
      ("--config=configs/coco_mask.py:demoo",),
      ("the word 'demoo'", "choose one of small, tiny, demo"),
    ),
    (("--config=configs/none.py",), ("configs/none.py does not exist",)),
    ((DEMO, "--config.batch_size=many"), ("config.batch_size=many",)),
    ((DEMO,), ("--workdir is missing",)),
    ((DEMO, "--mode=trian"), ("trian", "prepare|browse|train|eval|predict|explain|analyze")),
    (("--mode=train", "--workdir=WORK"), ("--mode=train needs --config",)),
    (("--mode=eval", "--workdir=WORK/none"), ("none/config.json does not exist",)),
    (
      (
        "--config=configs/coco_mask.py",
        "--mode=prepare",
        "--config.data.source=WORK/none",
        "--config.data.data_dir=WORK",
      ),
      ("data.source=", "no such folder"),
    ),
    ((DEMO, "workdir=WORK"), ("unexpected argument 'workdir=",)),
    ((DEMO, "--workdir=WORK", "--config.model.backbone.name=vgg"), ("'vgg'", "resnet50")),
    ((DEMO, "--workdir=WORK", "--profile_steps=20-25"), ("must be FIRST:LAST, such as 20:25",)),
    ((DEMO, "--workdir=WORK", "--config.model.remat=all"), ("one of none, dots_saveable, noth",)),
  ],
)
def test_mistakes_are_reported_in_one_line(flags, words, tmp_path):
  flags = [flag.replace("WORK", str(tmp_path)) for flag in flags]
  process = (
    command(*flags, f"--config.data.data_dir={tmp_path}") if DEMO in flags else command(*flags)
  )
  lines = error_lines(process)
  assert process.returncode == 2
  assert len(lines) == 1 and lines[0].startswith("error:"), lines
  for part in words:
    assert part in lines[0]


@pytest.mark.slow
def test_a_mistake_inside_a_config_file_is_reported_with_its_line(tmp_path):
  file = tmp_path / "config.py"
  file.write_text("def get_config():\n  return {}['batch_size']\n")
  lines = error_lines(command(f"--config={file}", f"--workdir={tmp_path / 'run'}"))
  assert lines == [f"error: --config={file}: line 2: KeyError: batch_size"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  file = config_file(folder, steps=2)
  succeed(command(f"--config={file}", f"--workdir={folder / 'work'}"))
  return folder / "work", file


@pytest.mark.slow
def test_eval_gives_the_same_results_as_training(run):
  workdir, _ = run
  results = workdir / "eval" / "coco_instances_results.json"
  before = json.loads(results.read_text())
  results.unlink()
  succeed(command("--mode=eval", f"--workdir={workdir}"))
  assert json.loads(results.read_text()) == before


@pytest.mark.slow
def test_predict_draws_files_folders_and_splits(run, tmp_path, rng):
  workdir, file = run
  (tmp_path / "folder").mkdir()
  for name in ("a.png", "folder/a.jpg", "folder/b.png"):
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / name)
  Image.fromarray(rng.integers(0, 255, (30, 20), np.uint8)).save(tmp_path / "folder" / "grey.png")
  images = f"--images={tmp_path / 'a.png'},{tmp_path / 'folder'}"
  flags = ("--mode=predict", f"--workdir={workdir}", "--min_score=0")
  succeed(command(*flags, images))
  predictions = workdir / "predictions"
  names = {p.name for p in predictions.iterdir()}
  assert names == {
    "a.png", "a_2.png", "b.png", "grey.png", "contact_sheet.png", "predictions.json", "predictions.jsonl",
  }  # fmt: skip
  results = json.loads((predictions / "predictions.json").read_text())
  assert {r["file_name"] for r in results} <= {
    str(tmp_path / n) for n in ("a.png", "folder/a.jpg", "folder/b.png", "folder/grey.png")
  }

  succeed(command(*flags, f"--config={file}"))
  assert len(list(predictions.glob("*.png"))) == 5 + 4

  data = (tmp_path / "folder" / "a.jpg").read_bytes()
  (tmp_path / "folder" / "cut.jpg").write_bytes(data[: len(data) // 2])
  (line,) = error_lines(command(*flags, images))
  assert "cut.jpg is not a readable image" in line
  skip = (f"--config={file}", "--config.data.skip_bad")
  succeed(command(*flags, images, *skip))
