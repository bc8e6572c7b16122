"""Faster and Mask R-CNN from their parts: backbone, pyramid, FPT, RPN, box head, mask head.

Shapes: B batch, H W rows and columns, N proposals, R sampled regions, G ground truths, M candidates,
D detections, K classes with background as 0, C channels, m side of an instance's bitmap.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones import build_backbone
from fpt_jax.models.feature_map import Pyramid, subsample, valid_positions
from fpt_jax.models.fpt import build_fpt
from fpt_jax.models.fpt.health import Figures
from fpt_jax.models.heads import OF_ALL_LEVELS, build_heads
from fpt_jax.models.heads.rpn import RegionProposalNetwork
from fpt_jax.models.layers import Norm
from fpt_jax.models.preprocess import normalize
from fpt_jax.models.pyramids import DETECTION_PYRAMIDS, build_pyramid
from fpt_jax.models.remat import policy_of, recomputed
from fpt_jax.ops import boxes, losses, sampling
from fpt_jax.ops.blocks import map_blocks, sum_over_blocks
from fpt_jax.ops.masks import mask_targets
from fpt_jax.ops.nms import batched_nms
from fpt_jax.ops.roi_align import multilevel_roi_align
from fpt_jax.run.sharding import in_shares, rows_over_query, whole_images

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MASK_BLOCK = 10  # regions of an image whose masks are computed together


class RCNN(nnx.Module):
  """A detector of boxes and, with a mask head, of instance masks.

  Args:
    config: `model` part of a config, see `fpt_jax.configs.detection`.
    rngs: source of the initial weights.

  Raises:
    ValueError: a part that the config names does not exist, or does not fit another.
  """

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.config = config
    dtype = jnp.dtype(config.dtype)
    options = dict(dtype=dtype, rngs=rngs)
    remat = policy_of(config, "backbone")
    self.backbone = build_backbone(config.backbone, remat=remat, **options)
    self.level_norms = nnx.List(
      [Norm(config.pyramid.level_norm, c, **options) for c in self.backbone.channels]
    )
    self.pyramid = build_pyramid(config, DETECTION_PYRAMIDS, self.backbone.channels, rngs=rngs)
    self.fpt = build_fpt(config, self.pyramid.channels, rngs=rngs) if config.fpt.enabled else None
    self.rpn = RegionProposalNetwork(config.pyramid.channels, config.rpn, **options)
    self.box_head, self.mask_head = build_heads(
      config, levels=len(self.pyramid.channels), **options
    )

  def features(
    self,
    image_BHWC: jax.Array,
    size_B2: jax.Array,
    *,
    key: jax.Array | None = None,
    progress: float | jax.Array = 1.0,
    measured: Figures | None = None,
  ) -> Pyramid:
    """Computes P2..P6 of a batch.

    Args:
      image_BHWC: [B, H, W, 3] RGB in 0..255, float32 or uint8, zero-padded at the right and the bottom.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.
      key: PRNG key for training (DropBlock, batch statistics); None for inference.
      progress: share of the training that is done, 0 to 1, for DropBlock's schedule.
      measured: what the figures of FPT's health are added to; None for no measurement.

    Returns:
      The levels of the pyramid, and the last one subsampled, which only the RPN uses.
    """
    valid_BHW = valid_positions(size_B2, *image_BHWC.shape[1:3])
    normalized_BHWC = normalize(self.config, image_BHWC, valid_BHW)
    return self.features_of_normalized(
      normalized_BHWC, valid_BHW, key=key, progress=progress, measured=measured
    )

  def features_of_normalized(
    self, image_BHWC, valid_BHW, *, key=None, progress=1.0, measured=None
  ) -> Pyramid:
    """Computes P2..P6 of images that are already normalised.

    Args:
      image_BHWC: [B, H, W, 3] float32 normalised images, zero on padding.
      valid_BHW: [B, H, W] bool, the positions on the image.
      key, progress, measured: as for `features`.

    Returns:
      As `features`.
    """
    levels = self.levels_of_normalized(image_BHWC, valid_BHW, train=key is not None)
    if self.fpt is not None:
      with jax.named_scope("fpt"):
        levels = self.fpt(levels, key=key, progress=progress, measured=measured)
    return *levels, subsample(levels[-1])

  def fpt_levels(self, image_BHWC: jax.Array, size_B2: jax.Array) -> Pyramid:
    """Computes the levels that FPT transforms, without training; arguments as for `features`."""
    valid_BHW = valid_positions(size_B2, *image_BHWC.shape[1:3])
    normalized_BHWC = normalize(self.config, image_BHWC, valid_BHW)
    return self.levels_of_normalized(normalized_BHWC, valid_BHW, train=False)

  def levels_of_normalized(self, image_BHWC, valid_BHW, *, train: bool) -> Pyramid:
    """Computes the levels that FPT transforms; arguments as for `features_of_normalized`."""
    return self.pyramid_of(self.backbone_levels(image_BHWC, valid_BHW, train=train), train=train)

  def backbone_levels(self, image_BHWC, valid_BHW, *, train: bool) -> Pyramid:
    """Computes the levels of the backbone; arguments as for `features_of_normalized`."""
    image_BHWC, valid_BHW = rows_over_query((image_BHWC, valid_BHW), stride=32)
    # The scopes are the names of the parameters: profiles and `fpt_jax.analyze` use them.
    with jax.named_scope("backbone"):
      return self.backbone(image_BHWC.astype(self.config.dtype), valid_BHW, train=train)

  def pyramid_of(self, levels: Pyramid, *, train: bool) -> Pyramid:
    """Computes the levels that FPT transforms from those of the backbone."""
    with jax.named_scope("level_norms"):
      levels = tuple(
        level.with_values(norm(level.values_BHWC, valid_BHW=level.valid_BHW, train=train))
        for level, norm in zip(levels, self.level_norms, strict=True)
      )
    policy = policy_of(self.config, "pyramid", train=train)
    run_pyramid = recomputed(lambda pyramid, levels: pyramid(levels, train=train), policy)
    with jax.named_scope("pyramid"):
      return run_pyramid(self.pyramid, levels)

  def losses(
    self,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    progress: float | jax.Array = 1.0,
    measured: Figures | None = None,
  ) -> dict[str, jax.Array]:
    """Computes the training losses of a batch, whose sum is minimised.

    Args:
      batch: image_BHWC and size_B2 as for `features`; gt_boxes_BG4 float32 pixels, gt_labels_BG int32 in
        1..num_classes and gt_valid_BG bool; with a mask head, gt_masks_BGmm relative to the boxes (or to
        `gt_mask_boxes_BG4` where it is given).
      key: PRNG key.
      progress: share of the training that is done, 0 to 1.
      measured: what the figures of FPT's health are added to; None for no measurement.

    Returns:
      Float32 scalars by detectron2's names: loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg and, with
      a mask head, loss_mask.
    """
    feature_key, rpn_key, roi_key = jax.random.split(key, 3)
    pyramid = self.features(
      batch["image_BHWC"], batch["size_B2"], key=feature_key, progress=progress, measured=measured
    )
    return self.losses_of_features(pyramid, batch, rpn_key, roi_key)

  def losses_of_features(self, pyramid, batch, rpn_key, roi_key) -> dict[str, jax.Array]:
    """Computes the losses of P2..P6; arguments and result as for `losses`, with two PRNG keys."""
    canvas = batch["image_BHWC"].shape[1:3]
    policy = policy_of(self.config, "heads")
    logits, deltas = recomputed(lambda pyramid: self.rpn(pyramid), policy)(pyramid)
    # A region may lie anywhere. Its gradient is shared before that of the RPN, which is shared, is added.
    pyramid = whole_images((*rows_over_query(pyramid[:-1], stride=1), pyramid[-1]))
    anchors = self.rpn.anchors(pyramid, canvas)
    sample = self.rpn.sample(anchors, batch["gt_boxes_BG4"], batch["gt_valid_BG"], rpn_key)

    def rpn_losses(pyramid, logits, deltas):
      return self.rpn.losses(pyramid, logits, deltas, anchors, sample)

    result = recomputed(rpn_losses, policy)(pyramid, logits, deltas)
    proposals_BN4, _, valid_BN = self.rpn.propose(
      logits, deltas, anchors, batch["size_B2"], train=True
    )
    rois = self.sample_regions(proposals_BN4, valid_BN, batch, roi_key)

    def refined(pyramid, boxes_BR4, valid_BR):
      return self.box_head(self.pool(pyramid, boxes_BR4, valid_BR, self.config.box_head))

    class_logits_BRK, box_deltas_BRK4 = recomputed(refined, policy)(
      pyramid, rois["boxes_BR4"], rois["valid_BR"]
    )
    result["loss_cls"], result["loss_box_reg"] = losses.box_losses(
      class_logits_BRK,
      box_deltas_BRK4,
      rois["labels_BR"],
      rois["targets_BR4"],
      rois["valid_BR"],
      self.config.box_head.beta,
    )
    if self.mask_head is not None:
      result["loss_mask"] = self.mask_loss(pyramid, batch, rois)
    return result

  def sample_regions(self, proposals_BN4, valid_BN, batch, key) -> dict[str, jax.Array]:
    """Samples the regions that the heads are trained on from proposals and ground truth.

    Args:
      proposals_BN4: [B, N, 4] float32, pixels of the canvas.
      valid_BN: [B, N] bool.
      batch: as for `losses`.
      key: PRNG key.

    Returns:
      boxes_BR4, valid_BR, labels_BR (0 for background), matched_BR (index of the ground truth of a
      positive) and targets_BR4 (box deltas); positives first.
    """
    config = self.config.box_head

    def one_image(proposals_N4, valid_N, gt_boxes_G4, gt_labels_G, gt_valid_G, key):
      candidates_N4 = jnp.concatenate([proposals_N4, gt_boxes_G4])
      matched_N, labels_N = sampling.match(
        boxes.iou(gt_boxes_G4, candidates_N4),
        gt_valid_G,
        config.fg_threshold,
        config.fg_threshold,
      )
      labels_N = jnp.where(jnp.concatenate([valid_N, gt_valid_G]), labels_N, -1)
      index_R, positive_R, valid_R = sampling.sample(
        labels_N, key, min(config.samples, labels_N.size), config.positive_fraction
      )
      rois_R4, matched_R = candidates_N4[index_R], matched_N[index_R]
      return {
        "boxes_BR4": rois_R4,
        "valid_BR": valid_R,
        "labels_BR": jnp.where(positive_R, gt_labels_G[matched_R], 0),
        "matched_BR": matched_R,
        "targets_BR4": boxes.encode(gt_boxes_G4[matched_R], rois_R4, BOX_WEIGHTS),
      }

    keys_B = jax.random.split(key, proposals_BN4.shape[0])
    gt = (batch["gt_boxes_BG4"], batch["gt_labels_BG"], batch["gt_valid_BG"])
    return jax.lax.stop_gradient(jax.vmap(one_image)(proposals_BN4, valid_BN, *gt, keys_B))

  def mask_loss(self, pyramid, batch, rois) -> jax.Array:
    """Computes the mask loss of the positives, which come first among the regions of each image."""
    config = self.config.box_head
    positives = min(int(config.samples * config.positive_fraction), rois["labels_BR"].shape[1])
    rois = {name: value[:, :positives] for name, value in rois.items()}
    rois["valid_BR"] &= rois["labels_BR"] > 0
    mask_boxes_BG4 = batch.get("gt_mask_boxes_BG4", batch["gt_boxes_BG4"])

    def total(rois):
      logits_BRmm = self.mask_logits(
        pyramid, rois["boxes_BR4"], rois["valid_BR"], rois["labels_BR"]
      )
      cut = functools.partial(mask_targets, size=logits_BRmm.shape[2], aligned=self.config.aligned)
      targets_BRmm = jax.vmap(cut)(
        batch["gt_masks_BGmm"], mask_boxes_BG4, rois["boxes_BR4"], rois["matched_BR"]
      )
      return losses.mask_loss(logits_BRmm, jax.lax.stop_gradient(targets_BRmm), rois["valid_BR"])

    summed = sum_over_blocks(total, rois, rois["valid_BR"], MASK_BLOCK)
    return summed / jnp.maximum(jnp.sum(rois["valid_BR"]), 1)

  def mask_logits(self, pyramid, boxes_BR4, valid_BR, labels_BR) -> jax.Array:
    """[B, R, m, m] float32: mask logits of each region's class."""
    assert self.mask_head is not None
    return self.mask_head(self.pool(pyramid, boxes_BR4, valid_BR, self.config.mask_head), labels_BR)

  def pool(self, pyramid: Pyramid, boxes_BR4, valid_BR, config):
    """Pools regions from the pyramid by RoIAlign; P6 is not used.

    Args:
      pyramid: P2..P6.
      boxes_BR4: [B, R, 4] float32, pixels of the canvas.
      valid_BR: [B, R] bool; other regions give zeros.
      config: `box_head` or `mask_head` part of the config.

    Returns:
      [B, R, P, P, C], each region from the level of its size. For heads `OF_ALL_LEVELS`, a tuple with
      one such array per level, each of every region.
    """

    def from_levels(levels):
      def one_image(features, boxes_R4, valid_R):
        return multilevel_roi_align(
          features,
          tuple(level.stride for level in levels),
          boxes_R4,
          valid_R,
          config.pool_size,
          sampling_ratio=config.sampling_ratio,
          aligned=self.config.aligned,
          canonical_size=self.config.canonical_size,
        )

      def images(regions, features):
        return jax.vmap(one_image)(features, *regions)

      features = tuple(level.values_BHWC for level in levels)
      return in_shares(images, (boxes_BR4, valid_BR), features)

    levels = pyramid[:-1]
    if self.config.head.name in OF_ALL_LEVELS:
      return tuple(from_levels((level,)) for level in levels)
    return from_levels(levels)

  def detect(self, image_BHWC: jax.Array, size_B2: jax.Array) -> dict[str, jax.Array]:
    """Finds the `detections_per_image` best detections of each image.

    Args:
      image_BHWC: [B, H, W, 3] RGB in 0..255, float32 or uint8, zero-padded at the right and the bottom.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.

    Returns:
      boxes_BD4 (pixels of the canvas), scores_BD in descending order, labels_BD in 1..num_classes,
      valid_BD and, with a mask head, masks_BDmm (probabilities relative to the box).
    """
    return self.detect_in_features(
      self.features(image_BHWC, size_B2), size_B2, image_BHWC.shape[1:3]
    )

  def detect_in_features(self, pyramid, size_B2, canvas) -> dict[str, jax.Array]:
    """Detects in P2..P6; `canvas` is (height, width) of the padded images. Returns as `detect`."""
    candidates = self.candidates(pyramid, size_B2, canvas)
    detections = suppress(candidates, self.config.test)
    if self.mask_head is not None:
      detections["masks_BDmm"] = self.masks(pyramid, detections)
    return detections

  def candidates(self, pyramid, size_B2, canvas) -> dict[str, jax.Array]:
    """Computes the boxes of all classes that non-maximum suppression chooses from.

    Args:
      pyramid: P2..P6.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.
      canvas: (height, width) of the padded images, pixels.

    Returns:
      boxes_BM4 (pixels of the canvas), scores_BM in descending order, -1 where there is no box, and
      labels_BM; M is `max_candidates`, or the number of all boxes if that is smaller.
    """
    logits, deltas = self.rpn(pyramid)
    proposals_BN4, _, valid_BN = self.rpn.propose(
      logits, deltas, self.rpn.anchors(pyramid, canvas), size_B2, train=False
    )
    class_logits_BNK, box_deltas_BNK4 = whole_images(
      self.box_head(self.pool(whole_images(pyramid), proposals_BN4, valid_BN, self.config.box_head))
    )
    return jax.vmap(self.select_candidates)(
      proposals_BN4, valid_BN, class_logits_BNK, box_deltas_BNK4, size_B2
    )

  def select_candidates(self, proposals_N4, valid_N, logits_NK, deltas_NK4, size_2):
    """Selects the `max_candidates` best boxes of one image with scores above the threshold."""
    config = self.config.test
    scores_NK = jax.nn.softmax(logits_NK)
    num, classes = scores_NK.shape
    boxes_NK4 = boxes.decode(
      deltas_NK4, jnp.broadcast_to(proposals_N4[:, None], (num, classes, 4)), BOX_WEIGHTS
    )
    boxes_NK4 = boxes.clip(boxes_NK4, size_2[0], size_2[1])
    candidate_NK = (scores_NK > config.score_threshold) & valid_N[:, None]
    candidate_NK &= boxes.large_enough(boxes_NK4, config.min_side)
    candidate_NK &= (jnp.arange(classes) > 0)[None]
    ranked = jnp.where(candidate_NK, scores_NK, -1.0).reshape(-1)
    scores_M, index_M = jax.lax.top_k(ranked, min(config.max_candidates, ranked.size))
    return {
      "boxes_BM4": boxes_NK4.reshape(-1, 4)[index_M],
      "scores_BM": scores_M,
      "labels_BM": index_M % classes,
    }

  def masks(self, pyramid, detections: dict[str, jax.Array]) -> jax.Array:
    """[B, D, m, m]: mask probabilities of detections, relative to their boxes."""
    pyramid = whole_images(pyramid)
    found = {k: detections[k] for k in ("boxes_BD4", "valid_BD", "labels_BD")}

    def probabilities(found):
      return jax.nn.sigmoid(
        self.mask_logits(pyramid, found["boxes_BD4"], found["valid_BD"], found["labels_BD"])
      )

    masks_NBdmm = map_blocks(probabilities, found, found["valid_BD"], MASK_BLOCK)
    batch, count = found["valid_BD"].shape
    masks_BDmm = jnp.moveaxis(masks_NBdmm, 0, 1).reshape(batch, -1, *masks_NBdmm.shape[3:])
    return masks_BDmm[:, :count]


def suppress(candidates: dict[str, jax.Array], config) -> dict[str, jax.Array]:
  """Applies non-maximum suppression to the candidates of each class.

  Args:
    candidates: boxes_BM4 in pixels, scores_BM (at most 0 where there is no box) and labels_BM.
    config: `model.test` part of a config: `nms_threshold` (IoU) and `detections_per_image`.

  Returns:
    boxes_BD4, scores_BD in descending order, labels_BD and valid_BD; zeros where not valid.
  """

  def one_image(boxes_M4, scores_M, labels_M):
    index_D, valid_D = batched_nms(
      boxes_M4,
      scores_M,
      labels_M,
      config.nms_threshold,
      config.detections_per_image,
      valid_N=scores_M > 0,
    )
    return {
      "boxes_BD4": jnp.where(valid_D[:, None], boxes_M4[index_D], 0),
      "scores_BD": jnp.where(valid_D, scores_M[index_D], 0),
      "labels_BD": jnp.where(valid_D, labels_M[index_D], 0),
      "valid_BD": valid_D,
    }

  return jax.vmap(one_image)(*(candidates[k] for k in ("boxes_BM4", "scores_BM", "labels_BM")))
