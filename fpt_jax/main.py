"""The command line.

    python -m fpt_jax.main --config=configs/coco_mask.py --workdir=/runs/coco_mask [--mode=train]

Any field of the config can be set: --config.batch_size=16 --config.data.source=/data/coco.
"""

import os
from collections.abc import Iterator

# TensorFlow only reads images here, so its messages about performance do not matter.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import ConfigDict, config_flags

from fpt_jax import analyze, configs, data, explain, export, optim, predict
from fpt_jax.browse import browse
from fpt_jax.errors import UserError
from fpt_jax.evaluation import evaluator, prepare
from fpt_jax.restored import open_run
from fpt_jax.run import best, cluster, command_line, profile, sharding
from fpt_jax.run.config_file import config_of_run, read_config
from fpt_jax.run.folder import check_writable, folder_of, run_folder
from fpt_jax.tasks.subjects import (
  Subject,
  image_files,
  num_subjects,
  subjects_of_files,
  subjects_of_split,
)
from fpt_jax.tasks.task import check_config, check_types, task_of
from fpt_jax.train import train

MODES = ("prepare", "browse", "train", "eval", "predict", "explain", "analyze", "export")

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, optionally followed by a colon and words. Without it, browse, eval, predict, explain, "
  "analyze and export use the config of the run in --workdir.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run, for checkpoints, metrics and pictures: a local path or gs://bucket/run.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  MODES,
  "prepare: write the records of the data set. browse: draw training images with their targets. "
  "train: train and evaluate. eval: evaluate a checkpoint. predict: draw predictions for images. "
  "explain: draw what the transformers attend to. analyze: count parameters, multiply-adds and memory. "
  "export: write prediction as a program that runs without this package.",
)
_ALLOW_CONFIG_CHANGES = flags.DEFINE_bool(
  "allow_config_changes",
  False,
  "Resume a run even if its config has changed in a way that changes the training.",
)
_TAKE_OVER = flags.DEFINE_bool(
  "take_over",
  False,
  "Train in --workdir even if another process is training in it; that process stops.",
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  "",
  "FIRST:LAST, such as 20:25: write a profiler trace of these training steps, both included, into the folder "
  "profile of --workdir. The first step of a process also compiles.",
)
_find_cluster = cluster.define_flags()
flags.adopt_module_key_flags(cluster)  # --help lists them
flags.adopt_module_key_flags(command_line)
_STEP = flags.DEFINE_string(
  "step",
  "",
  "Step of the checkpoint for eval, predict, explain and export, or best: that of the best evaluation by "
  "config.checkpoint.best_metric. The newest by default.",
)
_IMAGES = flags.DEFINE_list(
  "images",
  [],
  "Image files, videos and folders of images for predict and explain, by default the images of "
  "config.data.eval_split; and for the check of export, by default a drawn one.",
)
_POINTS = flags.DEFINE_string(
  "points",
  "",
  "Positions x,y;x,y;... in pixels of the images for --mode=explain; by default, detections or the "
  "largest predicted classes.",
)
_TABLE = flags.DEFINE_integer(
  "table", None, "For --mode=analyze: count all rows of this table of the paper, not one config."
)
_MARKDOWN = flags.DEFINE_bool("markdown", False, "Print the --table as Markdown.")
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 12, "Number of training images to draw in --mode=browse.", lower_bound=1
)
_MIN_SCORE = flags.DEFINE_float(
  "min_score", 0.5, "Lowest score of a detection that predict draws and explain chooses."
)
_FORMAT = flags.DEFINE_enum(
  "format",
  "stablehlo",
  export.FORMATS,
  "For --mode=export. stablehlo: a file that jax.export reads. saved_model: TensorFlow's folder.",
)
_PLATFORMS = flags.DEFINE_list(
  "platforms",
  ["cpu"],
  f"For --mode=export: where the program will run, some of {','.join(export.PLATFORMS)}; one file for each.",
)
_CANVAS = flags.DEFINE_list(
  "canvas",
  [],
  "HEIGHT,WIDTH for --mode=export: the canvas that images are laid on, pixels; by default the first of "
  "config.data.buckets.",
)
_BATCH = flags.DEFINE_integer(
  "batch",
  None,
  "For --mode=export: number of images, all of one size, per call of the program; by default one image "
  "without a batch dimension.",
  lower_bound=1,
)
_EXPORT_DIR = flags.DEFINE_string(
  "export_dir", "", "Folder for --mode=export; the folder export of --workdir by default."
)


