"""Region Proposal Network (Ren et al. 2015) over a pyramid (Lin et al. 2017).

Shapes: B batch, H W rows and columns, A anchors (of a position, a level, or all levels), N proposals,
G ground truths, K candidates of a level, L levels, S sampled anchors, p side of a patch, C channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import conv
from fpt_jax.ops import boxes, losses, sampling, target
from fpt_jax.ops.anchors import AnchorGrid, anchor_grids
from fpt_jax.ops.nms import nms
from fpt_jax.ops.patches import convolve_patches, inside_of, patches_of
from fpt_jax.run.sharding import whole_images

UNIT_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class SampledAnchors(NamedTuple):
  """The anchors of one image, or of each image of a batch, that the RPN is trained on.

  Attributes:
    index_S: [S] int32, their indices, which count through all levels; positives first.
    matched_S: [S] int32, index of the ground truth of a positive.
    positive_S: [S] bool.
    targets_S4: [S, 4] float32 box deltas of positives.
    valid_S: [S] bool; there may be fewer than S.
  """

  index_S: jax.Array
  matched_S: jax.Array
  positive_S: jax.Array
  targets_S4: jax.Array
  valid_S: jax.Array


class RegionProposalNetwork(nnx.Module):
  """A small convolutional head on every level, with anchors of one size per level.

  Args:
    channels: channels of the pyramid.
    config: `model.rpn` part of a config: `convs` (number of 3x3 convolutions), `anchor_sizes` (pixels, one
      tuple per level), `aspect_ratios` (height / width), `round_anchors`, `fg_threshold` and `bg_threshold`
      (IoU), `samples`, `positive_fraction`, `nms_threshold` (IoU), `min_side` (pixels), and the counts
      `pre_nms` and `post_nms` for `train` and `test`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, config, *, dtype=jnp.float32, rngs: nnx.Rngs):
    ratios = len(config.aspect_ratios)
    init = nnx.initializers.normal(0.01)
    options = dict(kernel_init=init, dtype=dtype, rngs=rngs)
    self.conv = conv(channels, channels, 3, **options)
    self.further_convs = nnx.List(
      [conv(channels, channels, 3, **options) for _ in range(config.convs - 1)]
    )
    self.objectness = conv(channels, ratios, 1, **options)
    self.deltas = conv(channels, 4 * ratios, 1, **options)
    self.config = config

  @jax.named_scope("rpn")
  def __call__(self, pyramid: Pyramid) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the objectness logits [B, A] and deltas [B, A, 4] of each level, in the order of `anchors`."""
    logits, deltas = [], []
    for level in pyramid:
      x_BHWC = level.values_BHWC
      for layer in (self.conv, *self.further_convs):
        x_BHWC = nnx.relu(layer(x_BHWC))
      batch = x_BHWC.shape[0]
      # the best of all anchors are chosen
      logits_BHWA, deltas_BHWX = whole_images((self.objectness(x_BHWC), self.deltas(x_BHWC)))
      logits.append(logits_BHWA.reshape(batch, -1).astype(jnp.float32))
      deltas.append(deltas_BHWX.reshape(batch, -1, 4).astype(jnp.float32))
    return logits, deltas

  def anchors(self, pyramid: Pyramid, canvas: tuple[int, int]) -> tuple[AnchorGrid, ...]:
    """Returns the anchors of each level.

    Args:
      pyramid: P2..P6.
      canvas: (height, width) of the padded images, pixels.
    """
    sizes, strides = zip(*((level.size, level.stride) for level in pyramid), strict=True)
    return anchors_of_levels(self.config, sizes, strides, canvas)

  def propose(
    self, logits, deltas, anchors, size_B2: jax.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Selects the best boxes of every image: `pre_nms` per level before NMS, `post_nms` in all after it.

    Args:
      logits, deltas: outputs of the head, see `__call__`.
      anchors: anchors of each level, see `anchors`.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.
      train: whether to use the counts for training or those for evaluation.

    Returns:
      boxes_BN4 clipped to the image (pixels), scores_BN (probabilities, descending) and valid_BN bool;
      N is `post_nms`, or the number of all boxes if that is smaller.
    """
    counts = self.config.train if train else self.config.test

    def one_image(logits_L, deltas_L, size_2):
      kept = [
        propose_on_level(*level, size_2, counts, self.config)
        for level in zip(logits_L, deltas_L, anchors, strict=True)
      ]
      boxes_N4, scores_N, valid_N = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
      ranked_N = jnp.where(valid_N, scores_N, -1.0)
      _, best_N = jax.lax.top_k(ranked_N, min(counts.post_nms, ranked_N.size))
      return boxes_N4[best_N], scores_N[best_N], valid_N[best_N]

    detached = jax.lax.stop_gradient((logits, deltas))
    return jax.vmap(one_image)(*detached, size_B2)

  def sample(self, anchors, gt_boxes_BG4, gt_valid_BG, key: jax.Array) -> SampledAnchors:
    """Samples the anchors of each image for training.

    Args:
      anchors: anchors of each level, see `anchors`.
      gt_boxes_BG4: [B, G, 4] float32, pixels.
      gt_valid_BG: [B, G] bool.
      key: PRNG key.
    """
    anchors_A4 = np.concatenate([grid.boxes() for grid in anchors])
    # the corners one after another: TPUs pad the last axis of an array to 128
    one_image = functools.partial(sampled_anchors, self.config, jnp.asarray(anchors_A4.T))
    keys_B = jax.random.split(key, gt_boxes_BG4.shape[0])
    return jax.vmap(one_image)(gt_boxes_BG4, gt_valid_BG, keys_B)

  def losses(
    self, pyramid: Pyramid, logits, deltas, anchors, sample: SampledAnchors
  ) -> dict[str, jax.Array]:
    """Computes the losses of the sampled anchors.

    Args:
      pyramid: P2..P6.
      logits, deltas: outputs of the head for `pyramid`, see `__call__`.
      anchors: anchors of each level, see `anchors`.
      sample: the sampled anchors, see `sample`.

    Returns:
      `loss_rpn_cls` and `loss_rpn_loc`, float32 scalars.
    """
    index_BS = sample.index_S
    if target.platform() == "cpu":
      logits_BS, deltas_BS4 = self.from_patches(pyramid, anchors, index_BS)
    else:
      logits_BS, deltas_BS4 = jax.vmap(functools.partial(selected, anchors))(
        logits, deltas, index_BS
      )
    classification, localisation = losses.rpn_losses(
      logits_BS, deltas_BS4, sample.positive_S.astype(jnp.int32), sample.targets_S4, sample.valid_S
    )
    return {"loss_rpn_cls": classification, "loss_rpn_loc": localisation}

  def from_patches(self, pyramid: Pyramid, anchors, index_BS: jax.Array):
    """Computes logits and deltas of some anchors from the patches of the pyramid that they depend on.

    They equal those of `__call__`. A gradient takes two products of the patches, where that of all positions
    takes as long as two convolutions of the pyramid, of zeros for the most part.

    Args:
      pyramid: P2..P6.
      anchors: anchors of each level, see `anchors`.
      index_BS: [B, S] int32 indices of anchors, which count through all levels.

    Returns:
      logits_BS and deltas_BS4, float32.
    """
    side = 2 * self.config.convs + 1
    per_cell = len(anchors[0].first_A4)

    def on_level(level, place_BS):
      cell_BSpp, inside_BSpp = inside_of(anchors[level].size, place_BS // per_cell, side)
      values_BSppC = patches_of(pyramid[level].values_BHWC, cell_BSpp)
      return tuple(x.reshape(*place_BS.shape, -1) for x in (values_BSppC, inside_BSpp))

    values_BSX, inside_BSX = at_levels(index_BS, anchors, on_level)
    x_BSppC = values_BSX.reshape(*index_BS.shape, side, side, -1)
    inside_BSpp = inside_BSX.reshape(*index_BS.shape, side, side)
    for layer in (self.conv, *self.further_convs):
      # a convolution of the map sees zeros outside
      x_BSppC = jnp.where(inside_BSpp[..., None] > 0, x_BSppC, 0)
      kernel_33CD, bias_D = (v[...].astype(x_BSppC.dtype) for v in (layer.kernel, layer.bias))
      x_BSppC = nnx.relu(convolve_patches(x_BSppC, kernel_33CD, bias_D))
      inside_BSpp = inside_BSpp[:, :, 1:-1, 1:-1]
    x_BS1C = x_BSppC[:, :, 0]
    logits_BS1, deltas_BS4 = (
      of_anchor(layer(x_BS1C)[:, :, 0].astype(jnp.float32), index_BS % per_cell, per_cell)
      for layer in (self.objectness, self.deltas)
    )
    return logits_BS1[..., 0], deltas_BS4


def sampled_anchors(config, anchors_4A, gt_boxes_G4, gt_valid_G, key: jax.Array) -> SampledAnchors:
  """Samples the anchors of one image for training.

  Args:
    config: as for `RegionProposalNetwork`.
    anchors_4A: [4, A] corners of the anchors of all levels, pixels.
    gt_boxes_G4: [G, 4] float32, pixels.
    gt_valid_G: [G] bool.
    key: PRNG key.
  """
  matched_A, labels_A = sampling.match_anchors(
    gt_boxes_G4, gt_valid_G, anchors_4A, config.fg_threshold, config.bg_threshold
  )
  index_S, positive_S, valid_S = sampling.sample(
    labels_A, key, config.samples, config.positive_fraction
  )
  matched_S = matched_A[index_S]
  targets_S4 = boxes.encode(gt_boxes_G4[matched_S], anchors_4A[:, index_S].T, UNIT_WEIGHTS)
  return SampledAnchors(index_S, matched_S, positive_S, targets_S4, valid_S)


def selected(anchors, logits_L, deltas_L, index_S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the logits [S] and deltas [S, 4] of some anchors of one image, of those of all anchors."""

  def on_level(level, index_S):
    deltas_S4 = at_anchors(deltas_L[level], index_S, len(anchors[level].first_A4))
    return logits_L[level][index_S][:, None], deltas_S4

  logits_S1, deltas_S4 = at_levels(index_S, anchors, on_level)
  return logits_S1[:, 0], deltas_S4


def at_levels(
  index_S: jax.Array,
  anchors: Sequence[AnchorGrid],
  on_level: Callable[[int, jax.Array], tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
  """Returns values of anchors whose indices count through all levels, arrays [..., S, X].

  Args:
    index_S: [..., S] int32.
    anchors: the anchors of each level.
    on_level: function from the number of a level and [..., S] indices of its anchors to their values.
  """
  found, begin = [], 0
  for level, grid in enumerate(anchors):
    place_S = index_S - begin
    is_here_S1 = ((place_S >= 0) & (place_S < grid.total))[..., None]
    values = on_level(level, jnp.clip(place_S, 0, grid.total - 1))
    found.append([jnp.where(is_here_S1, value_SX, 0) for value_SX in values])
    begin += grid.total
  return tuple(sum(of_levels) for of_levels in zip(*found, strict=True))


def at_anchors(values_AX: jax.Array, index_K: jax.Array, per_cell: int) -> jax.Array:
  """Returns the values of some anchors of a level, [K, X].

  The values of all anchors of a cell are gathered together. This leaves them in the order of the convolution
  that computes them: an array of a few values per anchor takes up to 128 / X times its size on TPUs.

  Args:
    values_AX: [A, X] values of all anchors of a level.
    index_K: [K] int32 indices of anchors.
    per_cell: anchors per cell.
  """
  values = values_AX.shape[1]
  cell_K, anchor_K = jnp.divmod(index_K, per_cell)
  return of_anchor(values_AX.reshape(-1, per_cell * values)[cell_K], anchor_K, per_cell)


def of_anchor(values_KAX: jax.Array, anchor_K: jax.Array, per_cell: int) -> jax.Array:
  """Returns the values of one anchor of each cell, [..., K, X].

  Args:
    values_KAX: [..., K, A * X] values of all anchors of some cells.
    anchor_K: [..., K] int32 indices of anchors in their cells.
    per_cell: anchors per cell.
  """
  values_KAX = values_KAX.reshape(*anchor_K.shape, per_cell, -1)
  is_it_KA = jax.nn.one_hot(anchor_K, per_cell, dtype=jnp.bool_)
  return jnp.sum(jnp.where(is_it_KA[..., None], values_KAX, 0), axis=-2)


def anchors_of_canvas(config, canvas: tuple[int, int]) -> np.ndarray:
  """Returns the anchors of all levels, [A, 4] in pixels, for a pyramid with strides of 4, 8, ... pixels.

  Args:
    config: as for `RegionProposalNetwork`.
    canvas: (height, width) of the padded images, pixels.
  """
  strides = [4 * 2**level for level in range(len(config.anchor_sizes))]
  sizes = [(-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in strides]
  return np.concatenate(
    [grid.boxes() for grid in anchors_of_levels(config, sizes, strides, canvas)]
  )


def anchors_of_levels(
  config,
  sizes: Sequence[tuple[int, int]],
  strides: Sequence[int],
  canvas: tuple[int, int],
) -> tuple[AnchorGrid, ...]:
  """Returns the anchors of each level.

  Args:
    config: as for `RegionProposalNetwork`.
    sizes: (rows, columns) of each level.
    strides: stride of each level, pixels.
    canvas: (height, width) of the padded images, pixels.
  """
  spacings: Sequence[int | tuple[int, int]] = strides
  if config.round_anchors:
    spacings = [(canvas[0] // rows, canvas[1] // columns) for rows, columns in sizes]
  return anchor_grids(
    sizes, spacings, config.anchor_sizes, config.aspect_ratios, rounded=config.round_anchors
  )


def propose_on_level(logits_A, deltas_A4, anchors: AnchorGrid, size_2, counts, config):
  """Selects the `post_nms` best boxes of one level after NMS: boxes_N4, scores_N, valid_N."""
  top_K, index_K = jax.lax.top_k(logits_A, min(counts.pre_nms, logits_A.size))
  deltas_K4 = at_anchors(deltas_A4, index_K, len(anchors.first_A4))
  boxes_K4 = boxes.decode(deltas_K4, anchors.at(index_K), UNIT_WEIGHTS)
  boxes_K4 = boxes.clip(boxes_K4, size_2[0], size_2[1])
  scores_K = jax.nn.sigmoid(top_K)
  large_K = boxes.large_enough(boxes_K4, config.min_side)
  most = min(counts.post_nms, scores_K.size)
  index_N, valid_N = nms(boxes_K4, scores_K, config.nms_threshold, most, valid_N=large_K)
  return boxes_K4[index_N], scores_K[index_N], valid_N
