"""The three transformers between the levels of a pyramid (paper, fig. 2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, as_pyramid
from fpt_jax.models.fpt.grounding_transformer import GroundingTransformer
from fpt_jax.models.fpt.rendering_transformer import RenderingTransformer
from fpt_jax.models.fpt.self_transformer import SelfTransformer
from fpt_jax.models.layers import Norm, conv, drop_block

SCOPES = ("all", "adjacent")


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
    window: side of the window of the locality-constrained Grounding Transformer, positions, 5 in the
      paper; None for the global one.
    scope: "all" for transformers between all pairs of levels, "adjacent" for neighbouring levels only.
    gate: gate of the Rendering Transformer, "identity" (paper) or "sigmoid".
    scale: factor of the similarities; None for 1 / sqrt(channels of a part).
    norm: normalisation of every output level, see `layers.Norm`.
    drop_block_size, keep_probability: DropBlock of every output level, see `layers.drop_block` (5 and 0.9
      for detection, 3 and 0.9 for segmentation in the paper).
    implementation: implementation of the attention, see `ops.mos_attention`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: an option does not exist, or the channels cannot be divided into the parts.
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
    window: int | None = None,
    scope: str = "all",
    gate: str = "identity",
    scale: float | None = None,
    norm: str = "sync_bn",
    drop_block_size: int = 5,
    keep_probability: float = 0.9,
    implementation: str = "auto",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("scope", scope, SCOPES)
    self.channels = channels
    self.drop_block_size = drop_block_size
    self.keep_probability = keep_probability
    common = dict(dtype=dtype, rngs=rngs)
    attention = dict(scale=scale, implementation=implementation, **common)
    levels = range(len(in_channels))

    def sources(level: int, others) -> list[int]:
      return [o for o in others if scope == "all" or abs(o - level) == 1]

    self.project = nnx.List(
      [None if c == channels else conv(c, channels, 1, **common) for c in in_channels]
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
              channels, channels, channels, parts=grounding_parts, window=window, **attention
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
    self.fuse = nnx.List([])
    self.norm = nnx.List([])
    for level in levels:
      inputs = 1 + (1 if self_transformer else 0)
      inputs += len(self.grounding_transformers[level]) + len(self.rendering_transformers[level])
      self.fuse.append(conv(inputs * channels, channels, 3, bias=norm == "none", **common))
      self.norm.append(Norm(norm, channels, **common))

  def __call__(self, pyramid, *, key: jax.Array | None = None):
    """Transforms a pyramid.

    Args:
      pyramid: levels, fine to coarse, `FeatureMap`s or plain [B, H, W, C] arrays.
      key: PRNG key for training (DropBlock, batch statistics); None for inference.

    Returns:
      A tuple of `FeatureMap`s or arrays, as given, of the same sizes, with `channels` channels.

    Raises:
      ValueError: the number of levels or their channels are not those the module was built for, or the
        sizes are not (rounded) multiples of each other.
    """
    given = tuple(pyramid)
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
    outputs = []
    for i, level in enumerate(levels):
      parts = [level.values_BHWC]
      if self.self_transformers[i] is not None:
        with jax.named_scope(f"self_transformers.{i}"):
          parts.append(self.self_transformers[i](level))
      with jax.named_scope(f"grounding_transformers.{i}"):
        for name, transformer in self.grounding_transformers[i].items():
          parts.append(transformer(level, levels[source_level(name)]))
      with jax.named_scope(f"rendering_transformers.{i}"):
        for name, transformer in self.rendering_transformers[i].items():
          parts.append(transformer(level, levels[source_level(name)]))
      level_key = None if key is None else jax.random.fold_in(key, i)
      with jax.named_scope(f"fuse.{i}"):
        outputs.append(self.fused(i, level, parts, level_key))
    return tuple(outputs if isinstance(given[0], FeatureMap) else (o.values_BHWC for o in outputs))

  def fused(self, i: int, level: FeatureMap, parts: list[jax.Array], key) -> FeatureMap:
    """Fuses level i and its transformed versions: convolution, normalisation, DropBlock."""
    concatenated = level.with_values(jnp.concatenate(parts, axis=-1))
    y = self.norm[i](
      self.fuse[i](concatenated.masked()), valid_BHW=level.valid_BHW, train=key is not None
    )
    if key is not None:
      y = drop_block(
        y,
        key,
        block_size=self.drop_block_size,
        keep_probability=self.keep_probability,
        valid_BHW=level.valid_BHW,
      )
    return level.with_values(y)


def source_level(name: str) -> int:
  """Returns the index of the level in a name such as "from_2"."""
  return int(name.removeprefix("from_"))


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
  return FeaturePyramidTransformer(in_channels, rngs=rngs, **options)
