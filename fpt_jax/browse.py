"""Pictures of what a model is fed: training images after augmentation, with what is learned of them."""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.data.records import label_map
from fpt_jax.run import checkpoints
from fpt_jax.tasks import task_of

SHEET_COLUMNS = 2


def browse(config: ConfigDict, workdir: str, num_images: int) -> None:
  """Draws the first images of a run on `config.data.train_split`, in the order of training.

  Writes `browse/<number>_<image id>.png` and all of them as `browse/contact_sheet.png`. Needs neither
  a model nor a checkpoint.

  Args:
    config: of a run.
    workdir: the run's folder, on a disk or in a bucket.
    num_images: how many.

  Raises:
    UserError: the data cannot be read, or do not fit the config.
  """
  task = task_of(config)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task.settle(config, data.info(config.data))
  out = checkpoints.folder(workdir) / "browse"
  out.mkdir(parents=True, exist_ok=True)
  pictures, titles = [], []
  with task.train_batches(config, 0) as batches:
    for image in range(num_images):
      step, i = divmod(image, config.batch_size)
      if i == 0:
        batch = next(batches)
      pictures.append(task.draw_example(config, batch, step, i))
      image_id = batch["image_id_B"][i]
      height, width = batch["original_size_B2"][i]
      titles.append(f"step {step + 1}, image {image_id}, of {height} x {width}")
      path = out / f"{image + 1:03d}_{image_id}.png"
      path.write_bytes(label_map.encode_label(pictures[-1]))
  sheet = pictures.contact_sheet(pictures, columns=SHEET_COLUMNS, titles=titles, cell_width=800)
  (out / "contact_sheet.png").write_bytes(label_map.encode_label(np.ascontiguousarray(sheet)))
  logging.info("%d pictures and contact_sheet.png in %s", len(pictures), out)
