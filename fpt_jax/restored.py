"""A trained model in a user's own code: `fpt_jax.restore(workdir).predict(images)`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.errors import UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.best import best_step
from fpt_jax.run.compiler_memory import give_back_after_compilations
from fpt_jax.run.config_file import read_config
from fpt_jax.tasks import subjects
from fpt_jax.tasks.task import Found, check_config, task_of


class FilePrediction(NamedTuple):
  """A prediction for an image of a file.

  Attributes:
    name: path of the file.
    frame: number of the frame in a video, from 0; None for an image file.
    seconds: when the video shows it, after the first frame; None for an image file.
    image_HWC: the image, uint8 RGB.
    result: what `Restored.predict` returns for it.
  """

  name: str
  frame: int | None
  seconds: float | None
  image_HWC: np.ndarray
  result: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Restored:
  """A model with its weights, on one device.

  Attributes:
    config: config of the run.
    step: step of the checkpoint.
    structure: skeleton of the model, see `models.state`.
    arrays: arrays of the model by name.
  """

  config: ConfigDict
  step: int
  structure: Skeleton
  arrays: Arrays

  @functools.cached_property
  def model(self) -> nnx.Module:
    """The model itself."""
    return self.structure.fill(self.arrays)

  @functools.cached_property
  def infer(self) -> Callable[[np.ndarray], Found]:
    """Inference on one image; the result has the task's form, see `tasks.task.Task.predictor`."""
    give_back_after_compilations()
    return task_of(self.config).predictor(self.config, self.structure, self.arrays)

  def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Finds objects in images of any sizes, or the class of every pixel.

    Args:
      images: images, uint8 RGB [H, W, 3] each.

    Returns:
      One dictionary per image. A detector returns boxes_xyxy [N, 4] float32 in pixels of the image,
      scores [N] float32 in descending order, labels [N], the data set's category ids, and, with a mask
      head, masks [N, H, W] bool. A segmenter returns label_map [H, W] uint8, classes 0, 1, ... of
      `config.model.class_names`.

    Raises:
      ValueError: an image is not uint8 [H, W, 3].
    """
    return [self._predict_one(i, image) for i, image in enumerate(images)]

  def predict_files(
    self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
  ) -> Iterator[FilePrediction]:
    """Makes a prediction for each image of files and folders, and for each frame of videos, one at a time.

    A thread reads the next image while a prediction is made. Images are read as `--images` reads them, by the
    fields `exif` and `skip_bad` of `config.data`. Videos need the package `av`.

    Args:
      paths: one or several files of images and videos, and folders of images.

    Returns:
      An iterator, which reads and predicts when it is asked for the next one.

    Raises:
      UserError: a path does not exist, a folder has no images, or `av` is not installed. The iterator raises
        it in the place of a file that cannot be read, and behind the frames of a video that ends early,
        unless `config.data.skip_bad` is set; asked again, it goes on with the next file.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    files, data = subjects.image_files(several, "paths"), self.config.data
    found = subjects.subjects_of_files(files, exif=data.exif, skip_bad=data.skip_bad)
    return map(self._predict_subject, subjects.read_ahead(found))

  def _predict_subject(self, subject: subjects.Subject | UserError) -> FilePrediction:
    if isinstance(subject, UserError):
      raise subject
    (result,) = self.predict([subject.image_HWC])
    return FilePrediction(subject.name, subject.frame, subject.seconds, subject.image_HWC, result)

  def _predict_one(self, i: int, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
    if (
      getattr(image_HWC, "dtype", None) != np.uint8
      or image_HWC.ndim != 3
      or image_HWC.shape[2] != 3
    ):
      described = getattr(image_HWC, "dtype", type(image_HWC).__name__)
      raise ValueError(
        f"image {i} must be a uint8 array [height, width, 3], got {described} {np.shape(image_HWC)}"
      )
    return task_of(self.config).to_result(self.infer(image_HWC), image_HWC)


def restore(workdir: str, step: int | Literal["best"] | None = None) -> Restored:
  """Opens a checkpoint of a run on this machine, whatever devices it was trained on.

  Args:
    workdir: folder of the run, on a disk or in a bucket.
    step: step of the checkpoint; None for the newest, "best" for the best one by the metric
      `config.checkpoint.best_metric` of the run's evaluations.

  Raises:
    UserError: the run or the checkpoint does not exist, they do not belong together, or the config names no
      metric.
  """
  return open_run(workdir, read_config(workdir), step)


def open_run(
  workdir: str, config: ConfigDict, step: int | Literal["best"] | None = None
) -> Restored:
  """Like `restore`, with another config of the same model; thresholds and data may differ."""
  check_config(config, training=False)
  saved = checkpoints.manager(workdir, create=False)
  if step == "best":
    step = best_step(workdir, config, saved.all_steps())
  step = checkpoints.choose_step(saved, step)
  structure = models.structure_of(config)
  arrays = checkpoints.restore_model(saved, step, sharding.on_one_device(structure.shapes))
  saved.close()
  return Restored(config, step, structure, arrays)
