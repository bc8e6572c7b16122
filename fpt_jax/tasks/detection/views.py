"""Detection in several views of an image put together: sizes, and each of them mirrored.

As Detectron does it: the boxes of all views before suppression are suppressed together, and the masks
of those that are left are the mean of what each view gives for them.

Shapes: B batch, H W rows and columns, M candidates of a view, D detections, m side of a mask.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fpt_jax.models.rcnn import suppress
from fpt_jax.models.state import Arrays, Skeleton

View = dict[str, jax.Array]  # image_BHWC float32 0..255, size_B2 int32: the images at one size
Detect = Callable[[Arrays, Sequence[View]], dict[str, jax.Array]]


def short_edges(config: ConfigDict) -> tuple[int, ...]:
  """The shorter edges of the views that a config asks for, pixels; the first is what boxes refer to."""
  return tuple(config.model.test.get("short_edges", ())) or (config.data.short_edge,)


def detector(
  config: ConfigDict, structure: Skeleton, sharding: jax.sharding.Sharding | None = None
) -> Detect:
  """The function that detects as the config's `model.test` asks.

  Args:
    config: of the run.
    structure: of its model.
    sharding: of the detections; None leaves it to the compiler.

  Returns:
    A function of the model's numbers and the views, one for each of `short_edges(config)`, which
    mirrors them itself. It gives what `RCNN.detect` gives, boxes in pixels of the first view's canvas.
    The model is compiled once for each canvas.
  """
  options = {} if sharding is None else {"out_shardings": sharding}
  flips = (False, True) if config.model.test.get("flip", False) else (False,)
  if len(short_edges(config)) * len(flips) == 1:
    plain = jax.jit(
      lambda arrays, view: structure.fill(arrays).detect(view["image_BHWC"], view["size_B2"]),
      **options,
    )
    return lambda arrays, views: plain(arrays, views[0])

  @jax.jit
  def look(arrays, view):
    model = structure.fill(arrays)
    pyramid = model.features(view["image_BHWC"], view["size_B2"])
    return pyramid, model.candidates(pyramid, view["size_B2"], view["image_BHWC"].shape[1:3])

  @jax.jit
  def draw(arrays, pyramid, detections):
    return structure.fill(arrays).masks(pyramid, detections)

  def together(candidates, sizes, mirrored):
    return suppress(merge(candidates, sizes, mirrored), config.model.test)

  together = jax.jit(together, static_argnums=2, **options)
  average = jax.jit(mean_masks, static_argnums=1, **options)
  mirror_view, move = jax.jit(mirror), jax.jit(move_boxes, static_argnums=3)

  def detect(arrays: Arrays, views: Sequence[View]) -> dict[str, jax.Array]:
    seen = [(mirror_view(v) if flip else v, flip) for v in views for flip in flips]
    mirrored = tuple(flip for _, flip in seen)
    sizes = [view["size_B2"] for view, _ in seen]
    pyramids, candidates = zip(*(look(arrays, view) for view, _ in seen), strict=True)
    detections = together(candidates, sizes, mirrored)
    if config.model.mask_head.enabled:
      masks = [
        draw(
          arrays,
          pyramid,
          detections | {"boxes_BD4": move(detections["boxes_BD4"], sizes[0], size, flip)},
        )
        for pyramid, size, flip in zip(pyramids, sizes, mirrored, strict=True)
      ]
      detections["masks_BDmm"] = average(masks, mirrored)
    return detections

  return detect


def mirror(view: View) -> View:
  """The images left to right, each in its own width: it stays at the left of its canvas."""
  image_BHWC, size_B2 = view["image_BHWC"], view["size_B2"]
  canvas_width = image_BHWC.shape[2]

  def one_image(image_HWC, size_2):
    return jnp.roll(image_HWC[:, ::-1], size_2[1] - canvas_width, axis=1)

  return {"image_BHWC": jax.vmap(one_image)(image_BHWC, size_B2), "size_B2": size_B2}


def merge(
  candidates: Sequence[dict[str, jax.Array]], sizes: Sequence[jax.Array], mirrored: Sequence[bool]
) -> dict[str, jax.Array]:
  """The candidates of all views, their boxes in pixels of the first, which is not mirrored.

  Args:
    candidates: of each view, see `RCNN.candidates`.
    sizes: [B, 2] of each view, height and width of each image on the canvas.
    mirrored: whether the view shows the images left to right.
  """
  moved = [
    found | {"boxes_BM4": move_boxes(found["boxes_BM4"], size, sizes[0], flip)}
    for found, size, flip in zip(candidates, sizes, mirrored, strict=True)
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *moved)


def move_boxes(
  boxes_BN4: jax.Array, from_B2: jax.Array, to_B2: jax.Array, mirrored: bool
) -> jax.Array:
  """Boxes on images of one size, as boxes on the same images of another, mirrored or not.

  Args:
    boxes_BN4: pixels.
    from_B2: height and width of each image the boxes are on.
    to_B2: of each image they shall be on.
    mirrored: whether one of the two shows the image left to right.
  """
  ratio_B2 = to_B2.astype(jnp.float32) / from_B2.astype(jnp.float32)
  moved_BN4 = boxes_BN4 * jnp.tile(ratio_B2[:, None, ::-1], 2)
  if not mirrored:
    return moved_BN4
  width_B1 = to_B2[:, 1:].astype(jnp.float32)
  x0, y0, x1, y1 = (moved_BN4[..., i] for i in range(4))
  return jnp.stack([width_B1 - x1, y0, width_B1 - x0, y1], axis=-1)


def mean_masks(masks: Sequence[jax.Array], mirrored: Sequence[bool]) -> jax.Array:
  """[B, D, m, m]: the mean probability over views, those of mirrored ones turned back."""
  turned = [m[..., ::-1] if flip else m for m, flip in zip(masks, mirrored, strict=True)]
  return sum(turned) / len(turned)
