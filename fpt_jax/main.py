"""The command line.

    python -m fpt_jax.main --config=configs/coco_mask.py --workdir=/runs/coco_mask [--mode=train]

Any field of the config can be set: --config.batch_size=16 --config.data.source=/data/coco.
"""

import logging as python_logging
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from fpt_jax import checkpoints, data, sharding
from fpt_jax.errors import UserError
from fpt_jax.evaluate import evaluate
from fpt_jax.predict import predict
from fpt_jax.restored import open_run
from fpt_jax.train import train

MODES = ("prepare", "train", "eval", "predict")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File of the config; eval and predict take the run's own where it is not given."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run: checkpoints, metrics and pictures. A disk or gs://bucket/run."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  MODES,
  "prepare: write the records of the data. train: train, evaluating as it goes. eval: evaluate a "
  "checkpoint. predict: detect in --images.",
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate or predict with; newest if absent.")
_IMAGES = flags.DEFINE_list("images", [], "Image files and folders for --mode=predict.")
_MIN_SCORE = flags.DEFINE_float("min_score", 0.5, "Least score of a detection that is drawn.")


def run() -> None:
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
  checkpoints.folder(workdir)
  sharding.initialize()
  if mode == "train":
    train(config, workdir)
    return
  config = checkpoints.config_of_run(workdir, config)
  restored = open_run(workdir, config, _STEP.value)
  if mode == "eval":
    mesh = sharding.mesh(config.eval.batch_size)
    arrays = sharding.replicate(restored.arrays, mesh)
    evaluate(config, restored.structure, arrays, mesh, workdir)
  else:
    predict(
      restored,
      _IMAGES.value,
      workdir,
      min_score=_MIN_SCORE.value,
      skip_bad=config.data.skip_bad,
    )


def quiet_log() -> None:
  """Our own lines and everybody's warnings, with the time and without the rest of absl's prefix."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(
    lambda record: record.levelno >= python_logging.WARNING or "fpt_jax" in record.pathname
  )


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with a config's mistakes told in one line."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    tell_and_exit(error)


def tell_and_exit(error: BaseException) -> None:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)


def main(argv: list[str]) -> None:
  quiet_log()
  if len(argv) > 1:
    tell_and_exit(UserError(f"{argv[1]!r} is no flag; flags begin with --"))
  try:
    run()
  except UserError as error:
    tell_and_exit(error)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
