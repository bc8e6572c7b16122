"""Any data set of the user's: images/<split>/* and labels/<split>/*.png, 8 bits per pixel."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fpt_jax.data.datasets import layouts
from fpt_jax.data.datasets.checks import check_names, quoted
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError

if TYPE_CHECKING:
  from fpt_jax.data.datasets.label_maps import LabelMaps


def _pairs(root: pathlib.Path, split: str) -> layouts.Pairs:
  return layouts.pair_folders(root / "images" / split, root / "labels" / split)


def builder(
  *,
  num_classes: int = 0,
  class_names: Sequence[str] = (),
  void: int = VOID,
  **arguments: Any,
) -> LabelMaps:
  """Returns the builder of a user's data set.

  Args:
    num_classes: number of classes; the label files hold 0..num_classes-1. 0 to use the number of names.
    class_names: names of the classes 0, 1, ...; () to name the classes by their numbers.
    void: value that marks unlabelled pixels in the label files; -1 if every pixel is labelled.
    **arguments: further arguments of `LabelMaps`.

  Raises:
    UserError: the arguments contradict each other.
  """
  for field, value in (("num_classes", num_classes), ("void", void)):
    if not isinstance(value, int) or isinstance(value, bool):
      raise UserError(f"data.builder.{field}={quoted(value)} must be an integer")
  if isinstance(class_names, str):
    raise UserError(
      f"data.builder.class_names={quoted(class_names)} must be a list of names, such as ('road', 'car')"
    )
  check_names("data.builder.class_names", class_names)
  names = tuple(class_names) or tuple(map(str, range(num_classes)))
  if not 0 < len(names) < VOID or len(names) != (num_classes or len(names)):
    raise UserError(
      f"data.builder: num_classes={num_classes} must be 1 to {VOID - 1}, and equal to the number of "
      f"class_names, which is {len(tuple(class_names))}"
    )
  if void != -1 and not len(names) <= void <= 255:
    raise UserError(
      f"data.builder.void={void} must be -1, or from {len(names)} (the number of classes) to 255"
    )
  layout = layouts.Layout(
    name="image_folder",
    class_names=names,
    palette=layouts.numbered_colors(len(names)),
    class_of_id={i: i for i in range(len(names))} | ({} if void == -1 else {void: VOID}),
    splits=("train", "val"),
    pairs=_pairs,
  )
  options = {
    "data.builder.num_classes": len(names),
    "data.builder.class_names": names,
    "data.builder.void": void,
  }
  from fpt_jax.data.datasets.label_maps import LabelMaps  # which loads TensorFlow

  return LabelMaps(layout, options=options, **arguments)
