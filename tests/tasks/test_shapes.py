"""The shapes that programs are compiled for ahead of time are those of the batches that the data have."""

import jax
import numpy as np
import pytest

from fpt_jax import data, models
from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.run import sharding
from fpt_jax.tasks.detection import batches as detection_batches
from fpt_jax.tasks.segmentation import batches as segmentation_batches
from fpt_jax.tasks.task import task_of

BUCKETS = ((64, 32), (64, 96), (96, 64))  # all images of `shapes` are 64 x 64


def config_of(module, shapes, **fields):
  config = module.get_config("demo")
  fields = dict(shapes.items()) | {"buckets": BUCKETS, **fields}
  config.data.update({k: v for k, v in fields.items() if k in config.data and k != "builder"})
  config.data.builder.update({k: v for k, v in shapes.builder.items() if v is not None})
  config.batch_size = 4
  return config


def described(batch):
  return jax.tree.map(lambda value: (value.shape, np.dtype(value.dtype)), batch)


@pytest.mark.parametrize(
  ("module", "fields", "canvas"),
  [
    (coco_mask, {}, (64, 96)),
    (coco_mask, {"buckets": (), "train_sizes": (32, 80)}, (96, 96)),  # 80 rounded up
    (cityscapes, {"crop": (40, 56)}, (40, 56)),
  ],
)
def test_shapes_of_a_training_batch(module, fields, canvas, shapes):
  config = config_of(module, shapes, **fields)
  task = task_of(config)
  task.adopt_classes(config, data.info(config.data))
  assert task.canvas(config) == canvas
  with task.train_batches(config, 0) as batches:
    batch = next(batches)
  expected = task.batch_shapes(config, 4, canvas)
  assert described({name: batch[name] for name in task.BATCH_KEYS}) == described(expected)


def test_the_canvas_has_the_longer_edge_of_training_images(shapes):
  config = config_of(coco_mask, shapes, buckets=(), train_sizes=(32, 80), train_long_edge=100)
  assert task_of(config).canvas(config) == (96, 128)


@pytest.mark.parametrize("module", [coco_mask, cityscapes])
def test_shapes_of_an_evaluation(module, shapes):
  config = config_of(module, shapes)
  structure, mesh = models.structure_of(config), sharding.mesh()
  _, inputs, options = task_of(config).eval_program(config, structure, mesh, 4)
  read = {coco_mask: detection_batches, cityscapes: segmentation_batches}[module].eval_batches
  with read(config.data, "val", batch_size=4) as batches:
    batch = next(batches)
  if module is coco_mask:
    (view,) = inputs
    assert described(view) == described({name: batch[name] for name in view})
  else:
    names = ("image_BHWC", "size_B2", "original_size_B2")
    assert described(inputs) == described(tuple(batch[name] for name in names))
    assert options == {"canvas": (64, 96)}  # at least as large as the files


def test_an_evaluation_in_several_programs_is_reported():
  for module, field, value, message in (
    (coco_mask, "eval.flip", True, "eval.flip evaluate in several programs"),
    (coco_mask, "eval.short_edges", (96, 128), "eval.short_edges and"),
    (cityscapes, "data.buckets", (), "config.data.buckets is empty"),
    (cityscapes, "eval.window", (64, 64), "number of windows depends on the images"),
  ):
    config = module.get_config("demo")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
      task_of(config).eval_program(config, models.structure_of(config), sharding.mesh(), 1)
