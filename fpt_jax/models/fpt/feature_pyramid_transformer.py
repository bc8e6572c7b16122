"""The three transformers between the levels of a pyramid (paper, fig. 2)."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid, as_pyramid
from fpt_jax.models.fpt import health
from fpt_jax.models.fpt.grounding_transformer import GroundingTransformer
from fpt_jax.models.fpt.query_attention import Explanation, attention_maps, rendered_maps
from fpt_jax.models.fpt.rendering_transformer import RenderingTransformer
from fpt_jax.models.fpt.self_transformer import SelfTransformer
from fpt_jax.models.layers import ConvNorm, Norm, conv, drop_block
from fpt_jax.models.remat import policy_of, recomputed
from fpt_jax.ops.local_attention import Outside
from fpt_jax.ops.mos_attention import Similarity

SCOPES = ("all", "adjacent")
SIMILARITY_NORMS = ("none", "levels", "unit")
DROP_BLOCK_SCHEDULES = ("linear", "constant")
# The values of the options that give the bare equations of the paper, without further normalisation.
LITERAL: dict[str, Any] = {
  "similarity_norm": "none",
  "uniform_mixture": False,
  "output_norm": False,
  "gate": "identity",
  "outside": "zero",
  "drop_block_schedule": "constant",
}


class FeaturePyramidTransformer(nnx.Module):
  """Transforms a feature pyramid into one of the same sizes with richer contexts.

  Each level is concatenated with its self-transformed version, the grounded version from every coarser
  level and the rendered version from every finer level. A 3x3 convolution, a normalisation and DropBlock
  follow (paper, fig. 2 and section 3.5).

  Args:
    in_channels: channels of each level, fine to coarse. A level with another number than `channels` goes
      through a 1x1 convolution first.
    channels: channels of every output level, 256 in the paper.
    self_transformer, grounding_transformer, rendering_transformer: which of the three to build.
    self_parts, grounding_parts: number of softmaxes in the mixtures, 2 and 4 in the paper.
    grounding_similarity: similarity of the Grounding Transformer, "euclidean" (paper) or "dot".
    window: side of the window of the locality-constrained Grounding Transformer, positions, 5 in the
      paper; None for the global one.
    scope: "all" for transformers between all pairs of levels, "adjacent" for neighbouring levels only.
    similarity_norm: what bounds the similarities. "levels": the transformers see levels that are
      normalised by `norm`. "unit": queries and keys have the same length, see `NonLocalInteraction`.
      "none": nothing (paper).
    uniform_mixture: whether the mixtures start with equal weights, see `NonLocalInteraction`.
    output_norm: whether each transformer's output is normalised by `norm`, as in the authors' release.
    output_norm_scale: initial scale of these normalisations.
    gate: gate of the Rendering Transformer, "identity" (paper) or "sigmoid".
    outside: positions outside the map in a local window: "zero" for zero keys that take part in the
      softmax (paper), "masked" for none.
    scale: factor of the similarities; None for 1 / sqrt(channels of a part).
    wide: without transformers, whether a second 3x3 convolution gives the module as many parameters as
      it has with all three of them in this `scope`: a baseline of equal size.
    norm: normalisation of every output level, see `layers.Norm`.
    drop_block_size, keep_probability: DropBlock of every output level, see `layers.drop_block` (5 and 0.9
      for detection, 3 and 0.9 for segmentation in the paper).
    drop_block_schedule: "linear" if the share of dropped values rises from 0 during the training (Ghiasi et
      al. 2018, section 3), "constant" if not.
    literal: whether `LITERAL` replaces the options of the same names: the bare equations of the paper.
      Projections to `channels` are then drawn from a variance of 2 / fan-out instead of 1 / fan-in.
    implementation: implementation of the attention, see `ops.mos_attention`.
    remat: what the backward pass computes again in each transformer and in the fusion of each level, see
      `models.remat`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: an option does not exist, two options do not fit together, or the channels cannot be divided
      into the parts.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    channels: int = 256,
    self_transformer: bool = True,
    grounding_transformer: bool = True,
    rendering_transformer: bool = True,
    self_parts: int = 2,
    grounding_parts: int = 4,
    grounding_similarity: str = "euclidean",
    window: int | None = None,
    scope: str = "all",
    similarity_norm: str = "levels",
    uniform_mixture: bool = True,
    output_norm: bool = True,
    output_norm_scale: float = 1.0,
    gate: str = "sigmoid",
    outside: Outside = "zero",
    scale: float | None = None,
    wide: bool = False,
    norm: str = "sync_bn",
    drop_block_size: int = 5,
    keep_probability: float = 0.9,
    drop_block_schedule: str = "linear",
    literal: bool = False,
    implementation: str = "auto",
    remat: str = "none",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if literal:
      similarity_norm, uniform_mixture = LITERAL["similarity_norm"], LITERAL["uniform_mixture"]
      output_norm, gate, outside = LITERAL["output_norm"], LITERAL["gate"], LITERAL["outside"]
      drop_block_schedule = LITERAL["drop_block_schedule"]
    check_choice("scope", scope, SCOPES)
    check_choice("grounding_similarity", grounding_similarity, get_args(Similarity))
    check_choice("similarity_norm", similarity_norm, SIMILARITY_NORMS)
    check_choice("drop_block_schedule", drop_block_schedule, DROP_BLOCK_SCHEDULES)
    transforms = self_transformer or grounding_transformer or rendering_transformer
    if wide and transforms:
      raise ValueError("wide=True is a baseline without transformers; switch all three of them off")
    if norm == "none" and transforms and (similarity_norm == "levels" or output_norm):
      raise ValueError(
        "norm='none': similarity_norm='levels' and output_norm need a normalisation; set them to 'none' and "
        "False, or choose a norm"
      )
    self.channels = channels
    self.drop_block_size = drop_block_size
    self.keep_probability = keep_probability
    self.drop_block_schedule = drop_block_schedule
    self.remat = remat
    common = dict(dtype=dtype, rngs=rngs)
    attention = dict(
      scale=scale,
      unit_length=similarity_norm == "unit",
      uniform_mixture=uniform_mixture,
      implementation=implementation,
      **common,
    )
    levels = range(len(in_channels))

    def sources(level: int, others) -> list[int]:
      return [o for o in others if scope == "all" or abs(o - level) == 1]

    project_init = None if literal else nnx.initializers.lecun_normal()
    self.project = nnx.List(
      [
        None if c == channels else conv(c, channels, 1, kernel_init=project_init, **common)
        for c in in_channels
      ]
    )
    self.level_norms = nnx.List(
      [
        Norm(norm, channels, **common) if transforms and similarity_norm == "levels" else None
        for _ in levels
      ]
    )
    self.self_transformers = nnx.List(
      [
        SelfTransformer(channels, channels, parts=self_parts, **attention)
        if self_transformer
        else None
        for _ in levels
      ]
    )
    self.grounding_transformers = nnx.List(
      [
        nnx.Dict(
          {
            f"from_{coarse}": GroundingTransformer(
              *(channels, channels, channels),
              parts=grounding_parts,
              similarity=grounding_similarity,
              window=window,
              outside=outside,
              **attention,
            )
            for coarse in sources(level, levels[level + 1 :])
            if grounding_transformer
          }
        )
        for level in levels
      ]
    )
    self.rendering_transformers = nnx.List(
      [
        nnx.Dict(
          {
            f"from_{fine}": RenderingTransformer(channels, channels, gate=gate, **common)
            for fine in sources(level, levels[:level])
            if rendering_transformer
          }
        )
        for level in levels
      ]
    )
    self.output_norms = nnx.List([])
    self.widen = nnx.List([])
    self.fuse = nnx.List([])
    self.norm = nnx.List([])
    pairs = sum(len(sources(level, levels[level + 1 :])) for level in levels)
    hidden = wide_channels(len(levels), pairs, channels) if wide else channels
    for level in levels:
      transformed = self.transformers(level)
      if output_norm:
        norms = {
          name: Norm(norm, channels, initial_scale=output_norm_scale, **common)
          for name in transformed
        }
        self.output_norms.append(nnx.Dict(norms))
      if wide:
        self.widen.append(ConvNorm(channels, hidden, 3, norm=norm, **common))
      inputs = hidden + len(transformed) * channels
      self.fuse.append(conv(inputs, channels, 3, bias=norm == "none", **common))
      self.norm.append(Norm(norm, channels, **common))

  def __call__(
    self,
    pyramid,
    *,
    key: jax.Array | None = None,
    progress: float | jax.Array = 1.0,
    measured: health.Figures | None = None,
  ):
    """Transforms a pyramid.

    Args:
      pyramid: levels, fine to coarse, `FeatureMap`s or plain [B, H, W, C] arrays.
      key: PRNG key for training (DropBlock, batch statistics); None for inference.
      progress: share of the training that is done, 0 to 1, for DropBlock's schedule.
      measured: what the figures of `health` are added to; None for no measurement.

    Returns:
      A tuple of `FeatureMap`s or arrays, as given, of the same sizes, with `channels` channels.

    Raises:
      ValueError: the number of levels or their channels are not those the module was built for, or the
        sizes are not (rounded) multiples of each other.
    """
    given = tuple(pyramid)
    levels = self.projected(given)
    train = key is not None

    def fused(i: int, level: FeatureMap, parts: dict[str, jax.Array], key) -> FeatureMap:
      def fuse(fpt, level, outputs, key, progress):
        return fpt.fused(i, level, dict(zip(parts, outputs, strict=True)), key, progress)

      # a list, because JAX sorts the keys of a dictionary, and the order is that of the concatenation
      outputs = list(parts.values())
      return recomputed(fuse, self.policy(train))(self, level, outputs, key, progress)

    outputs = []
    for i, parts in enumerate(self.transformed(levels, train=train, measured=measured)):
      level_key = None if key is None else jax.random.fold_in(key, i)
      with jax.named_scope(f"fuse.{i}"):
        outputs.append(fused(i, levels[i], parts, level_key))
    return tuple(outputs if isinstance(given[0], FeatureMap) else (o.values_BHWC for o in outputs))

  def policy(self, train: bool) -> str:
    """Returns the rematerialisation policy: `remat` in training, "none" in inference."""
    return self.remat if train else "none"

  def projected(self, given) -> Pyramid:
    """Returns the levels with `channels` channels each; `given` and errors as for `__call__`."""
    if len(given) != len(self.project):
      raise ValueError(f"this FPT was built for {len(self.project)} levels, got {len(given)}")
    levels = tuple(
      level if project is None else level.with_values(project(level.values_BHWC))
      for level, project in zip(as_pyramid(given), self.project, strict=True)
    )
    for i, level in enumerate(levels):
      if level.channels != self.channels:
        raise ValueError(
          f"this FPT was built for {self.channels} channels at level {i}, got {level.channels}"
        )
    return levels

  def seen(self, levels: Pyramid, *, train: bool) -> Pyramid:
    """Returns the levels as the transformers see them: normalised, if `similarity_norm` is "levels"."""
    return tuple(
      level
      if norm is None
      else level.with_values(norm(level.values_BHWC, valid_BHW=level.valid_BHW, train=train))
      for level, norm in zip(levels, self.level_norms, strict=True)
    )

  def transformers(self, level: int) -> dict[str, tuple[nnx.Module, int]]:
    """Returns the transformers whose outputs a level is concatenated with, in this order.

    Args:
      level: index of the level.

    Returns:
      For names such as "grounding_from_2", the transformer and the index of its other level, which is the
      level itself for "self".
    """
    found = {}
    if self.self_transformers[level] is not None:
      found["self"] = (self.self_transformers[level], level)
    for kind, group in (
      ("grounding", self.grounding_transformers[level]),
      ("rendering", self.rendering_transformers[level]),
    ):
      for source, transformer in group.items():
        found[f"{kind}_{source}"] = (transformer, source_level(source))
    return found

  def transformed(
    self, levels: Pyramid, *, train: bool, measured: health.Figures | None = None
  ) -> list[dict[str, jax.Array]]:
    """Returns the outputs of the transformers of each level by name, before their normalisation."""
    seen = self.seen(levels, train=train)
    run = recomputed(lambda transformer, *levels: transformer(*levels), self.policy(train))
    results = []
    for i, level in enumerate(seen):
      parts = {}
      for name, (transformer, source) in self.transformers(i).items():
        others = () if source == i else (seen[source],)
        with jax.named_scope(f"{name.partition('_')[0]}_transformers.{i}"):
          parts[name] = run(transformer, level, *others)
      results.append(parts)
    if measured is not None:
      measured.add(lambda: self.figures(levels, seen, results))
    return results

  def explain(self, pyramid, points_BS2: jax.Array) -> dict[tuple[int, int], Explanation]:
    """Computes what the levels take from each other at chosen points of the image.

    Args:
      pyramid: levels, fine to coarse, as for `__call__`.
      points_BS2: [B, S, 2] y and x in pixels of the image (the unit of the levels' strides); the centre of
        the first pixel is at 0.5.

    Returns:
      An `Explanation` for each pair of a level and the level that it takes from: the same one for the
      Self-Transformer, a coarser one for the Grounding, a finer one for the Rendering Transformer.

    Raises:
      ValueError: as `__call__`.
    """
    seen = self.seen(self.projected(tuple(pyramid)), train=False)
    found = {}
    for i, level in enumerate(seen):
      # position i is centred on pixel i * stride, see `feature_map.downsample_valid`
      nearest_BS2 = jnp.round((points_BS2 - 0.5) / level.stride).astype(jnp.int32)
      positions_BS2 = jnp.clip(nearest_BS2, 0, jnp.array(level.size)[None, None] - 1)
      for transformer, source in self.transformers(i).values():
        if isinstance(transformer, RenderingTransformer):
          found[i, source] = rendered_maps(transformer, level, seen[source], positions_BS2)
        else:
          interaction = transformer.interaction
          found[i, source] = attention_maps(interaction, level, seen[source], positions_BS2)
    return found

  def figures(
    self, levels: Pyramid, seen: Pyramid, results: list[dict[str, jax.Array]]
  ) -> dict[str, jax.Array]:
    """Returns the figures of `health` by names such as "fpt/level0/grounding_from_2/entropy".

    Args:
      levels: the levels, which are concatenated with the outputs of their transformers.
      seen: the levels that the transformers see.
      results: outputs of the transformers of each level by name.
    """
    figures = {}
    for i, (level, parts) in enumerate(zip(levels, results, strict=True)):
      positions_BS2 = health.sampled_positions(level.valid_BHW)
      for name, values_BHWC in ({"identity": level.values_BHWC} | parts).items():
        figures[f"fpt/level{i}/{name}/rms"] = health.variation(values_BHWC, positions_BS2)
      for name, (transformer, source) in self.transformers(i).items():
        if not isinstance(transformer, RenderingTransformer):
          attention = health.attention_figures(
            transformer.interaction, seen[i], seen[source], positions_BS2
          )
          figures |= {f"fpt/level{i}/{name}/{key}": value for key, value in attention.items()}
    return figures

  def fused(
    self, i: int, level: FeatureMap, parts: dict[str, jax.Array], key, progress
  ) -> FeatureMap:
    """Fuses level i and its transformed versions: convolution, normalisation, DropBlock."""
    train = key is not None

    def normalised(norm: Norm, x_BHWC: jax.Array) -> jax.Array:
      return norm(x_BHWC, valid_BHW=level.valid_BHW, train=train)

    if self.output_norms:
      parts = {name: normalised(self.output_norms[i][name], part) for name, part in parts.items()}
    if self.widen:
      level = self.widen[i](level, train=train)
    concatenated = level.with_values(jnp.concatenate([level.values_BHWC, *parts.values()], axis=-1))
    y = normalised(self.norm[i], self.fuse[i](concatenated.masked()))
    if train and self.keep_probability < 1:
      dropped = 1 - self.keep_probability
      if self.drop_block_schedule == "linear":
        dropped *= progress
      y = drop_block(
        y,
        key,
        block_size=self.drop_block_size,
        keep_probability=1 - dropped,
        valid_BHW=level.valid_BHW,
      )
    return level.with_values(y)


