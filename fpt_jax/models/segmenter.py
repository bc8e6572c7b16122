"""Semantic segmentation from its parts: dilated backbone, pyramid, FPT, head.

Shapes: B batch, H W rows and columns of the canvas, K classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones import build_backbone
from fpt_jax.models.feature_map import FeatureMap, Pyramid, valid_positions
from fpt_jax.models.fpt import build_fpt
from fpt_jax.models.fpt.health import Figures
from fpt_jax.models.heads.semantic import SemanticHead
from fpt_jax.models.preprocess import normalize
from fpt_jax.models.pyramids import SEGMENTATION_PYRAMIDS, build_pyramid
from fpt_jax.models.remat import policy_of, recomputed
from fpt_jax.ops.losses import segmentation_loss
from fpt_jax.ops.resize import upsample_bilinear
from fpt_jax.run.sharding import rows_over_query


class Segmenter(nnx.Module):
  """A network that predicts the class of every pixel.

  Args:
    config: `model` part of a config, see `fpt_jax.configs.segmentation`.
    rngs: source of the initial weights.

  Raises:
    ValueError: a part that the config names does not exist, or does not fit another.
  """

  def __init__(self, config, *, rngs: nnx.Rngs):
    self.config = config
    options = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
    output_stride = config.backbone.output_stride
    self.backbone = build_backbone(
      config.backbone,
      output_stride=output_stride,
      remat=policy_of(config, "backbone"),
      **options,
    )
    self.pyramid = build_pyramid(config, SEGMENTATION_PYRAMIDS, self.backbone.channels, rngs=rngs)
    levels = self.pyramid.channels
    if config.fpt.enabled and len(levels) == 1:
      raise ValueError(
        f"pyramid {config.pyramid.name!r} has one level, and fpt needs several; choose another pyramid"
      )
    self.fpt = build_fpt(config, levels, rngs=rngs) if config.fpt.enabled else None
    head = dict(
      output_stride=output_stride,
      num_classes=config.num_classes,
      dropout=config.head.dropout,
      dropout_of=config.head.dropout_of,
      norm=config.norm,
      **options,
    )
    self.head = SemanticHead(levels, hidden=config.head.hidden, name=config.head.name, **head)
    self.auxiliary = (
      SemanticHead(self.backbone.channels[-2:-1], hidden=config.auxiliary.hidden, **head)
      if config.auxiliary.weight
      else None
    )

  def backbone_levels(
    self, image_BHWC: jax.Array, size_B2: jax.Array, *, train: bool = False
  ) -> Pyramid:
    """Computes C2..C5 of a batch, none coarser than the backbone's output stride.

    Args:
      image_BHWC: [B, H, W, 3] RGB in 0..255, float32 or uint8, zero-padded at the right and the bottom.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.
      train: use and update batch statistics, except those of a frozen backbone.
    """
    normalized_BHWC, valid_BHW = network_input(
      self.config, image_BHWC, size_B2, stride=self.backbone.coarsest_stride
    )
    with jax.named_scope("backbone"):
      return self.backbone(normalized_BHWC, valid_BHW, train=train)

  def fpt_levels(self, image_BHWC: jax.Array, size_B2: jax.Array) -> Pyramid:
    """Computes the levels that FPT transforms, without training; arguments as for `backbone_levels`."""
    return self.pyramid(self.backbone_levels(image_BHWC, size_B2), train=False)

  def logits_of_levels(
    self,
    levels: Pyramid,
    *,
    key: jax.Array | None = None,
    progress: float | jax.Array = 1.0,
    measured: Figures | None = None,
  ) -> FeatureMap:
    """Computes the logits of C2..C5.

    Args:
      levels: levels of the backbone, fine to coarse.
      key: PRNG key for training (dropout, DropBlock, batch statistics); None for inference.
      progress: share of the training that is done, 0 to 1, for DropBlock's schedule.
      measured: what the figures of FPT's health are added to; None for no measurement.

    Returns:
      [B, H, W, K] logits at the backbone's output stride.
    """
    fpt_key, head_key = (None, None) if key is None else jax.random.split(key)
    train = key is not None
    policy = policy_of(self.config, "pyramid", train=train)
    run_pyramid = recomputed(lambda pyramid, levels: pyramid(levels, train=train), policy)
    classify = recomputed(classified, policy_of(self.config, "heads", train=train))
    # The scopes are the names of the parameters: profiles and `fpt_jax.analyze` use them.
    with jax.named_scope("pyramid"):
      levels = run_pyramid(self.pyramid, levels)
    if self.fpt is not None:
      with jax.named_scope("fpt"):
        levels = self.fpt(levels, key=fpt_key, progress=progress, measured=measured)
    with jax.named_scope("head"):
      return classify(self.head, levels, head_key)

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
      batch: image_BHWC and size_B2 as for `backbone_levels`, and label_BHW, [B, H, W] int32 with a value
        outside 0..K-1 where a pixel has no class.
      key: PRNG key.
      progress: share of the training that is done, 0 to 1.
      measured: what the figures of FPT's health are added to; None for no measurement.

    Returns:
      Float32 scalars: loss_seg and, where its weight is not 0, loss_aux of the auxiliary head on C4,
      multiplied by the weight.
    """
    main_key, auxiliary_key = jax.random.split(key)
    levels = self.backbone_levels(batch["image_BHWC"], batch["size_B2"], train=True)
    labels_BHW = rows_over_query(batch["label_BHW"], stride=1)
    policy = policy_of(self.config, "heads")

    def loss_of(logits: FeatureMap, **hard) -> jax.Array:
      logits_BHWK = enlarged(self.config, logits, labels_BHW.shape[1:])
      return segmentation_loss(logits_BHWK, labels_BHW, self.config.class_weights, **hard)

    hard = {name: self.config[name] for name in ("hard_pixels", "hard_probability")}
    loss = recomputed(loss_of, policy)
    main_loss = recomputed(lambda logits: loss_of(logits, **hard), policy)
    result = {
      "loss_seg": main_loss(
        self.logits_of_levels(levels, key=main_key, progress=progress, measured=measured)
      )
    }
    if self.auxiliary is not None:
      weight = self.config.auxiliary.weight
      classify = recomputed(classified, policy)
      result["loss_aux"] = weight * loss(classify(self.auxiliary, levels[-2:-1], auxiliary_key))
    return result

  def logits(self, image_BHWC: jax.Array, size_B2: jax.Array) -> jax.Array:
    """Computes the logits of every pixel.

    Args:
      image_BHWC: [B, H, W, 3] RGB in 0..255, float32 or uint8, zero-padded at the right and the bottom.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.

    Returns:
      [B, H, W, K] float32 at the canvas's resolution; 0 far from the image.
    """
    levels = self.backbone_levels(image_BHWC, size_B2)
    return enlarged(self.config, self.logits_of_levels(levels), image_BHWC.shape[1:3])


