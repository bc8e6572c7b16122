"""Counts of operations against counts by hand, from shapes only."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fpt_jax.errors import UserError
from fpt_jax.models.backbones.resnet import ResNet
from fpt_jax.models.costs import Cost, count
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import FeaturePyramidTransformer
from fpt_jax.models.layers import conv
from fpt_jax.models.state import skeleton
from fpt_jax.ops.local_attention import local_mos_attention
from fpt_jax.ops.mos_attention import mos_attention
from fpt_jax.ops.roi_align import roi_align
from fpt_jax.ops.target import is_written_out


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


class Linear(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(5, 7, use_bias=False, rngs=rngs)


LINEAR = skeleton(lambda: Linear(nnx.Rngs(0)))


def count_of(run, *inputs) -> dict[str, Cost]:
  """Returns the cost of a function of arrays, apart from the 35 parameters of `inner`."""
  costs = count(lambda arrays, *inputs: run(*inputs), LINEAR, *inputs)
  assert costs.pop("inner") == Cost(parameters=35)
  return costs


SIZES = ((8, 12), (4, 6), (2, 3))
CHANNELS, ST_PARTS, GT_PARTS = 8, 2, 4
POSITIONS = [height * width for height, width in SIZES]


@pytest.fixture(scope="module", params=[None, 5])
def transformed(request):
  """The window, and the cost of an FPT with it."""
  C = CHANNELS
  structure = skeleton(
    lambda: FeaturePyramidTransformer((C,) * 3, channels=C, window=request.param, rngs=nnx.Rngs(0))
  )
  maps = [shape(1, *size, C) for size in SIZES]
  return request.param, count(lambda arrays, *maps: structure.fill(arrays)(maps), structure, *maps)


@pytest.mark.parametrize("level", range(3))
def test_fpt_by_hand(transformed, level):
  window, costs = transformed
  C, n = CHANNELS, POSITIONS[level]
  finer, coarser = POSITIONS[:level], POSITIONS[level + 1 :]

  attention = costs[f"self_transformers.{level}"]
  assert attention.parameters == 3 * (C * C + C) + C * ST_PARTS
  assert attention.multiply_adds == 3 * n * C * C + C * ST_PARTS
  assert attention.attention == 2 * n * n * C + n * n * ST_PARTS
  assert attention.activation_bytes == 4 * (4 * n * C + ST_PARTS)  # q, k, v, the result, pi

  if coarser:
    grounding = costs[f"grounding_transformers.{level}"]
    assert grounding.parameters == len(coarser) * (3 * (C * C + C) + C * GT_PARTS)
    assert grounding.multiply_adds == sum((n + 2 * k) * C * C + C * GT_PARTS for k in coarser)
    margin = 0 if window is None else window - 1
    normed = [(h + margin) * (w + margin) for h, w in SIZES[level + 1 :]]
    keys = coarser if window is None else [window**2] * len(coarser)
    assert grounding.attention == sum(
      2 * n * k * C + n * k * GT_PARTS + m * C for k, m in zip(keys, normed, strict=True)
    )
  else:
    assert f"grounding_transformers.{level}" not in costs

  if finer:
    rendering = costs[f"rendering_transformers.{level}"]
    assert rendering.parameters == len(finer) * 3 * (9 * C * C + C)
    assert rendering.multiply_adds == len(finer) * 3 * 9 * n * C * C
    assert rendering.attention == 0

  inputs = 2 + len(finer) + len(coarser)
  fuse = costs[f"fuse.{level}"]
  assert fuse == Cost(9 * inputs * C * C, 9 * inputs * n * C * C, 0, 4 * n * C)


def test_resnet50_has_the_published_cost():
  """4.09 G multiply-adds at 224 x 224 and 25.6 M parameters (torchvision's documentation)."""
  structure = skeleton(lambda: ResNet("resnet50", norm="sync_bn", classes=1000, rngs=nnx.Rngs(0)))

  def classify(arrays, image_BHWC):
    return structure.fill(arrays).classify(image_BHWC)

  whole = sum(count(classify, structure, shape(1, 224, 224, 3)).values(), Cost())
  assert whole.parameters == 25_557_032
  assert whole.multiply_adds == 4_089_184_256
  assert whole.attention == 0


@pytest.mark.parametrize("implementation", ["auto", "naive", "chunked"])
def test_attention_counts_the_same_with_every_implementation(implementation):
  q_BQMD, k_BKMD, v_BKC, pi_BM = (
    shape(1, 900, 2, 4), shape(1, 700, 2, 4), shape(1, 700, 6), shape(1, 2),
  )  # fmt: skip
  attend = functools.partial(mos_attention, implementation=implementation)
  costs = count_of(attend, q_BQMD, k_BKMD, v_BKC, pi_BM)
  assert costs == {
    "elsewhere": Cost(attention=900 * 700 * (8 + 2 + 6), activation_bytes=4 * 900 * 6)
  }
  assert not is_written_out()


def test_local_attention_counts_the_window():
  q, k, v, pi = shape(1, 6, 9, 1, 4), shape(1, 6, 9, 1, 4), shape(1, 6, 9, 8), shape(1, 1)
  costs = count_of(functools.partial(local_mos_attention, window=3), q, k, v, pi)
  assert costs["elsewhere"].attention == 54 * 9 * (4 + 1 + 8)


def test_a_convolution_with_fewer_products_counts_as_its_formula():
  convolution = conv(128, 128, 3, bias=False, rngs=nnx.Rngs(0))
  (cost,) = count_of(lambda x_BHWC: convolution(x_BHWC), shape(1, 32, 40, 128)).values()
  assert cost == Cost(multiply_adds=9 * 32 * 40 * 128**2, activation_bytes=4 * 32 * 40 * 128)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolutions(dtype):
  def run(x_BHWC):
    conv = functools.partial(
      jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    strided = conv(x_BHWC, jnp.ones((3, 3, 4, 6), dtype), (2, 2), ((1, 1), (1, 1)))
    depthwise = conv(x_BHWC, jnp.ones((3, 1, 1, 4), dtype), (1, 1), "SAME", feature_group_count=4)
    transposed = conv(
      x_BHWC, jnp.ones((2, 2, 4, 5), dtype), (1, 1), ((1, 1), (1, 1)), lhs_dilation=(2, 2)
    )
    return strided, depthwise, transposed

  (cost,) = count_of(run, shape(2, 7, 5, 4, dtype=dtype)).values()
  outputs = (2 * 4 * 3 * 6, 2 * 7 * 5 * 4, 2 * 14 * 10 * 5)
  assert cost.multiply_adds == outputs[0] * 9 * 4 + outputs[1] * 3 + outputs[2] * 4
  assert cost.activation_bytes == sum(outputs) * jnp.dtype(dtype).itemsize


def test_scopes_and_loops():
  weight = shape(5, 7)

  def run(x_NI, weight_IO):
    def one(x_I):
      with jax.named_scope("inner"):
        return jnp.einsum("i,io->o", x_I, weight_IO)

    def body(carry, x_I):
      return carry, jax.jit(one)(x_I)

    return jax.vmap(one)(x_NI), jax.lax.scan(body, 0.0, x_NI)

  costs = count(lambda arrays, *inputs: run(*inputs), LINEAR, shape(11, 5), weight)
  assert costs == {"inner": Cost(35, 2 * 11 * 35, 0, 2 * 11 * 7 * 4)}


def test_what_is_not_counted():
  def run(features_HWC, boxes_R4):
    return roi_align(
      features_HWC, boxes_R4, 7, spatial_scale=1.0, sampling_ratio=2, aligned=True
    ) + jnp.sum(features_HWC)

  costs = count_of(run, shape(9, 9, 4), shape(3, 4))
  assert costs == {"roi_align": Cost(activation_bytes=4 * 3 * 7 * 7 * 4)}


def test_the_most_expensive_branch_counts():
  def run(x_NN):
    return jax.lax.cond(jnp.sum(x_NN) > 0, lambda y: y @ y @ y, lambda y: y @ y, x_NN)

  assert count_of(run, shape(4, 4)) == {"elsewhere": Cost(0, 2 * 64, 0, 2 * 64)}


def test_products_in_loops_of_unknown_length_are_refused():
  def run(x_NN):
    return jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ y, x_NN)

  with pytest.raises(UserError, match="elsewhere: products inside a while cannot be counted"):
    count_of(run, shape(4, 4))


def test_masked_and_unmasked_levels_cost_the_same():
  """Padded positions are counted, since they are computed."""
  structure = skeleton(
    lambda: FeaturePyramidTransformer((4, 4), channels=4, scope="adjacent", rngs=nnx.Rngs(0))
  )

  def masked(arrays, *maps):
    levels = [
      FeatureMap(m, jnp.arange(m.shape[2])[None, None] < jnp.ones(m.shape[:3], int), 2**i)
      for i, m in enumerate(maps)
    ]
    return structure.fill(arrays)(levels)

  maps = shape(1, 5, 7, 4), shape(1, 3, 4, 4)
  plain = count(lambda arrays, *maps: structure.fill(arrays)(maps), structure, *maps)
  assert count(masked, structure, *maps) == plain