def source_level(name: str) -> int:
  """Returns the index of the level in a name such as "from_2"."""
  return int(name.removeprefix("from_"))


def wide_channels(levels: int, pairs: int, channels: int) -> int:
  """Returns the channels between two 3x3 convolutions with as many weights as FPT has.

  FPT has three 1x1 convolutions in each self-transformer and grounding transformer, three 3x3 ones in each
  rendering transformer, and a 3x3 one per level over the level and all of its transformers.

  Args:
    levels: number of levels.
    pairs: number of pairs of levels that interact.
    channels: channels of a level.
  """
  kernels = 3 * (levels + pairs) + 27 * pairs + 9 * 2 * (levels + pairs)
  return round(kernels * channels / (18 * levels))


def build_fpt(config, in_channels: tuple[int, ...], *, rngs: nnx.Rngs) -> FeaturePyramidTransformer:
  """Builds the FPT that a config describes.

  Args:
    config: `model` part of a config.
    in_channels: channels of each level of the pyramid, fine to coarse.
    rngs: source of the initial weights.

  Raises:
    ValueError: an option does not exist, or the channels cannot be divided into the parts.
  """
  options = {k: v for k, v in config.fpt.items() if k != "enabled"}
  options.update(channels=config.pyramid.channels, dtype=jnp.dtype(config.dtype))
  options.update(remat=policy_of(config, "fpt"))
  return FeaturePyramidTransformer(in_channels, rngs=rngs, **options)
