"""Convolutions against sums written out in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fpt_jax.ops import target
from fpt_jax.ops.convolution import convolve, pointwise
from fpt_jax.ops.depthwise import depthwise

CASES = [  # rows, columns, kernel, stride, dilation, pads
  (9, 7, (3, 3), 1, 1, ((1, 1), (1, 1))),
  (7, 9, (3, 3), 1, 3, ((3, 3), (3, 3))),
  (6, 8, (3, 5), 1, 2, ((0, 1), (5, 2))),
  (5, 6, (1, 4), 1, 1, ((0, 0), (0, 0))),
  (4, 5, (3, 2), 1, 1, ((3, 4), (2, 3))),  # windows of padding only
  (8, 7, (3, 3), 2, 1, ((1, 1), (1, 1))),
  (8, 5, (3, 3), 1, 1, ((2, 0), (0, 1))),
  (3, 4, (3, 3), 1, 1, ((0, 0), (0, 0))),
]


def written_out(x, kernel, dy, stride, dilation, pads):
  """The convolution, and the gradients of its product with `dy`; float64."""
  (top, _), (left, _) = pads
  padded = np.pad(x, ((0, 0), *pads, (0, 0)))
  dx, dkernel, y = np.zeros_like(padded), np.zeros_like(kernel), np.zeros_like(dy)
  for r, c, i, j in np.ndindex(*dy.shape[1:3], *kernel.shape[:2]):
    at = (slice(None), r * stride + i * dilation, c * stride + j * dilation)
    y[:, r, c] += padded[at] @ kernel[i, j]
    dx[at] += dy[:, r, c] @ kernel[i, j].T
    dkernel[i, j] += padded[at].T @ dy[:, r, c]
  return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def convolution(stride, dilation, pads):
  return lambda x, w: convolve(
    x,
    w,
    (stride, stride),
    pads,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.fixture(params=["cpu", "tpu", "winograd", "winograd in strips"])
def platform(request, monkeypatch):
  """The platform that chooses a form; "winograd" makes small maps take that of large ones on CPUs."""
  if "winograd" in request.param:
    monkeypatch.setattr("fpt_jax.ops.convolution._WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr("fpt_jax.ops.convolution._WINOGRAD_POSITIONS", 1)
  if "strips" in request.param:
    monkeypatch.setattr("fpt_jax.ops.winograd._STRIP_BYTES", 5000)
  return "tpu" if request.param == "tpu" else "cpu"


@pytest.mark.parametrize("channels", [(3, 4), (4, 2)])
@pytest.mark.parametrize(("rows", "columns", "kernel", "stride", "dilation", "pads"), CASES)
def test_equals_the_sum_written_out(
  rng, rows, columns, kernel, stride, dilation, pads, channels, platform
):
  x = rng.standard_normal((2, rows, columns, channels[0]))
  w = rng.standard_normal((*kernel, *channels))
  with target.tracing_for(platform):
    y, gradients = jax.vjp(convolution(stride, dilation, pads), jnp.float32(x), jnp.float32(w))
    dy = rng.standard_normal(y.shape)
    found = (y, *gradients(jnp.float32(dy)))
  for value, want in zip(found, written_out(x, w, dy, stride, dilation, pads), strict=True):
    assert value.shape == want.shape
    np.testing.assert_allclose(value, want, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 0.0, np.nan])
def test_gradients_that_wait_are_the_same(rng, monkeypatch, factor):
  """As of a large layer: also where `dy` is zero or not finite."""
  x = jnp.asarray(rng.standard_normal((2, 6, 5, 3)), jnp.float32)
  w = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.float32)
  f = convolution(1, 1, ((1, 1), (1, 1)))
  y, gradients = jax.vjp(f, x, w)
  expected = gradients(factor * y)
  assert " cond[" not in str(jax.make_jaxpr(lambda y: gradients(y))(y))
  monkeypatch.setattr("fpt_jax.ops.convolution._WAITING_BYTES", 0)
  assert " cond[" in str(jax.make_jaxpr(lambda y: gradients(y))(y))
  for value, want in zip(gradients(factor * y), expected, strict=True):
    np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_equals_the_sum_written_out(rng, stride, platform):
  x = rng.standard_normal((2, 7, 6, 3))
  w = rng.standard_normal((1, 1, 3, 4))
  pads = ((0, 0), (0, 0))

  def f(x, w):
    return pointwise(x, w, (stride, stride), pads, precision=None)

  with target.tracing_for(platform):
    y, gradients = jax.vjp(f, jnp.float32(x), jnp.float32(w))
    dy = rng.standard_normal(y.shape)
    found = (y, *gradients(jnp.float32(dy)))
  for value, want in zip(found, written_out(x, w, dy, stride, 1, pads), strict=True):
    np.testing.assert_allclose(value, want, atol=2e-5)


@pytest.mark.parametrize(("convolution", "groups"), [(convolve, 1), (depthwise, 8)])
def test_of_a_layer_in_bfloat16(convolution, groups):
  """As the convolution of a layer; the gradient of its kernel is summed in float32."""
  layer = nnx.Conv(
    8,
    8,
    (3, 3),
    padding=((1, 1), (1, 1)),
    feature_group_count=groups,
    use_bias=False,
    conv_general_dilated=convolution,
    dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  ones = jnp.ones((1, 40, 40, 8), jnp.bfloat16)
  gradient = nnx.grad(lambda layer: layer(ones).astype(jnp.float32).sum())(layer)
  assert layer(ones).dtype == jnp.bfloat16
  assert float(gradient.kernel[1, 1, 0, 0]) == pytest.approx(1600, rel=1e-2)


def test_inside_control_flow_and_vmap(rng, platform):
  x = jnp.asarray(rng.standard_normal((3, 1, 5, 5, 2)), jnp.float32)
  w = jnp.asarray(rng.standard_normal((3, 3, 2, 2)), jnp.float32)
  f = convolution(1, 1, ((1, 1), (1, 1)))

  def gradient(of):
    with target.tracing_for(platform):
      return jax.grad(lambda w: jnp.sum(of(w) ** 2))(w)

  expected = gradient(lambda w: f(x[:, 0], w))
  for of in (
    lambda w: jax.vmap(lambda x: f(x, w))(x),
    lambda w: jax.lax.map(lambda x: jax.lax.cond(x[0, 0, 0, 0] > -9, f, lambda x, _: x, x, w), x),
  ):
    np.testing.assert_allclose(gradient(of), expected, rtol=1e-5, atol=1e-5)


def test_a_large_layer_has_fewer_products():
  """Winograd's form takes 16 products of 2x2 outputs for each pair of channels, and not 36."""
  x = jax.ShapeDtypeStruct((1, 64, 64, 128), jnp.float32)
  w = jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
  with target.tracing_for("cpu"):
    compiled = jax.jit(convolution(1, 1, ((1, 1), (1, 1)))).lower(x, w).compile()
  direct = 2 * 64 * 64 * 9 * 128 * 128
  assert 16 / 36 < compiled.cost_analysis()["flops"] / direct < 0.7
