"""RoIAlign against torchvision, a loop in float64, and cases by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import roi_align as ops
from tests.conftest import GOLDEN

IMPLEMENTATIONS = ("gather", "einsum")
ROI_ALIGN = jax.jit(
  ops.roi_align,
  static_argnames=("output_size", "spatial_scale", "sampling_ratio", "aligned", "implementation"),
)
STRIDES = (4, 8, 16)


def _sample(features, y, x):
  """Bilinear interpolation at a point; zero more than a pixel outside."""
  height, width = features.shape[:2]
  if not (-1 <= y <= height and -1 <= x <= width):
    return np.zeros(features.shape[2])
  y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
  y0, x0 = int(y), int(x)
  y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
  top = features[y0, x0] * (x0 + 1 - x) + features[y0, x1] * (x - x0)
  bottom = features[y1, x0] * (x0 + 1 - x) + features[y1, x1] * (x - x0)
  return top * (y0 + 1 - y) + bottom * (y - y0)


def _loop(features, box, output_size, scale, ratio):
  """One region, aligned=False, sample by sample in float64."""
  x0, y0, x1, y1 = box.astype(np.float64) * scale
  height, width = max(y1 - y0, 1) / output_size[0], max(x1 - x0, 1) / output_size[1]
  rows, columns = ratio or int(np.ceil(height)), ratio or int(np.ceil(width))
  out = np.zeros((*output_size, features.shape[2]))
  for p, q in np.ndindex(*output_size):
    for i, j in np.ndindex(rows, columns):
      y = y0 + (p + (i + 0.5) / rows) * height
      x = x0 + (q + (j + 0.5) / columns) * width
      out[p, q] += _sample(features.astype(np.float64), y, x) / (rows * columns)
  return out


def _assert_close(actual, expected, tolerance=1e-5):
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
  ("sampling_ratio", "implementation"), [(2, "gather"), (2, "einsum"), (0, "auto")]
)
def test_values_and_gradients_equal_torchvision(sampling_ratio, implementation):
  golden = np.load(GOLDEN / "roi_align.npz")

  @functools.partial(jax.jit, static_argnums=1)
  def value_and_gradient(features_HWC, aligned):
    def pool(features_HWC):
      return ops.roi_align(
        features_HWC,
        golden["boxes_xyxy"],
        7,
        spatial_scale=0.25,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        implementation=implementation,
      )

    out, transpose = jax.vjp(pool, features_HWC)
    return out, transpose(2 * out)[0]

  for aligned in (False, True):
    out, gradient = value_and_gradient(golden["features_HWC"], aligned)
    name = f"HWC_aligned{int(aligned)}_sampling{sampling_ratio}"
    _assert_close(out, golden["out_R" + name])
    _assert_close(gradient, golden["grad_sumsq_" + name])


def test_by_hand():
  # On the ramp f(y, x) = 10 y + x bilinear samples are exact: a bin's mean is f at its centre.
  features = jnp.asarray(10.0 * np.arange(6)[:, None] + np.arange(8)[None])[..., None]
  box = jnp.array([[2.0, 2, 10, 6]])
  pool = functools.partial(
    ROI_ALIGN, features.astype(jnp.float32), box, (1, 2), spatial_scale=0.5, sampling_ratio=2
  )
  # In cells: x 1..5, y 1..3; centres x 2, 4 and y 2; aligned moves both by half a cell.
  np.testing.assert_allclose(pool(aligned=False)[0, 0, :, 0], [22, 24], rtol=1e-6)
  np.testing.assert_allclose(pool(aligned=True)[0, 0, :, 0], [16.5, 18.5], rtol=1e-6)


@pytest.mark.parametrize(
  ("sampling_ratio", "implementation"), [(3, "gather"), (3, "einsum"), (0, "einsum")]
)
def test_boxes_of_any_size_and_place_equal_the_loop(rng, sampling_ratio, implementation):
  features = rng.normal(size=(9, 5, 3)).astype(np.float32)
  boxes = np.array(
    [
      [0, 0, 0, 0],
      [3, 4, 3.2, 4.1],
      [-900, -700, 1100, 1300],  # most samples of a bin lie outside
      [-30, 2, -12, 20],  # completely outside
      [-4.5, -4, 22, 36.5],  # samples in the border's last pixel
      [10, 8, 2, 1],  # negative size
    ],
    np.float32,
  )
  out = ROI_ALIGN(
    jnp.asarray(features),
    jnp.asarray(boxes),
    (2, 3),
    spatial_scale=0.25,
    sampling_ratio=sampling_ratio,
    aligned=False,
    implementation=implementation,
  )
  for region, box in zip(out, boxes, strict=True):
    expected = _loop(features, box, (2, 3), 0.25, sampling_ratio)
    np.testing.assert_allclose(region, expected, atol=1e-5)


def test_levels_by_hand():
  sides = np.array([0, 10, 111.9, 112, 223, 224, 447, 448, 5000], np.float32)
  boxes = jnp.asarray(np.stack([0 * sides, 0 * sides, sides, sides], axis=1))
  levels = ops.assign_levels(boxes, (4, 8, 16, 32))
  np.testing.assert_array_equal(levels, [0, 0, 0, 1, 1, 2, 2, 3, 3])
  np.testing.assert_array_equal(ops.assign_levels(boxes, (8, 16)), [0, 0, 0, 0, 0, 1, 1, 1, 1])
  np.testing.assert_array_equal(
    ops.assign_levels(boxes / 4, (4, 8, 16, 32), canonical_size=56.0), levels
  )


def _pyramid(rng, dtype=np.float32):
  return tuple(
    jnp.asarray(rng.normal(size=(2, *size, 5)), dtype) for size in ((23, 30), (12, 15), (6, 8))
  )


def _regions(rng):
  corner = rng.uniform(-10, 90, (2, 11, 2))
  side = np.exp(rng.uniform(2, 6.5, (2, 11, 1)) + rng.uniform(-0.7, 0.7, corner.shape))
  boxes = np.concatenate([corner, corner + side], axis=-1)
  valid = rng.random((2, 11)) < 0.7
  assert len(np.unique(ops.assign_levels(jnp.asarray(boxes[0]), STRIDES))) == 3
  return jnp.asarray(boxes, jnp.float32), jnp.asarray(valid)


@functools.partial(jax.jit, static_argnums=3)
def _value_and_gradient(pyramid, boxes, valid, implementation):
  def pool(pyramid):
    one_image = functools.partial(
      ops.multilevel_roi_align,
      strides=STRIDES,
      output_size=(2, 3),
      sampling_ratio=2,
      implementation=implementation,
    )
    return jax.vmap(lambda p, b, v: one_image(p, boxes_R4=b, valid_R=v))(pyramid, boxes, valid)

  out, transpose = jax.vjp(pool, pyramid)
  return out, transpose(2 * out)[0]


def test_pyramid_pools_each_region_from_its_level(rng, monkeypatch):
  # Fewer regions per chunk than there are, to test both full and partial chunks.
  monkeypatch.setattr(ops, "_EINSUM_REGIONS", (4, 4))
  pyramid, (boxes, valid) = _pyramid(rng), _regions(rng)
  # A new function, because jit's cache may hold a trace with other constants.
  gather, einsum = (
    jax.jit(lambda *args, name=name: _value_and_gradient.__wrapped__(*args, name))(
      pyramid, boxes, valid
    )
    for name in IMPLEMENTATIONS
  )

  for i in np.ndindex(2, 11):
    level = int(ops.assign_levels(boxes[i][None], STRIDES)[0])
    features = np.asarray(pyramid[level][i[0]])
    expected = _loop(features, np.asarray(boxes[i]), (2, 3), 1 / STRIDES[level], 2)
    np.testing.assert_allclose(gather[0][i], expected * valid[i], atol=1e-5)
  np.testing.assert_allclose(gather[0], einsum[0], atol=1e-5)
  for gather_level, einsum_level in zip(gather[1], einsum[1], strict=True):
    np.testing.assert_allclose(gather_level, einsum_level, atol=1e-4)


def test_gradient_is_the_adjoint(rng):
  pyramid, (boxes, valid) = _pyramid(rng), _regions(rng)
  for implementation in IMPLEMENTATIONS:
    out, gradient = _value_and_gradient(pyramid, boxes, valid, implementation)
    # Pooling is linear, so <pool(f), 2 pool(f)> = <f, gradient>.
    inner = sum(jnp.vdot(f, g) for f, g in zip(pyramid, gradient, strict=True))
    np.testing.assert_allclose(inner, 2 * jnp.vdot(out, out), rtol=1e-5)


def test_bfloat16_features_keep_their_dtype(rng):
  pyramid = _pyramid(rng, jnp.bfloat16)
  exact = tuple(level.astype(jnp.float32) for level in pyramid)
  boxes, valid = _regions(rng)
  expected, _ = _value_and_gradient(exact, boxes, valid, "gather")
  for implementation in IMPLEMENTATIONS:
    out, gradient = _value_and_gradient(pyramid, boxes, valid, implementation)
    assert {out.dtype, *(level.dtype for level in gradient)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_boxes_get_no_gradient(rng):
  features = jnp.asarray(rng.normal(size=(6, 6, 2)), jnp.float32)
  options = dict(spatial_scale=1.0, sampling_ratio=2, aligned=True)
  gradient_of = jax.jit(
    jax.grad(lambda boxes: jnp.sum(ops.roi_align(features, boxes, 2, **options)))
  )
  gradient = gradient_of(jnp.array([[1.0, 1, 4, 5]]))
  np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_wrong_arguments_are_quoted():
  features, boxes, valid = jnp.zeros((8, 8, 2)), jnp.zeros((3, 4)), jnp.ones(3, bool)
  options = dict(spatial_scale=1.0, sampling_ratio=2, aligned=False)
  with pytest.raises(ValueError, match=r"\(1, 8, 8, 2\)"):
    ops.roi_align(features[None], boxes, 7, **options)
  with pytest.raises(ValueError, match=r"\(3, 5\)"):
    ops.roi_align(features, jnp.zeros((3, 5)), 7, **options)
  with pytest.raises(ValueError, match="'loop'"):
    ops.roi_align(features, boxes, 7, **options, implementation="loop")
  with pytest.raises(ValueError, match=r"\(4, 16\)"):
    ops.multilevel_roi_align((features,) * 2, (4, 16), boxes, valid, 7, sampling_ratio=2)
  with pytest.raises(ValueError, match="agree in channels"):
    ops.multilevel_roi_align(
      (features, features[..., :1]), (4, 8), boxes, valid, 7, sampling_ratio=2
    )
