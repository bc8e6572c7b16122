"""Pictures of the training data as the model gets them: after augmentation, with the targets."""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.data.records.images import encode_png
from fpt_jax.run.folder import check_writable, make_folder, run_folder, write_whole
from fpt_jax.tasks import pictures
from fpt_jax.tasks.task import check_config, task_of

SHEET_COLUMNS = 2
SHEET_CELL_WIDTH = 800  # pixels


def browse(config: ConfigDict, workdir: str, num_images: int) -> None:
  """Draws the first training images of a run, in the order of training.

  Writes `browse/<number>_<image id>.png` and all of them as `browse/contact_sheet.png`. Needs neither a
  model nor a checkpoint.

  Args:
    config: config of a run.
    workdir: folder of the run, on a disk or in a bucket.
    num_images: number of images.

  Raises:
    UserError: the data cannot be read, or do not fit the config; or a file cannot be written.
  """
  check_config(config)
  out = run_folder(workdir) / "browse"
  check_writable(out)
  task = task_of(config)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task.adopt_classes(config, data.info(config.data))
  make_folder(out)
  drawn, titles = [], []
  with task.train_batches(config, 0) as batches:
    for image in range(num_images):
      step, i = divmod(image, config.batch_size)
      if i == 0:
        batch = next(batches)
      drawn.append(task.draw_example(config, batch, step, i))
      image_id = batch["image_id_B"][i]
      height, width = batch["original_size_B2"][i]
      titles.append(f"step {step + 1}, image {image_id}, {height} x {width}")
      write_whole(out / f"{image + 1:03d}_{image_id}.png", encode_png(drawn[-1]))
  sheet = pictures.contact_sheet(drawn, SHEET_COLUMNS, titles, SHEET_CELL_WIDTH)
  write_whole(out / "contact_sheet.png", encode_png(np.ascontiguousarray(sheet)))
  logging.info("%d pictures and contact_sheet.png in %s", len(drawn), out)
