"""Region Proposal Network (Ren et al. 2015) over a pyramid (Lin et al. 2017).

Shapes: B batch, H W rows and columns, A anchors (of a level, or of all levels together), N proposals,
G ground truths, K candidates of a level, L levels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fpt_jax.models.feature_map import Pyramid
from fpt_jax.models.layers import conv
from fpt_jax.ops import boxes, losses, sampling
from fpt_jax.ops.anchors import anchors
from fpt_jax.ops.nms import nms

MIN_PROPOSAL_SIDE = 1e-3


class RegionProposalNetwork(nnx.Module):
  """One small head slid over every level; anchors of one size a level.

  Args:
    channels: of the pyramid.
    config: `anchor_sizes` (pixels, one a level), `aspect_ratios`, `fg_threshold`, `bg_threshold`,
      `samples`, `positive_fraction`, `nms_threshold`, and `pre_nms`, `post_nms` counts for `train` and
      `test`.
  """

  def __init__(self, channels: int, config, *, dtype=jnp.float32, rngs: nnx.Rngs):
    ratios = len(config.aspect_ratios)
    init = nnx.initializers.normal(0.01)
    options = dict(kernel_init=init, dtype=dtype, rngs=rngs)
    self.conv = conv(channels, channels, 3, **options)
    self.objectness = conv(channels, ratios, 1, **options)
    self.deltas = conv(channels, 4 * ratios, 1, **options)
    self.config = config

  @jax.named_scope("rpn")
  def __call__(self, pyramid: Pyramid) -> tuple[list[jax.Array], list[jax.Array]]:
    """Objectness logits [B, A] and box deltas [B, A, 4] of each level, A in the order of `anchors`."""
    logits, deltas = [], []
    for level in pyramid:
      x_BHWC = nnx.relu(self.conv(level.values_BHWC))
      batch = x_BHWC.shape[0]
      logits.append(self.objectness(x_BHWC).reshape(batch, -1).astype(jnp.float32))
      deltas.append(self.deltas(x_BHWC).reshape(batch, -1, 4).astype(jnp.float32))
    return logits, deltas

  def anchors(self, pyramid: Pyramid, canvas: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """[A, 4] boxes of each level; canvas: (height, width) of the padded images, pixels."""
    return anchors(
      [level.size for level in pyramid],
      [(canvas[0] // level.size[0], canvas[1] // level.size[1]) for level in pyramid],
      self.config.anchor_sizes,
      self.config.aspect_ratios,
    )

  def propose(
    self, logits, deltas, anchors_LA4, size_B2: jax.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best boxes of every image: top `pre_nms` of each level, suppressed level by level, merged.

    Returns:
      boxes_BN4 clipped to the image, scores_BN (probabilities, descending), valid_BN; N = `post_nms`.
    """
    counts = self.config.train if train else self.config.test

    def one_image(logits_L, deltas_L, size_2):
      kept = [
        propose_on_level(*level, size_2, counts.pre_nms, counts.post_nms, self.config.nms_threshold)
        for level in zip(logits_L, deltas_L, anchors_LA4, strict=True)
      ]
      boxes_N4, scores_N, valid_N = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
      ranked_N = jnp.where(valid_N, scores_N, -1.0)
      _, best_N = jax.lax.top_k(ranked_N, min(counts.post_nms, ranked_N.size))
      return boxes_N4[best_N], scores_N[best_N], valid_N[best_N]

    detached = jax.lax.stop_gradient((logits, deltas))
    return jax.vmap(one_image)(*detached, size_B2)

  def losses(
    self, logits, deltas, anchors_LA4, gt_boxes_BG4, gt_valid_BG, key: jax.Array
  ) -> dict[str, jax.Array]:
    """`loss_rpn_cls` and `loss_rpn_loc` over a random sample of the anchors of each image."""
    anchors_A4 = jnp.concatenate([jnp.asarray(a) for a in anchors_LA4])

    def targets(gt_boxes_G4, gt_valid_G, key):
      matched_A, labels_A, selected_A = sampled_anchors(
        self.config, anchors_A4, gt_boxes_G4, gt_valid_G, key
      )
      deltas_A4 = boxes.encode(gt_boxes_G4[matched_A], anchors_A4, (1.0, 1.0, 1.0, 1.0))
      return labels_A, deltas_A4, selected_A

    keys_B = jax.random.split(key, gt_boxes_BG4.shape[0])
    labels_BA, targets_BA4, selected_BA = jax.vmap(targets)(gt_boxes_BG4, gt_valid_BG, keys_B)
    classification, localisation = losses.rpn_losses(
      jnp.concatenate(logits, axis=1),
      jnp.concatenate(deltas, axis=1),
      labels_BA,
      targets_BA4,
      selected_BA,
    )
    return {"loss_rpn_cls": classification, "loss_rpn_loc": localisation}


def sampled_anchors(config, anchors_A4, gt_boxes_G4, gt_valid_G, key: jax.Array):
  """What an image's anchors are trained on: matched_A, labels_A (see `sampling.match`), selected_A."""
  matched_A, labels_A = sampling.match(
    boxes.iou(gt_boxes_G4, anchors_A4),
    gt_valid_G,
    config.fg_threshold,
    config.bg_threshold,
    allow_low_quality=True,
  )
  selected_A = sampling.sample(labels_A, key, config.samples, config.positive_fraction)
  return matched_A, labels_A, selected_A


def anchors_of_canvas(config, canvas: tuple[int, int]) -> np.ndarray:
  """[A, 4] the anchors of all levels, without a pyramid: its strides are 4, 8, ... pixels.

  Args:
    config: as of `RegionProposalNetwork`.
    canvas: (height, width) of the padded images, pixels.
  """
  strides = [4 * 2**level for level in range(len(config.anchor_sizes))]
  sizes = [tuple(-(-edge // stride) for edge in canvas) for stride in strides]
  spacings = [tuple(e // n for e, n in zip(canvas, size, strict=True)) for size in sizes]
  levels = anchors(sizes, spacings, config.anchor_sizes, config.aspect_ratios)
  return np.concatenate(levels)


def propose_on_level(logits_A, deltas_A4, anchors_A4, size_2, pre_nms, post_nms, threshold):
  """The `post_nms` best non-overlapping boxes of one level: boxes_N4, scores_N, valid_N."""
  top_K, index_K = jax.lax.top_k(logits_A, min(pre_nms, logits_A.size))
  boxes_K4 = boxes.decode(
    deltas_A4[index_K], jnp.asarray(anchors_A4)[index_K], (1.0, 1.0, 1.0, 1.0)
  )
  boxes_K4 = boxes.clip(boxes_K4, size_2[0], size_2[1])
  scores_K = jax.nn.sigmoid(top_K)
  large_K = boxes.large_enough(boxes_K4, MIN_PROPOSAL_SIDE)
  index_N, valid_N = nms(
    boxes_K4, scores_K, threshold, min(post_nms, scores_K.size), valid_N=large_K
  )
  return boxes_K4[index_N], scores_K[index_N], valid_N
