"""A trained model in a user's own code: `fpt_jax.restore(workdir).predict(images)`."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from pycocotools import mask as coco_mask

from fpt_jax import checkpoints, models
from fpt_jax.data import transforms
from fpt_jax.evaluate import to_original_image
from fpt_jax.models.state import Arrays, Skeleton

_CANVAS_MULTIPLE = 32  # pixels: the coarsest stride of a backbone


@dataclasses.dataclass(frozen=True)
class Restored:
  """A model with its numbers, on one device.

  Attributes:
    config: of the run.
    step: of the checkpoint.
    structure, arrays: the model's skeleton and numbers, see `models.state`.
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
  def _detect(self):
    return jax.jit(lambda arrays, *inputs: self.structure.fill(arrays).detect(*inputs))

  def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Detections in images of any sizes.

    Args:
      images: uint8 RGB [H, W, 3] each.

    Returns:
      For each image: boxes_xyxy [N, 4] float32 in pixels of the image, scores [N] float32 in descending
      order, labels [N] the data set's own category ids and, with a mask head, masks [N, H, W] bool.

    Raises:
      ValueError: an image is not uint8 [H, W, 3].
    """
    return [self._predict_one(i, image) for i, image in enumerate(images)]

  def detect(self, image_HWC: np.ndarray) -> dict:
    """As `predict` for one image, with run-length masks: see `evaluate.to_original_image`."""
    config = self.config.data
    original = image_HWC.shape[:2]
    short = config.short_edge if isinstance(config.short_edge, int) else max(config.short_edge)
    size = transforms.resized_size(*original, short, config.long_edge)
    canvas = smallest_canvas(size, config.buckets)
    image = np.asarray(transforms.resize_and_pad(image_HWC, size, canvas))
    detections = self._detect(self.arrays, image[None], np.array([size], np.int32))
    return to_original_image(
      {name: values[0] for name, values in jax.device_get(detections).items()},
      np.array(size),
      np.array(original),
      self.config.model,
    )

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
    found = self.detect(image_HWC)
    result = {k: found[k] for k in ("boxes_xyxy", "scores")} | {"labels": found["category_ids"]}
    if found["rles"] is not None:
      masks = [coco_mask.decode(rle).astype(bool) for rle in found["rles"]]
      result["masks"] = np.stack(masks) if masks else np.zeros((0, *image_HWC.shape[:2]), bool)
    return result


def restore(workdir: str, step: int | None = None) -> Restored:
  """Opens a run's checkpoint on this machine, whatever devices it was trained on.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None for the newest.

  Raises:
    UserError: there is no such run or checkpoint, or they do not belong together.
  """
  return open_run(workdir, checkpoints.read_config(workdir), step)


def open_run(workdir: str, config: ConfigDict, step: int | None = None) -> Restored:
  """As `restore`, by a config of the same model; its thresholds and data may be others."""
  saved = checkpoints.manager(workdir)
  step = checkpoints.choose_step(saved, step)
  structure = models.structure_of(config)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  arrays = checkpoints.restore_model(saved, step, structure.shapes, device)
  saved.close()
  return Restored(config, step, structure, arrays)


def smallest_canvas(size: tuple[int, int], buckets) -> tuple[int, int]:
  """The smallest bucket that holds an image, or its size rounded up if none does."""
  fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
  if fitting:
    return tuple(min(fitting, key=lambda b: b[0] * b[1]))
  return tuple(-(-edge // _CANVAS_MULTIPLE) * _CANVAS_MULTIPLE for edge in size)
