"""Label maps of single images.

Shapes: H W rows and columns.
"""

from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fpt_jax import data
from fpt_jax.data import canvases, crops, transforms
from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run.folder import run_folder, write_whole
from fpt_jax.tasks.labels import match_names
from fpt_jax.tasks.segmentation import batches, submissions
from fpt_jax.tasks.segmentation.classes import class_table
from fpt_jax.tasks.segmentation.views import labeller, rounding


def submission_writer(
  config: ConfigDict, folder: epath.Path
) -> Callable[[str, np.ndarray], epath.Path]:
  """Returns a function of file name and label map that writes the file for the evaluation server.

  Args:
    config: config of the run.
    folder: folder of an evaluation's results; the files are written into the folder `submission` in it.

  Raises:
    UserError: see `server_classes`.
  """
  server_class = server_classes(config)
  return lambda file_name, label_HW: submissions.write(
    config.data.name, folder / "submission", file_name, server_class[label_HW]
  )


def server_classes(config: ConfigDict) -> np.ndarray:
  """Returns the class at the data set's evaluation server of each class of the model, int [K], by name.

  Raises:
    UserError: the data set has no server, or the model has other classes.
  """
  name, classes = config.data.name, config.model.num_classes
  of_server = tuple(submissions.CLASS_NAMES.get(name, ()))
  if len(of_server) != classes:
    servers = ", ".join(f"{n} ({len(c)} classes)" for n, c in submissions.CLASS_NAMES.items())
    raise UserError(
      f"config.eval.submission: there are servers for {servers}, not for data.name={name!r} with "
      f"{classes} classes; set --config.eval.submission=False"
    )
  of_model = tuple(config.model.class_names) or of_server
  places = list(range(classes)) if of_model == of_server else match_names(of_model, of_server)
  for class_name, place in zip(of_model, places, strict=True):
    if place is None or places.count(place) > 1:
      raise UserError(
        f"config.eval.submission: the model's class {class_name!r} is not one class of the server of "
        f"data.name={name!r}; set --config.eval.submission=False"
      )
  return np.array(places)


def predictor(
  config: ConfigDict, structure: Skeleton, arrays: Arrays
) -> Callable[[np.ndarray], dict]:
  """Returns a function from an image, uint8 RGB [H, W, 3], to its `label_map`, uint8 [H, W].

  The function uses the windows, scales and mirror images of `config.eval`, as evaluation does.
  """
  label = labeller(config, structure)

  def predict(image_HWC: np.ndarray) -> dict:
    original = image_HWC.shape[:2]
    image_BHWC, size_B2 = on_canvas(config, image_HWC)
    # that of the image where both have one size, so that there is one compiled program per canvas
    original_canvas = canvas_of(config, original)
    original_B2 = np.array([original], np.int32)
    (label_HW,) = np.asarray(label(arrays, image_BHWC, size_B2, original_B2, original_canvas))
    return {"label_map": label_HW[: original[0], : original[1]]}

  return predict


def on_canvas(config: ConfigDict, image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns [1, H, W, 3] and [1, 2]: an image on its canvas before `config.eval.scales`, and its size."""
  size, short_edge = image_HWC.shape[:2], config.data.short_edge
  if short_edge:
    size = crops.short_edge_size(size, short_edge)
  image = transforms.on_canvas(image_HWC, size, canvas_of(config, size))
  return image[None], np.array([size], np.int32)


def canvas_of(config: ConfigDict, size: tuple[int, int]) -> tuple[int, int]:
  """Returns the canvas of an image or of a label map of this size, see `data.canvases.of_prediction`."""
  return canvases.of_prediction(config.data, size, rounding(config)["remainder"])


def to_result(found: dict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """See `tasks.task.Task.to_result`: the label map."""
  del image_HWC
  return found


def eval_images(config: ConfigDict) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """See `tasks.task.Task.eval_images`: ground truth is a label map of the model's classes."""
  to_class = class_table(config, data.info(config.data))
  for name, image_HWC, label_HW in batches.images(config.data, config.data.eval_split):
    yield name, image_HWC, to_class[label_HW]


def to_entries(config: ConfigDict, name: str, found: dict) -> list[dict]:
  """See `tasks.task.Task.to_entries`: each class's share of the pixels, the largest first."""
  label_HW = found["label_map"]
  classes, pixels = np.unique(label_HW, return_counts=True)
  shares = {
    config.model.class_names[classes[i]]: round(float(pixels[i] / label_HW.size), 6)
    for i in np.argsort(-pixels, kind="stable")
  }
  return [{"file_name": name, "shares": shares}]


def write_prediction(config: ConfigDict, workdir: str, stem: str, name: str, found: dict) -> None:
  """See `tasks.task.Task.write_prediction`.

  Writes the label map as `predictions/<stem>_labels.png`, with classes as numbers, and, if
  `config.eval.submission` is set, the file for the evaluation server.

  Raises:
    UserError: see `submission_writer`; or a file cannot be written.
  """
  path = run_folder(workdir) / "predictions" / f"{stem}_labels.png"
  write_whole(path, encode_png(found["label_map"]))
  if config.eval.submission:
    submission_writer(config, run_folder(workdir) / "eval")(name, found["label_map"])
