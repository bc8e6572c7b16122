"""Test-time views of detection: several sizes of an image, each optionally mirrored as well.

As in Detectron, the candidate boxes of all views are suppressed together, and the masks of the
detections are means over the views.

Shapes: B batch, H W rows and columns, N boxes, M candidates of a view, D detections, m side of a mask.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fpt_jax.models.rcnn import suppress
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.ops.mirror import mirror

View = dict[str, jax.Array]  # image_BHWC float32 in 0..255 and size_B2 int32: images at one size
Detect = Callable[[Arrays, Sequence[View]], dict[str, jax.Array]]


def short_edges(config: ConfigDict) -> tuple[int, ...]:
  """Returns the shorter edges of a config's views in pixels; boxes refer to the first."""
  return tuple(config.eval.short_edges) or (config.data.short_edge,)


def detector_in_one_view(
  structure: Skeleton, sharding: jax.sharding.Sharding | None = None
) -> jax.stages.Wrapped:
  """Returns the jitted function from a model's arrays and one view to what `RCNN.detect` returns.

  Args:
    structure: skeleton of the model.
    sharding: sharding of the detections; None leaves it to the compiler.
  """
  return jax.jit(
    lambda arrays, view: structure.fill(arrays).detect(view["image_BHWC"], view["size_B2"]),
    out_shardings=sharding,
  )


def detector(
  config: ConfigDict, structure: Skeleton, sharding: jax.sharding.Sharding | None = None
) -> Detect:
  """Returns the function that detects objects in the views that `config.eval` sets.

  Args:
    config: config of the run.
    structure: skeleton of the model.
    sharding: sharding of the detections; None leaves it to the compiler.

  Returns:
    A function of the model's arrays and the views, one for each of `short_edges(config)`; the function
    itself mirrors them. It returns what `RCNN.detect` returns, with boxes in pixels of the first view's
    canvas. The model is compiled once per canvas.
  """
  options = {} if sharding is None else {"out_shardings": sharding}
  flips = (False, True) if config.eval.flip else (False,)
  if len(short_edges(config)) * len(flips) == 1:
    plain = detector_in_one_view(structure, sharding)
    return lambda arrays, views: plain(arrays, views[0])

  @jax.jit
  def find_candidates(arrays, view):
    model = structure.fill(arrays)
    pyramid = model.features(view["image_BHWC"], view["size_B2"])
    return pyramid, model.candidates(pyramid, view["size_B2"], view["image_BHWC"].shape[1:3])

  @jax.jit
  def predict_masks(arrays, pyramid, detections):
    return structure.fill(arrays).masks(pyramid, detections)

  def merge_and_suppress(candidates, sizes, mirrored):
    return suppress(merge(candidates, sizes, mirrored), config.model.test)

  merge_and_suppress = jax.jit(merge_and_suppress, static_argnums=2, **options)
  average = jax.jit(mean_masks, static_argnums=1, **options)
  mirror_view, move = jax.jit(mirrored_view), jax.jit(move_boxes, static_argnums=3)

  def detect(arrays: Arrays, views: Sequence[View]) -> dict[str, jax.Array]:
    seen = [(mirror_view(v) if flip else v, flip) for v in views for flip in flips]
    mirrored = tuple(flip for _, flip in seen)
    sizes = [view["size_B2"] for view, _ in seen]
    pyramids, candidates = zip(*(find_candidates(arrays, view) for view, _ in seen), strict=True)
    detections = merge_and_suppress(candidates, sizes, mirrored)
    if config.model.mask_head.enabled:
      masks = [
        predict_masks(
          arrays,
          pyramid,
          detections | {"boxes_BD4": move(detections["boxes_BD4"], sizes[0], size, flip)},
        )
        for pyramid, size, flip in zip(pyramids, sizes, mirrored, strict=True)
      ]
      detections["masks_BDmm"] = average(masks, mirrored)
    return detections

  return detect


def mirrored_view(view: View) -> View:
  """Mirrors the images of a view left to right, each within its own width."""
  return view | {"image_BHWC": mirror(view["image_BHWC"], view["size_B2"])}


def merge(
  candidates: Sequence[dict[str, jax.Array]], sizes: Sequence[jax.Array], mirrored: Sequence[bool]
) -> dict[str, jax.Array]:
  """Joins the candidates of all views, with boxes in pixels of the first view, which is not mirrored.

  Args:
    candidates: candidates of each view, see `RCNN.candidates`.
    sizes: height and width of each image on each view's canvas, [B, 2] each.
    mirrored: whether each view is mirrored.
  """
  moved = [
    found | {"boxes_BM4": move_boxes(found["boxes_BM4"], size, sizes[0], flip)}
    for found, size, flip in zip(candidates, sizes, mirrored, strict=True)
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *moved)


def move_boxes(
  boxes_BN4: jax.Array, from_B2: jax.Array, to_B2: jax.Array, mirrored: bool
) -> jax.Array:
  """Converts boxes on images of one size to boxes on the same images of another size, mirrored or not.

  Args:
    boxes_BN4: boxes in pixels.
    from_B2: height and width of each image that the boxes refer to.
    to_B2: height and width of each image that the result refers to.
    mirrored: whether one of the two images is the mirror image of the other.
  """
  ratio_B2 = to_B2.astype(jnp.float32) / from_B2.astype(jnp.float32)
  moved_BN4 = boxes_BN4 * jnp.tile(ratio_B2[:, None, ::-1], 2)
  if not mirrored:
    return moved_BN4
  width_B1 = to_B2[:, 1:].astype(jnp.float32)
  x0, y0, x1, y1 = (moved_BN4[..., i] for i in range(4))
  return jnp.stack([width_B1 - x1, y0, width_B1 - x0, y1], axis=-1)


def mean_masks(masks: Sequence[jax.Array], mirrored: Sequence[bool]) -> jax.Array:
  """Returns mean probabilities over views, [B, D, m, m]; masks of mirrored views are mirrored back."""
  turned = [m[..., ::-1] if flip else m for m, flip in zip(masks, mirrored, strict=True)]
  return sum(turned) / len(turned)
