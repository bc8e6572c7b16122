"""A segmentation network as one function of an image, see `tasks.program`.

Shapes: B images, H W rows and columns of an image, K classes.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.models.state import Skeleton
from fpt_jax.tasks import program
from fpt_jax.tasks.segmentation import views


def image_program(
  config: ConfigDict, structure: Skeleton, canvas: tuple[int, int] | None
) -> program.ImageProgram:
  """See `tasks.task.Task.image_program`.

  The program returns label_map, uint8 [B, H, W] of classes 0, 1, ... at the size of the images.
  """
  data = config.data
  if tuple(config.eval.scales) != (1,):
    raise UserError(
      f"config.eval.scales={tuple(config.eval.scales)}: an exported program has images at one size; set "
      "--config.eval.scales='(1.0,)'"
    )
  chosen = program.chosen_canvas(data, canvas, **views.rounding(config))
  scores = views.scorer_at_one_scale(config, structure)
  resize = program.Resize(data.short_edge, round_half_up=True)

  def run(arrays, image_BHWC):
    old_2 = program.size_of(image_BHWC)
    size_2 = resize(old_2)
    old_B2, size_B2 = (program.repeated(size, image_BHWC.shape[0]) for size in (old_2, size_2))
    seen_BHWC = program.on_canvas(image_BHWC, size_2, chosen)
    scores_BHWK = scores(arrays, seen_BHWC, size_B2, old_B2, canvas=image_BHWC.shape[1:3])
    return {"label_map": jnp.argmax(scores_BHWK, axis=-1).astype(jnp.uint8)}

  def difference(outputs, image_HWC, expected):
    del image_HWC
    return float((outputs["label_map"] != expected["label_map"]).mean())

  return program.ImageProgram(
    run,
    chosen,
    program.limits_of_sizes(chosen, data.short_edge),
    {"class_names": list(config.model.class_names)},
    difference,
    mismatch=difference,
  )
