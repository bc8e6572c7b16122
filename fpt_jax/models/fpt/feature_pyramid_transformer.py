"""The wiring of the three transformers: a pyramid in, a richer one of the same sizes out (paper, fig. 2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, as_pyramid
from fpt_jax.models.fpt.grounding_transformer import GroundingTransformer
from fpt_jax.models.fpt.rendering_transformer import RenderingTransformer
from fpt_jax.models.fpt.self_transformer import SelfTransformer
from fpt_jax.models.layers import Norm, conv, drop_block

SCOPES = ("all", "adjacent")


class FeaturePyramidTransformer(nnx.Module):
  """Transforms any feature pyramid into one of the same sizes with richer contexts.

  Level l becomes a 3x3 convolution of the concatenation of itself, its self-transformed version, the
  grounded version from every coarser level and the rendered version from every finer one, followed by
  normalisation and DropBlock (paper, fig. 2 and 3.5).

  Args:
    in_channels: channels of each level, fine to coarse. A level that is not `channels` thick goes through a
      1x1 convolution first.
    channels: channels of every output level, 256 in the paper.
    self_transformer, grounding_transformer, rendering_transformer: which of the three to build.
    self_parts, grounding_parts: softmaxes in the mixtures, 2 and 4 in the paper.
    window: None for the global Grounding Transformer; 5 for the paper's locality-constrained one.
    scope: a level hears "all" other levels or the "adjacent" ones only.
    gate: of the Rendering Transformer.
    scale: of the similarities; None for 1 / sqrt(channels of a part).
    norm: see `layers.Norm`.
    drop_block_size, keep_probability: DropBlock of every output (5 and 0.9 for instances, 3 and 0.9 for
      pixels in the paper).
    implementation: of the attention, see `ops.mos_attention`.
    dtype: of the computation; parameters are float32.
    rngs: for the initial weights.
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
    if scope not in SCOPES:
      raise ValueError(f"scope={scope!r} does not exist; choose one of {', '.join(SCOPES)}")
    self.channels = channels
    self.drop_block_size = drop_block_size
    self.keep_probability = keep_probability
    common = dict(dtype=dtype, rngs=rngs)
    attention = dict(scale=scale, implementation=implementation, **common)
    levels = range(len(in_channels))

    def heard(level: int, others) -> list[int]:
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
            for coarse in heard(level, levels[level + 1 :])
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
            for fine in heard(level, levels[:level])
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
    """The transformed pyramid.

    Args:
      pyramid: fine to coarse, `FeatureMap`s or plain [B, H, W, C] arrays.
      key: a PRNG key to train (DropBlock, batch statistics); None to infer.

    Returns:
      A tuple of the kind given: `FeatureMap`s or arrays, sizes as given, `channels` thick.

    Raises:
      ValueError: the number of levels or their channels are not those the module was built for, or sizes
        are no (rounded) multiples of each other.
    """
    given = tuple(pyramid)
    if len(given) != len(self.project):
      raise ValueError(f"built for {len(self.project)} levels, got {len(given)}")
    levels = tuple(
      level if project is None else level.with_values(project(level.values_BHWC))
      for level, project in zip(as_pyramid(given), self.project, strict=True)
    )
    for i, level in enumerate(levels):
      if level.channels != self.channels:
        raise ValueError(
          f"level {i} was announced as {self.channels} channels, got {level.channels}"
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
  return int(name.removeprefix("from_"))


def build_fpt(config, *, levels: int = 4, rngs: nnx.Rngs) -> FeaturePyramidTransformer:
  """The FPT that the `model` part of a config describes, on a pyramid of equally thick levels."""
  options = {k: v for k, v in config.fpt.items() if k != "enabled"}
  channels = config.pyramid.channels
  return FeaturePyramidTransformer(
    (channels,) * levels, channels=channels, dtype=jnp.dtype(config.dtype), rngs=rngs, **options
  )
