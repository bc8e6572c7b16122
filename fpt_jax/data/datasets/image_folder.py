"""Any data set of one's own: images/<split>/* and labels/<split>/*.png, 8 bits a pixel."""

import pathlib
from collections.abc import Sequence

from fpt_jax.data.datasets import label_maps
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError


def _pairs(root: pathlib.Path, split: str) -> label_maps.Pairs:
  return label_maps.pair_folders(root / "images" / split, root / "labels" / split)


def builder(
  *,
  num_classes: int = 0,
  class_names: Sequence[str] = (),
  void: int = VOID,
  **arguments: object,
) -> label_maps.LabelMaps:
  """Returns the builder of a data set of the user's.

  Args:
    num_classes: the label files hold 0..num_classes-1; left out, as many as there are names.
    class_names: name of class 0, 1, ...; left out, the classes are called by their numbers.
    void: what the label files hold where there is no class; -1 for nothing of that kind.
    **arguments: of `LabelMaps`.

  Raises:
    UserError: the numbers do not fit each other.
  """
  names = tuple(class_names) or tuple(map(str, range(num_classes)))
  if not 0 < len(names) < VOID or len(names) != (num_classes or len(names)):
    raise UserError(
      f"data.builder: num_classes={num_classes} must be 1 to {VOID - 1}, and as many as "
      f"class_names, which are {len(tuple(class_names))}"
    )
  if void != -1 and not len(names) <= void <= 255:
    raise UserError(f"data.builder.void={void} must lie beyond the classes, up to 255, or be -1")
  layout = label_maps.Layout(
    name="image_folder",
    class_names=names,
    palette=label_maps.numbered_colors(len(names)),
    class_of_id={i: i for i in range(len(names))} | ({} if void == -1 else {void: VOID}),
    splits=("train", "val"),
    pairs=_pairs,
  )
  return label_maps.LabelMaps(layout, **arguments)
