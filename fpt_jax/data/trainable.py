"""Whether prepared records can be trained on, and whether they are those that a run was trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import ml_collections
import numpy as np
from etils import epy

from fpt_jax.data.datasets import inputs
from fpt_jax.data.datasets.checks import listed
from fpt_jax.data.prepared import undamaged
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError

with epy.lazy_imports():
  import tensorflow_datasets as tfds


def check_trainable(data: ml_collections.ConfigDict) -> None:
  """Checks that there is something to train on in `data.train_split`.

  Args:
    data: the config's `data`.

  Raises:
    UserError: the data set is not prepared; its splits have no object that can be trained on; fewer
      than two classes have pixels; or a class of the user's image folders is in no label file.
  """
  with contextlib.closing(Reader(data, data.train_split)) as reader:
    builder, splits = reader.builder, reader.splits
  with undamaged(builder.data_dir):
    _check_objects_and_classes(data, builder, splits)


def _check_objects_and_classes(
  data: ml_collections.ConfigDict,
  builder: tfds.core.GeneratorBasedBuilder,
  splits: Sequence[str],
) -> None:
  metadata = builder.info.metadata
  where = f"data.train_split={data.train_split!r} of {builder.data_dir}"
  # absent for drawn data
  objects, pixels = metadata.get("objects", {}), metadata.get("class_pixels", {})
  if objects and not sum(objects[split] for split in splits):
    raise UserError(
      f"{where} has no object to train on, only crowds or images without annotations; add annotations "
      "and prepare again, in another data.data_dir"
    )
  if not pixels:
    return
  trained = np.sum([pixels[split][:-1] for split in splits], axis=0)
  if np.count_nonzero(trained) < 2:
    raise UserError(
      f"{where} has label maps with pixels of {np.count_nonzero(trained)} of {len(trained)} classes, "
      "and training needs two; correct the label files and prepare again, in another data.data_dir"
    )
  anywhere = np.sum([counts[:-1] for counts in pixels.values()], axis=0)
  # the benchmarks' lists of classes are fixed, and parts of them may lack a class
  if data.name == "image_folder" and not anywhere.all():
    absent = [metadata["class_names"][i] for i in np.flatnonzero(anywhere == 0)]
    raise UserError(
      f"{builder.data_dir}: no label file has a pixel of {len(absent)} of {len(anywhere)} classes: "
      f"{listed(absent)}; correct data.builder.num_classes, class_names or the label files, and prepare "
      "again, in another data.data_dir"
    )


def digest(data: ml_collections.ConfigDict) -> str:
  """Returns a digest of what the images and annotations of `data.train_split` were prepared from.

  It is "" for drawn images, and for records of an earlier version.

  Raises:
    UserError: the data set is not prepared, or does not have the split.
  """
  with contextlib.closing(Reader(data, data.train_split)) as reader:
    builder, splits = reader.builder, reader.splits
  with undamaged(builder.data_dir):
    noted = builder.info.metadata.get("inputs")
    return inputs.digest(noted, splits) if noted else ""