def main() -> None:
  """Runs the mode that the flags name.

  Raises:
    UserError: a mistake that the user can fix.
  """
  config, workdir, mode = _CONFIG.value, _WORKDIR.value, _MODE.value
  if mode in ("prepare", "train") and config is None:
    raise UserError(f"--mode={mode} needs --config=FILE, such as configs/coco_mask.py")
  if config is not None:
    check_config(config, training=mode in ("train", "browse"))
  if mode == "prepare":
    prepare(config)
    return
  if mode == "analyze":
    run_analyze(config, workdir)
    return
  run_folder(workdir)
  profile_steps = None
  if mode == "train":
    profile_steps = profile.parsed_steps(_PROFILE_STEPS.value, optim.total_steps(config))
  processes = _find_cluster()
  if processes and mode not in ("train", "eval"):
    raise UserError(
      f"--mode={mode} runs in one process, but {processes.source} names several; start it once, with "
      "--num_processes=1 (on a host of a TPU pod also with JAX_PLATFORMS=cpu)"
    )
  cluster.join(processes)
  if mode == "train":
    train(
      config,
      workdir,
      allow_config_changes=_ALLOW_CONFIG_CHANGES.value,
      take_over=_TAKE_OVER.value,
      profile_steps=profile_steps,
    )
  elif mode == "browse":
    browse(config or read_config(workdir), workdir, _NUM_IMAGES.value)
  elif mode == "eval":
    run_eval(config_to_use(workdir, config), workdir)
  elif mode == "predict":
    run_predict(config_to_use(workdir, config), workdir)
  elif mode == "explain":
    run_explain(config_to_use(workdir, config), workdir)
  else:
    run_export(config_to_use(workdir, config), workdir)


def config_to_use(workdir: str, config: ConfigDict | None) -> ConfigDict:
  """Returns `config`, or the config of the run in `workdir` if it is None.

  Raises:
    UserError: there is no run in `workdir`, or `config` describes another model.
  """
  saved = read_config(workdir)
  check_types(saved)
  task = task_of(config or saved)
  return config_of_run(
    saved, config, workdir, from_data=task.FROM_DATA, not_of_the_weights=task.NOT_OF_THE_WEIGHTS
  )


def run_analyze(config: ConfigDict | None, workdir: str) -> None:
  """Runs --mode=analyze."""
  if workdir:
    check_writable(run_folder(workdir))
  if _TABLE.value is not None:
    if config is not None:
      raise UserError("--table counts the configs of all its rows; leave out --config or --table")
    analyze.analyze_table(_TABLE.value, workdir, markdown=_MARKDOWN.value)
    return
  if config is None and not workdir:
    raise UserError("--mode=analyze needs --config=FILE, --workdir or --table=1")
  analyze.analyze_model(config or read_config(workdir), workdir)


def run_eval(config: ConfigDict, workdir: str) -> None:
  """Runs --mode=eval."""
  check_writable(run_folder(workdir) / "eval")
  restored = open_run(workdir, config, best.parsed_step(_STEP.value))
  mesh = sharding.mesh(config.mesh.shape, batch_sizes=(config.eval.batch_size,))
  evaluate = evaluator(config, restored.structure, mesh, workdir)
  arrays = sharding.place(restored.arrays, mesh)
  evaluate(arrays)


def run_predict(config: ConfigDict, workdir: str) -> None:
  """Runs --mode=predict."""
  check_writable(run_folder(workdir) / predict.FOLDER)
  restored = open_run(workdir, config, best.parsed_step(_STEP.value))
  predict.predict(restored, *chosen_images(config), workdir, min_score=_MIN_SCORE.value)


def run_explain(config: ConfigDict, workdir: str) -> None:
  """Runs --mode=explain."""
  points = explain.parsed_points(_POINTS.value)
  check_writable(run_folder(workdir) / explain.FOLDER)
  restored = open_run(workdir, config, best.parsed_step(_STEP.value))
  subjects = chosen_images(config)
  explain.explain(restored, *subjects, workdir, points=points, min_score=_MIN_SCORE.value)


def run_export(config: ConfigDict, workdir: str) -> None:
  """Runs --mode=export."""
  platforms = export.checked_platforms(_PLATFORMS.value)
  canvas = export.parsed_canvas(_CANVAS.value)
  out = run_folder(workdir) / export.FOLDER
  if _EXPORT_DIR.value:
    out = folder_of("--export_dir", _EXPORT_DIR.value)
  check_writable(out)
  subjects = None
  if _IMAGES.value:
    subjects, _ = chosen_images(config)
  restored = open_run(workdir, config, best.parsed_step(_STEP.value))
  export.export(
    restored,
    out,
    format=_FORMAT.value,
    platforms=platforms,
    canvas=canvas,
    batch=_BATCH.value,
    subjects=subjects,
  )


def chosen_images(config: ConfigDict) -> tuple[Iterator[Subject | UserError], int]:
  """Returns the images that --images names, or those of `config.data.eval_split`, and their number."""
  if _IMAGES.value:
    files = image_files(_IMAGES.value)
    subjects = subjects_of_files(files, exif=config.data.exif, skip_bad=config.data.skip_bad)
    return subjects, num_subjects(files)
  return subjects_of_split(config), data.num_images(config.data, config.data.eval_split)


if __name__ == "__main__":
  command_line.run(main, configs.benchmarks())