def network_input(
  config, image_BHWC: jax.Array, size_B2: jax.Array, *, stride: int
) -> tuple[jax.Array, jax.Array]:
  """Returns what a backbone is computed from, with the rows of an image shared by devices.

  Args:
    config: `model` part of a config.
    image_BHWC, size_B2: as for `Segmenter.backbone_levels`.
    stride: largest stride in the backbone, pixels.

  Returns:
    Normalised images, [B, H, W, 3] of the config's dtype, and the positions on them, [B, H, W] bool.
  """
  valid_BHW = valid_positions(size_B2, *image_BHWC.shape[1:3])
  normalized_BHWC = normalize(config, image_BHWC, valid_BHW).astype(config.dtype)
  return rows_over_query((normalized_BHWC, valid_BHW), stride=stride)


def classified(head: SemanticHead, levels: Pyramid, key: jax.Array | None) -> FeatureMap:
  """Returns the logits of a head."""
  return head(levels, key=key)


def enlarged(config, logits: FeatureMap, size: tuple[int, int]) -> jax.Array:
  """[B, H, W, K] float32: the logits of every pixel of a canvas of this size, as the model's config says."""
  return upsample_bilinear(
    logits.values_BHWC,
    logits.valid_BHW,
    logits.stride,
    *size,
    align_corners=config.align_corners,
  )
