"""Predictions for images: pictures and JSON."""

from collections.abc import Iterator

import numpy as np
from absl import logging

from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.restored import Restored
from fpt_jax.run.folder import make_folder, run_folder, write_whole
from fpt_jax.run.json_lines import JsonLines, lines_of
from fpt_jax.run.progress import Progress
from fpt_jax.tasks import pictures
from fpt_jax.tasks.subjects import LeftOut, Subject, unused_path
from fpt_jax.tasks.task import task_of

FOLDER = "predictions"
SHEET_PICTURES = 12
SHEET_COLUMNS = 3


def predict(
  restored: Restored,
  subjects: Iterator[Subject | UserError],
  total: int,
  workdir: str,
  *,
  min_score: float,
) -> None:
  """Makes predictions for images and draws them, next to the ground truth where there is one.

  For every image, writes `predictions/<name>.png`, the task's other files, such as
  `predictions/<name>_labels.png`, and appends the task's entries to `predictions/predictions.jsonl`. At the
  end, or when an error ends the work, `predictions/predictions.json` is made from it, a list of all entries,
  and `predictions/contact_sheet.png` from the first pictures.

  Args:
    restored: the model.
    subjects: the images; an image that cannot be read is an error in its place.
    total: number of images, for the progress bar.
    workdir: folder of the run, on a disk or in a bucket.
    min_score: lowest score of a detection that is drawn; the JSON has every detection.

  Raises:
    UserError: images could not be read, and the others are done; or a file could not be written.
  """
  out = run_folder(workdir) / FOLDER
  make_folder(out)
  config = restored.config
  task = task_of(config)
  taken: set[str] = set()
  sheet: list[np.ndarray] = []
  left_out = LeftOut()
  lines = JsonLines(out / "predictions.jsonl")
  done = 0
  try:
    with lines, Progress("predict", total) as progress:
      for subject in subjects:
        if isinstance(subject, UserError):
          left_out.add(subject)
        else:
          found = restored.infer(subject.image_HWC)
          picture = task.draw_prediction(config, subject.image_HWC, found, subject.truth, min_score)
          path = unused_path(out, subject.stem, taken)
          write_whole(path, encode_png(picture))
          task.write_prediction(config, workdir, path.stem, subject.name, found)
          entries = task.to_entries(config, subject.name, found)
          lines.write([entry | subject.place for entry in entries])
          if len(sheet) < SHEET_PICTURES:
            sheet.append(picture)
          done += 1
        progress.advance()
  finally:
    if done:
      write_whole(out / "predictions.json", f"[{', '.join(lines_of(lines.path))}]")
      overview = pictures.contact_sheet(sheet, SHEET_COLUMNS)
      write_whole(out / "contact_sheet.png", encode_png(overview))
  left_out.check(done, out)
  logging.info("%d pictures, contact_sheet.png and predictions.json in %s", done, out)
