#!/usr/bin/env python3
"""Shows the predictions of several runs side by side, and prints the metrics of their last evaluations.

    python scripts/compare_runs.py --out=side_by_side.png FPT=/runs/fpt BFP=/runs/bfp
    python scripts/compare_runs.py --names=002003 --explain=FPT FPT=/runs/fpt BFP=/runs/bfp

The pictures are those that `--mode=predict` has drawn into the folders of the runs: those of the same name in
one row, each run in a column. --explain=NAME adds what `--mode=explain` has drawn for a run.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # as fpt_jax.main

import argparse
import io

import numpy as np
import rich.table
from etils import epath
from PIL import Image

from fpt_jax.errors import UserError
from fpt_jax.run.folder import run_folder
from fpt_jax.run.metrics import losses_and_evaluations
from fpt_jax.tasks.pictures import contact_sheet

MOST_ROWS = 6
SHOWN = (
  "context/",
  "bbox/AP",
  "segm/AP",
  "mIoU",
  "mAcc",
  "aAcc",
)  # beginnings of the printed metrics


def last_evaluation(workdir: str) -> dict[str, float]:
  """The metrics of a run's last evaluation, without those of training."""
  _, evaluations = losses_and_evaluations(workdir)
  if not evaluations:
    raise SystemExit(f"error: {workdir}: metrics.jsonl has no evaluation; train the run to its end")
  return {
    name: value
    for name, value in evaluations[-1].items()
    # of the set data.eval_split, and of those of config.eval.sets
    if name.startswith(SHOWN) or name.partition("/")[2].startswith(SHOWN)
  }


def pictures(workdir: str) -> dict[str, epath.Path]:
  """The pictures of a run's predictions by name."""
  files = sorted((run_folder(workdir) / "predictions").glob("*.png"))
  found = {f.name: f for f in files if f.stem != "contact_sheet" and not f.stem.endswith("_labels")}
  if not found:
    raise SystemExit(f"error: {workdir}/predictions has no pictures; run --mode=predict first")
  return found


def side_by_side(runs: dict[str, str], names: list[str], explained: str = "") -> np.ndarray:
  """uint8 RGB: one row per picture that all runs have, and one column per run.

  Args:
    runs: folders of the runs by name.
    names: names of the pictures without their ending; empty for the first ones.
    explained: name of the run whose explanations follow the rows; empty for none.
  """
  found = {name: pictures(workdir) for name, workdir in runs.items()}
  shared = sorted(set.intersection(*(set(files) for files in found.values())))
  if not shared:
    raise SystemExit("error: the runs have no pictures of the same images; predict the same images")
  rows: list[np.ndarray] = []
  for file in [f"{name}.png" for name in names] or shared[:MOST_ROWS]:
    if file not in shared:
      raise SystemExit(f"error: not all runs have predictions/{file}; predict the same images")
    images = [read_picture(files[file]) for files in found.values()]
    rows.append(contact_sheet(images, len(runs), list(runs)))
    if explained:
      rows.append(explanation(run_folder(runs[explained]) / "explain" / file, rows[0].shape[1]))
  return np.concatenate(rows)


def read_picture(path: epath.Path) -> np.ndarray:
  """uint8 RGB."""
  return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def explanation(path: epath.Path, width: int) -> np.ndarray:
  """uint8 RGB: a picture of --mode=explain, scaled to a width in pixels."""
  if not path.exists():
    raise SystemExit(f"error: {path} does not exist; run --mode=explain first")
  picture = Image.fromarray(read_picture(path))
  height = round(picture.height * width / picture.width)
  return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def table(runs: dict[str, str]) -> rich.table.Table:
  """One row per metric and one column per run."""
  metrics = {name: last_evaluation(workdir) for name, workdir in runs.items()}
  result = rich.table.Table("", *(rich.table.Column(name, justify="right") for name in runs))
  for metric in dict.fromkeys(m for values in metrics.values() for m in values):
    cells = (values.get(metric) for values in metrics.values())
    result.add_row(metric, *("-" if value is None else f"{value:.1f}" for value in cells))
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="side_by_side.png", help="picture to write")
  parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
  parser.add_argument(
    "--names", default="", help="pictures, separated by commas; default: the first"
  )
  parser.add_argument("--explain", default="", help="the run whose explanations are shown as well")
  arguments = parser.parse_args()
  runs = dict(run.split("=", 1) for run in arguments.runs if "=" in run)
  if len(runs) != len(arguments.runs):
    raise SystemExit("error: each run must be NAME=WORKDIR, with different names")
  if arguments.explain and arguments.explain not in runs:
    raise SystemExit(f"error: --explain={arguments.explain} must be one of {', '.join(runs)}")
  names = [name for name in arguments.names.split(",") if name]
  out = pathlib.Path(arguments.out).expanduser()
  try:
    Image.fromarray(side_by_side(runs, names, arguments.explain)).save(out)
    rich.print(table(runs))
  except UserError as error:
    raise SystemExit(f"error: {error}") from error
  print(f"side by side: {out}")


if __name__ == "__main__":
  main()
