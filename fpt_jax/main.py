"""The command line.

    python -m fpt_jax.main --config=configs/coco_mask.py --workdir=/runs/coco_mask [--mode=train]

Any field of the config can be set: --config.batch_size=16 --config.data.source=/data/coco.
"""

import os

# TensorFlow reads images here and computes nothing: what it says of its own speed is noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import config_flags

from fpt_jax import analyze, data
from fpt_jax.browse import browse
from fpt_jax.errors import UserError
from fpt_jax.predict import image_files, predict, subjects_of_files, subjects_of_split
from fpt_jax.restored import open_run
from fpt_jax.run import checkpoints, command_line, sharding
from fpt_jax.tasks import task_of
from fpt_jax.train import train

MODES = ("prepare", "browse", "train", "eval", "predict", "analyze")

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "File of the config; browse, eval, predict and analyze take the run's own where it is not given.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run: checkpoints, metrics and pictures. A disk or gs://bucket/run."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  MODES,
  "prepare: write the records of the data. browse: draw what a model is fed. train: train, evaluating "
  "as it goes. eval: evaluate a checkpoint. predict: look at images and draw. analyze: count "
  "parameters, multiply-adds and memory.",
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint to evaluate or predict with; newest if absent."
)
_IMAGES = flags.DEFINE_list(
  "images",
  [],
  "Image files and folders for --mode=predict; the images of config.data.eval_split if absent.",
)
_TABLE = flags.DEFINE_integer(
  "table", None, "For --mode=analyze: a table of the paper, instead of a config; all its rows."
)
_MARKDOWN = flags.DEFINE_bool("markdown", False, "Print a --table as the README has it.")
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 12, "Training images to draw in --mode=browse.", lower_bound=1
)
_MIN_SCORE = flags.DEFINE_float("min_score", 0.5, "Least score of a detection that is drawn.")


def main() -> None:
  """Runs the mode that the flags name.

  Raises:
    UserError: something the user can mend.
  """
  config, workdir, mode = _CONFIG.value, _WORKDIR.value, _MODE.value
  if mode in ("prepare", "train") and config is None:
    raise UserError(f"--mode={mode} needs --config=FILE, such as configs/coco_mask.py")
  if mode == "prepare":
    data.prepare(config.data)
    return
  if mode == "analyze":
    if _TABLE.value is not None:
      if config is not None:
        raise UserError("--table counts the configs of its own rows: leave out --config or --table")
      analyze.analyze_table(_TABLE.value, workdir, markdown=_MARKDOWN.value)
      return
    if config is None and not workdir:
      raise UserError("--mode=analyze needs --config=FILE, --workdir or --table=1")
    analyze.analyze_model(config or checkpoints.read_config(workdir), workdir)
    return
  checkpoints.folder(workdir)
  sharding.initialize()
  if mode == "train":
    train(config, workdir)
    return
  if mode == "browse":
    browse(config or checkpoints.read_config(workdir), workdir, _NUM_IMAGES.value)
    return
  config = checkpoints.config_of_run(workdir, config)
  restored = open_run(workdir, config, _STEP.value)
  if mode == "eval":
    mesh = sharding.mesh(config.eval.batch_size)
    arrays = sharding.replicate(restored.arrays, mesh)
    task_of(config).evaluate(config, restored.structure, arrays, mesh, workdir)
    return
  if _IMAGES.value:
    files = image_files(_IMAGES.value)
    subjects, total = subjects_of_files(files, skip_bad=config.data.skip_bad), len(files)
  else:
    subjects = subjects_of_split(config)
    total = data.num_images(config.data, config.data.eval_split)
  predict(restored, subjects, total, workdir, min_score=_MIN_SCORE.value)


if __name__ == "__main__":
  command_line.run(main)
