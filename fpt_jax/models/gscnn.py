"""GSCNN: semantic segmentation with a second stream for shape.

Takikawa et al., Gated-SCNN: Gated Shape CNNs for Semantic Segmentation (arXiv 1907.05740).

Shapes: B batch, H W rows and columns of the canvas, K classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones import build_backbone
from fpt_jax.models.backbones.wider_resnet import WiderResNet
from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.fpt.health import Figures
from fpt_jax.models.heads.gated_shape import EdgeAwareHead, ShapeStream
from fpt_jax.models.layers import DROPPED
from fpt_jax.models.remat import policy_of, recomputed
from fpt_jax.models.segmenter import enlarged, network_input
from fpt_jax.ops.canny import canny
from fpt_jax.ops.edges import balanced_cross_entropy, class_borders, gradient_loss
from fpt_jax.ops.losses import segmentation_loss
from fpt_jax.run.sharding import rows_over_query

NAME = "gscnn"  # of the head in a config
CANNY = (10, 100)  # thresholds in the authors' code
EDGE_STAGES = (0, 2, 3, 6)  # of a WiderResNet, for the shape stream
FINE_STAGE = 1  # for the decoder


class GatedShapeCNN(nnx.Module):
  """A network that predicts the class of every pixel, and the edges between the classes.

  Args:
    config: `model` part of a config, see `fpt_jax.configs.segmentation`, whose head is "gscnn".
    rngs: source of the initial weights.

  Raises:
    ValueError: a part that the config names does not exist, or does not fit GSCNN.
  """

  def __init__(self, config, *, rngs: nnx.Rngs):
    check_fits(config)
    self.config = config
    options = dict(dtype=jnp.dtype(config.dtype), rngs=rngs)
    output_stride = config.backbone.output_stride
    self.backbone = build_backbone(
      config.backbone,
      output_stride=output_stride,
      remat=policy_of(config, "backbone"),
      **options,
    )
    if not isinstance(self.backbone, WiderResNet):
      raise ValueError(
        f"head {NAME!r} needs the stages of the backbone 'wider_resnet38', got {config.backbone.name!r}"
      )
    channels = self.backbone.stage_channels
    self.shape_stream = ShapeStream([channels[i] for i in EDGE_STAGES], norm=config.norm, **options)
    self.head = EdgeAwareHead(
      channels[FINE_STAGE],
      channels[-1],
      hidden=config.head.hidden,
      output_stride=output_stride,
      num_classes=config.num_classes,
      dropout=config.head.dropout,
      dropout_of=config.head.dropout_of,
      norm=config.norm,
      **options,
    )

  def backbone_levels(
    self,
    image_BHWC: jax.Array,
    size_B2: jax.Array,
    *,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> Pyramid:
    """Computes the stages of the backbone for a batch.

    Args:
      image_BHWC: [B, H, W, 3] float32 RGB in 0..255, zero-padded at the right and the bottom.
      size_B2: [B, 2] int32, height and width of each image on the canvas, pixels.
      train: use and update batch statistics, except those of a frozen backbone.
      key: PRNG key for the backbone's dropout; None for no dropout.
    """
    normalized_BHWC, valid_BHW = network_input(
      self.config, image_BHWC, size_B2, stride=self.backbone.coarsest_stride
    )
    with jax.named_scope("backbone"):
      return self.backbone.every_stage(normalized_BHWC, valid_BHW, train=train, key=key)

  def maps(
    self, image_BHWC: jax.Array, stages: Pyramid, *, key: jax.Array | None = None
  ) -> tuple[FeatureMap, FeatureMap]:
    """Computes the logits of the classes and of edges.

    Args:
      image_BHWC: [B, H, W, 3] float32 RGB in 0..255.
      stages: stages of the backbone.
      key: PRNG key for training (dropout, batch statistics); None for inference.

    Returns:
      [B, H, W, K] logits of the classes at stride 2, and [B, H, W, 1] logits of an edge at stride 1.
    """
    train = key is not None
    policy = policy_of(self.config, "heads", train=train)
    find = recomputed(lambda stream, maps, canny: stream(maps, canny, train=train), policy)
    classify = recomputed(
      lambda head, fine, coarse, edges, key: head(fine, coarse, edges, key=key), policy
    )
    with jax.named_scope("canny"):
      canny_BHW = canny(image_BHWC, stages[0].valid_BHW, *CANNY)
    with jax.named_scope("shape_stream"):
      of_shape = [stages[i] for i in EDGE_STAGES]
      edge_logits, edges = find(self.shape_stream, of_shape, canny_BHW)
    with jax.named_scope("head"):
      return classify(self.head, stages[FINE_STAGE], stages[-1], edges, key), edge_logits

  def losses(
    self,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    progress: float | jax.Array = 1.0,
    measured: Figures | None = None,
  ) -> dict[str, jax.Array]:
    """Computes the training losses of a batch, whose sum is minimised (section 3.3).

    Args:
      batch: as for `segmenter.Segmenter.losses`.
      key: PRNG key.
      progress, measured: not used, because there is no FPT.

    Returns:
      Float32 scalars, multiplied by their weights in `config.edges`: loss_seg of the classes, loss_edge of
      the shape stream's edges, loss_seg_edge of the classes of pixels on predicted edges, and loss_gradient,
      which compares the borders in the prediction and in the labels.
    """
    del progress, measured
    backbone_key, head_key, noise_key = jax.random.split(key, 3)
    image_BHWC = batch["image_BHWC"]
    stages = self.backbone_levels(image_BHWC, batch["size_B2"], train=True, key=backbone_key)
    labels_BHW = rows_over_query(batch["label_BHW"], stride=1)
    logits, edge_logits = self.maps(image_BHWC, stages, key=head_key)

    def losses_of(logits: FeatureMap, edge_logits_BHW: jax.Array) -> dict[str, jax.Array]:
      config, edges = self.config, self.config.edges
      classes = config.num_classes
      logits_BHWK = enlarged(config, logits, labels_BHW.shape[1:])
      edge_logits_BHW = edge_logits_BHW.astype(jnp.float32)
      border_BHW = class_borders(labels_BHW, classes, edges.radius)
      labelled_BHW = (labels_BHW >= 0) & (labels_BHW < classes)
      predicted_BHW = nnx.sigmoid(edge_logits_BHW) > edges.threshold
      noise_BHWK = jax.random.gumbel(noise_key, logits_BHWK.shape, jnp.float32)
      return {
        "loss_seg": segmentation_loss(
          logits_BHWK,
          labels_BHW,
          config.class_weights,
          hard_pixels=config.hard_pixels,
          hard_probability=config.hard_probability,
        ),
        "loss_edge": edges.weight
        * balanced_cross_entropy(edge_logits_BHW, border_BHW, labelled_BHW),
        "loss_seg_edge": edges.class_weight
        * segmentation_loss(logits_BHWK, jnp.where(predicted_BHW, labels_BHW, -1)),
        "loss_gradient": edges.gradient_weight
        * gradient_loss(logits_BHWK, labels_BHW, noise_BHWK, temperature=edges.temperature),
      }

    return recomputed(losses_of, policy_of(self.config, "heads"))(
      logits, edge_logits.values_BHWC[..., 0]
    )

  def logits(self, image_BHWC: jax.Array, size_B2: jax.Array) -> jax.Array:
    """Computes the logits of every pixel; see `segmenter.Segmenter.logits`."""
    stages = self.backbone_levels(image_BHWC, size_B2)
    return enlarged(self.config, self.maps(image_BHWC, stages)[0], image_BHWC.shape[1:3])


def check_fits(config) -> None:
  """Raises ValueError if a config asks for parts that GSCNN does not have."""
  if config.fpt.enabled or config.pyramid.name != "none":
    raise ValueError(
      f"head {NAME!r} is on the stages of the backbone; set pyramid.name='none' and fpt.enabled=False, or "
      "choose another head"
    )
  if config.auxiliary.weight:
    raise ValueError(f"head {NAME!r} has no auxiliary loss; set auxiliary.weight=0.0")
  check_choice("dropout_of", config.head.dropout_of, DROPPED)
