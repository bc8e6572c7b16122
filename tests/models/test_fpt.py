"""FPT against float64 NumPy from the paper's equations, values and gradients; its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, subsample
from fpt_jax.models.fpt import (
  FeaturePyramidTransformer,
  GroundingTransformer,
  RenderingTransformer,
  SelfTransformer,
)
from fpt_jax.models.fpt.feature_pyramid_transformer import LITERAL
from fpt_jax.models.state import arrays_of, skeleton
from tests.models import reference

FINE, COARSE = (7, 5), (4, 3)  # odd, and not multiples of each other
SIZES = ((9, 7), (5, 4), (3, 2))  # 9 to 3 and 7 to 2: four times, rounded up
CHANNELS = 8


def level(rng, size, channels=CHANNELS, stride=1):
  values = jnp.asarray(rng.standard_normal((1, *size, channels)), jnp.float32)
  return FeatureMap(values, jnp.ones((1, *size), bool), stride)


def builders(parts):
  return {
    "self": (lambda: SelfTransformer(CHANNELS, CHANNELS, parts=parts, rngs=nnx.Rngs(1)), 1),
    "grounding": (
      lambda: GroundingTransformer(CHANNELS, CHANNELS, CHANNELS, parts=parts, rngs=nnx.Rngs(2)),
      2,
    ),
    "rendering": (lambda: RenderingTransformer(CHANNELS, CHANNELS, rngs=nnx.Rngs(3)), 2),
  }


def inputs_of(kind, rng):
  fine, coarse = level(rng, FINE), level(rng, COARSE, stride=2)
  return {"self": (fine,), "grounding": (fine, coarse), "rendering": (coarse, fine)}[kind]


def reference_of(kind):
  return getattr(reference, f"{kind}_transformer")


CASES = [("self", n) for n in (1, 2, 4)] + [("grounding", n) for n in (1, 2, 4)]
CASES += [("rendering", 1)]


@pytest.mark.parametrize(("kind", "parts"), CASES)
def test_transformer_equals_the_equations(kind, parts, rng):
  build, _ = builders(parts)[kind]
  structure = skeleton(build)
  # larger than initial weights, so that the softmaxes are far from uniform
  arrays = {
    n: np.asarray(rng.standard_normal(s.shape), np.float32) for n, s in structure.shapes.items()
  }
  maps = inputs_of(kind, rng)
  cotangent = rng.standard_normal((*maps[0].size, CHANNELS))

  @jax.jit
  def value_and_gradients(arrays, values):
    def scalar(arrays, values):
      levels = [m.with_values(v) for m, v in zip(maps, values, strict=True)]
      out = structure.fill(arrays)(*levels)[0]
      return jnp.sum(out * jnp.asarray(cotangent, jnp.float32)), out

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(arrays, values)

  (array_gradients, value_gradients), out = value_and_gradients(
    arrays, [m.values_BHWC for m in maps]
  )
  parameters = {n: np.float64(a) for n, a in arrays.items()}
  values = [np.float64(m.values_BHWC[0]) for m in maps]
  expected = reference_of(kind)(*values, parameters)
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

  # the derivative along a random direction of each array, by central differences in float64
  def scalar(values, parameters):
    return np.sum(reference_of(kind)(*values, parameters) * cotangent)

  step = 1e-5
  # some gradients are zero up to rounding: a key's bias shifts all scores of a row equally
  noise = 1e-6 * max(np.linalg.norm(g) for g in (*array_gradients.values(), *value_gradients))
  for name, gradient in array_gradients.items():
    direction = rng.standard_normal(gradient.shape)
    ends = [
      scalar(values, parameters | {name: parameters[name] + sign * step * direction})
      for sign in (1, -1)
    ]
    assert_same_slope(gradient, direction, (ends[0] - ends[1]) / (2 * step), noise, name)
  for i, gradient in enumerate(value_gradients):
    direction = rng.standard_normal(values[i].shape)
    ends = []
    for sign in (1, -1):
      moved = list(values)
      moved[i] = values[i] + sign * step * direction
      ends.append(scalar(moved, parameters))
    assert_same_slope(gradient[0], direction, (ends[0] - ends[1]) / (2 * step), noise, f"input {i}")


def test_grounding_by_dot_product(rng):
  pyramid = FeaturePyramidTransformer(
    (CHANNELS,) * 2, channels=CHANNELS, grounding_similarity="dot", rngs=nnx.Rngs(0)
  )
  module = pyramid.grounding_transformers[0]["from_1"]
  fine, coarse = inputs_of("grounding", rng)
  parameters = {n: np.float64(a) for n, a in arrays_of(module).items()}
  values = [np.float64(m.values_BHWC[0]) for m in (fine, coarse)]
  expected = reference.non_local(*values, parameters, "dot")
  np.testing.assert_allclose(module(fine, coarse)[0], expected, atol=2e-5 * np.abs(expected).max())


def assert_same_slope(gradient, direction, expected, noise, name):
  slope = np.sum(np.float64(gradient) * direction)
  tolerance = (1e-4 * np.linalg.norm(gradient) + noise) * np.linalg.norm(direction)
  assert abs(slope - expected) <= tolerance, name


def on_canvas(m: FeatureMap, rng, extra: int = 3) -> FeatureMap:
  """Returns the map in the corner of a larger canvas, with other values on the padding."""
  pad = ((0, 0), (0, extra), (0, extra + 1), (0, 0))
  values = jnp.pad(m.values_BHWC, pad)
  valid = jnp.pad(m.valid_BHW, pad[:3])
  noise = jnp.asarray(rng.standard_normal(values.shape), jnp.float32) * 5
  return FeatureMap(jnp.where(valid[..., None], values, noise), valid, m.stride)


@pytest.mark.parametrize("kind", ["self", "grounding"])
def test_padding_changes_nothing(kind, rng):
  build, _ = builders(2)[kind]
  maps = inputs_of(kind, rng)
  module = build()
  height, width = maps[0].size
  alone = nnx.jit(module)(*maps)
  padded = nnx.jit(module)(*(on_canvas(m, rng) for m in maps))
  np.testing.assert_allclose(padded[:, :height, :width], alone, atol=2e-6)


def pyramid(rng, channels=CHANNELS, size=(16, 12), levels=3):
  finest = level(rng, size, channels, 4)
  maps = [finest]
  while len(maps) < levels:
    maps.append(subsample(maps[-1]))
  return tuple(
    m.with_values(jnp.asarray(rng.standard_normal(m.values_BHWC.shape), jnp.float32)) for m in maps
  )


def test_whole_pyramid_on_a_canvas(rng):
  module = FeaturePyramidTransformer(
    (CHANNELS,) * 3, channels=CHANNELS, norm="none", literal=True, rngs=nnx.Rngs(0)
  )
  levels = pyramid(rng)
  padded = []
  for i, m in enumerate(levels):
    grow = ((0, 0), (0, 8 >> i), (0, 4 >> i), (0, 0))
    valid = jnp.pad(m.valid_BHW, grow[:3])
    values = jnp.where(valid[..., None], jnp.pad(m.values_BHWC, grow), 7.0)
    padded.append(FeatureMap(values, valid, m.stride))
  for alone, inside in zip(nnx.jit(module)(levels), nnx.jit(module)(tuple(padded)), strict=True):
    height, width = alone.size
    np.testing.assert_allclose(inside.values_BHWC[:, :height, :width], alone.values_BHWC, atol=1e-5)


def test_wiring_equals_figure_2(rng):
  module = FeaturePyramidTransformer(
    (CHANNELS,) * 3, channels=CHANNELS, norm="none", literal=True, rngs=nnx.Rngs(0)
  )
  levels = [jnp.asarray(rng.standard_normal((1, *s, CHANNELS)), jnp.float32) for s in SIZES]
  parameters = {n: np.float64(a) for n, a in arrays_of(module).items()}
  expected = reference.feature_pyramid_transformer([np.float64(m[0]) for m in levels], parameters)
  for ours, theirs in zip(nnx.jit(module)(levels), expected, strict=True):
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("similarity_norm", ["levels", "unit"])
def test_conditioning_equals_the_equations(similarity_norm, rng):
  sizes = SIZES[1:]
  structure = skeleton(
    lambda: FeaturePyramidTransformer(
      (CHANNELS,) * 2,
      channels=CHANNELS,
      similarity_norm=similarity_norm,
      gate="sigmoid",
      keep_probability=1.0,
      rngs=nnx.Rngs(0),
    )
  )
  arrays = {
    n: np.asarray(0.5 * rng.standard_normal(s.shape), np.float32)
    for n, s in structure.shapes.items()
  }
  levels = [rng.standard_normal((*size, CHANNELS)) for size in sizes]
  cotangents = [rng.standard_normal((*size, CHANNELS)) for size in sizes]

  @jax.jit
  def value_and_gradients(arrays, levels):
    def scalar(arrays, levels):
      outputs = structure.fill(arrays)(levels, key=jax.random.key(0))
      weighted = [jnp.sum(y[0] * w) for y, w in zip(outputs, cotangents, strict=True)]
      return sum(weighted), outputs

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(arrays, levels)

  given = [jnp.asarray(level[None], jnp.float32) for level in levels]
  (array_gradients, level_gradients), outputs = value_and_gradients(arrays, given)
  parameters = {n: np.float64(a) for n, a in arrays.items()}

  def reference_of(parameters, levels):
    return reference.feature_pyramid_transformer(levels, parameters, sigmoid=True)

  for ours, theirs in zip(outputs, reference_of(parameters, levels), strict=True):
    np.testing.assert_allclose(ours[0], theirs, atol=2e-5 * np.abs(theirs).max())

  # derivatives along a random direction of each group of arrays, and of the levels
  groups = {name.split(".")[0]: [] for name in arrays}
  groups |= {kind: [] for kind in ("mixture", "log_temperature")}
  for name in structure.parameters():
    for group in groups:
      if group in name.split("."):
        groups[group].append(name)
  groups["levels"] = []
  for group, names in groups.items():
    if group == "log_temperature" and similarity_norm == "levels":
      assert not names
      continue
    directions = {name: rng.standard_normal(arrays[name].shape) for name in names}
    moves = [rng.standard_normal(level.shape) * (group == "levels") for level in levels]
    ends = []
    for step in (1e-5, -1e-5):
      moved = parameters | {n: parameters[n] + step * d for n, d in directions.items()}
      moved_levels = [level + step * move for level, move in zip(levels, moves, strict=True)]
      outputs = reference_of(moved, moved_levels)
      ends.append(sum(np.sum(y * w) for y, w in zip(outputs, cotangents, strict=True)))
    slope = sum(np.sum(np.float64(array_gradients[n]) * d) for n, d in directions.items())
    slope += sum(np.sum(g[0] * move) for g, move in zip(level_gradients, moves, strict=True))
    assert slope != 0, group
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-3), group


def test_mixtures_can_start_uniform(rng):
  fine, coarse = inputs_of("grounding", rng)
  module = GroundingTransformer(
    CHANNELS, CHANNELS, CHANNELS, uniform_mixture=True, rngs=nnx.Rngs(0)
  ).interaction
  pi_BM = module.mixture_weights(module.key(coarse.values_BHWC), coarse.valid_BHW)
  np.testing.assert_allclose(pi_BM, 1 / 4)

  def mean(module, fine, coarse):
    return jnp.mean(jnp.square(module(fine, coarse)))

  gradient = nnx.jit(nnx.grad(mean))(module, fine, coarse)
  assert np.abs(gradient["mixture"]["kernel"][...]).max() > 0


def test_drop_block_can_rise_linearly(rng):
  x = jnp.asarray(rng.standard_normal((4, 16, 16, CHANNELS)), jnp.float32)

  def share_of_zeros(schedule, progress):
    module = FeaturePyramidTransformer(
      (CHANNELS,),
      channels=CHANNELS,
      keep_probability=0.7,
      drop_block_schedule=schedule,
      rngs=nnx.Rngs(0),
    )
    run = nnx.jit(lambda module, progress: module([x], key=jax.random.key(0), progress=progress))
    return float(jnp.mean(run(module, progress)[0] == 0))

  assert share_of_zeros("linear", 0.0) == 0
  half, whole, constant = (
    share_of_zeros(*case) for case in (("linear", 0.5), ("linear", 1.0), ("constant", 0.0))
  )
  assert 0.1 < half < 0.2 < whole < 0.35
  assert whole == constant


def test_a_wide_baseline_has_as_many_parameters():
  def count(**options):
    structure = skeleton(
      lambda: FeaturePyramidTransformer((48,) * 4, channels=48, rngs=nnx.Rngs(0), **options)
    )
    return sum(np.prod(structure.shapes[name].shape) for name in structure.parameters())

  none = dict(self_transformer=False, grounding_transformer=False, rendering_transformer=False)
  for scope in ("all", "adjacent"):
    assert count(wide=True, scope=scope, **none) == pytest.approx(count(scope=scope), rel=0.01)
  assert count(**none) < count() / 8


@pytest.mark.parametrize("sizes", [((8, 8), (4, 4), (2, 2)), ((25, 17), (13, 9)), ((6, 5),)])
def test_plain_arrays_keep_their_sizes(sizes, rng):
  channels = tuple(4 * (i + 1) for i in range(len(sizes)))
  module = FeaturePyramidTransformer(channels, channels=8, rngs=nnx.Rngs(0))
  maps = [
    jnp.asarray(rng.standard_normal((2, *s, c)), jnp.float32)
    for s, c in zip(sizes, channels, strict=True)
  ]
  train = nnx.jit(lambda module, maps, key: module(maps, key=key))
  outputs = train(module, maps, jax.random.key(0))
  assert [o.shape for o in outputs] == [(2, *s, 8) for s in sizes]
  assert all(np.isfinite(o).all() for o in outputs)


def test_switches_and_scope_decide_what_is_built():
  def names(**options):
    build = lambda: FeaturePyramidTransformer((8,) * 4, channels=8, rngs=nnx.Rngs(0), **options)
    return skeleton(build).shapes

  only_self = names(grounding_transformer=False, rendering_transformer=False)
  assert any(n.startswith("self_transformers") for n in only_self)
  assert not any(n.startswith(("grounding", "rendering")) for n in only_self)
  assert only_self["fuse.0.kernel"].shape == (3, 3, 16, 8)
  assert names()["fuse.2.kernel"].shape == (3, 3, 8 * 5, 8)
  adjacent = names(scope="adjacent")
  assert adjacent["fuse.0.kernel"].shape == (3, 3, 8 * 3, 8)
  assert adjacent["fuse.1.kernel"].shape == (3, 3, 8 * 4, 8)


def test_literal_is_short_for_its_options():
  def built(**options):
    return nnx.graphdef(
      FeaturePyramidTransformer((8, 8), channels=8, window=3, rngs=nnx.Rngs(0), **options)
    )

  assert built(literal=True) == built(**LITERAL) != built()


@pytest.mark.parametrize("implementation", ["naive", "chunked", "pallas", "auto"])
def test_a_window_accepts_every_implementation(implementation, rng):
  module = GroundingTransformer(
    CHANNELS, CHANNELS, CHANNELS, window=3, implementation=implementation, rngs=nnx.Rngs(0)
  )
  maps = inputs_of("grounding", rng)
  module(*maps)


def test_arguments_that_do_not_fit_are_refused(rng):
  with pytest.raises(ValueError, match="grounding_similarity 'cosine' does not exist"):
    FeaturePyramidTransformer((8,), channels=8, grounding_similarity="cosine", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="scope 'near' does not exist"):
    FeaturePyramidTransformer((8,), channels=8, scope="near", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="parts=3"):
    FeaturePyramidTransformer((8,), channels=8, self_parts=3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="wide=True is a baseline without transformers"):
    FeaturePyramidTransformer((8, 8), channels=8, wide=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="norm='none': similarity_norm='levels' and output_norm"):
    FeaturePyramidTransformer((8, 8), channels=8, norm="none", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="gate 'relu' does not exist"):
    FeaturePyramidTransformer((8, 8), channels=8, gate="relu", rngs=nnx.Rngs(0))
  module = FeaturePyramidTransformer((8, 8), channels=8, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="built for 2 levels, got 1"):
    module([jnp.zeros((1, 4, 4, 8))])
  with pytest.raises(ValueError, match="built for 8 channels at level 1, got 4"):
    module([jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 2, 2, 4))])
  with pytest.raises(ValueError, match=r"\(10, 10\) and \(7, 7\) positions are not levels"):
    module([jnp.zeros((1, 10, 10, 8)), jnp.zeros((1, 7, 7, 8))])
