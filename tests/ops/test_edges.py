"""Borders of classes against SciPy's distances, and losses on them against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fpt_jax.ops import edges

CLASSES = 4
BORDERS = jax.jit(edges.class_borders, static_argnums=(1, 2))


def label_maps(rng, shape):
  """Areas of each class with unlabelled pixels, as 255 and -1, in between."""
  coarse = rng.integers(0, CLASSES, (shape[0], 3, 4))
  rows, columns = (np.arange(n) * m // n for n, m in zip(shape[1:], (3, 4), strict=True))
  labels = coarse[:, rows][:, :, columns].astype(np.int32)
  labels[:, 2:4, 3:9] = 255
  labels[:, -1, ::3] = -1
  return labels


@pytest.mark.parametrize("radius", [1.0, 2.0, 3.5])
def test_borders_are_near_another_class(radius, rng):
  labels = label_maps(rng, (2, 11, 14))
  found = BORDERS(labels, CLASSES, radius)
  want = np.zeros(labels.shape, bool)
  for i, label in enumerate(labels):
    for k in range(CLASSES):
      # distances of the pixels of other classes from this one, and the other way round
      inside, outside = label == k, (label != k) & (label >= 0) & (label < CLASSES)
      for these, others in ((inside, outside), (outside, inside)):
        if others.any():
          want[i] |= these & (ndimage.distance_transform_edt(~others) <= radius)
  np.testing.assert_array_equal(found, want)
  assert want.any() and not want.all()


def test_without_another_class_there_is_no_border():
  labels = np.full((1, 5, 6), 3)
  labels[:, 2] = 255
  assert not BORDERS(labels, CLASSES, 2.0).any()


def balanced(logits, is_edge, labelled):
  share = (is_edge & labelled).sum() / labelled.sum()
  p = 1 / (1 + np.exp(-logits))
  loss = np.where(is_edge, -(1 - share) * np.log(p), -share * np.log(1 - p))
  return loss[labelled].mean()


def test_balanced_cross_entropy(rng):
  logits = rng.standard_normal((2, 5, 6))
  is_edge, labelled = rng.random((2, 2, 5, 6)) < np.array([0.2, 0.8]).reshape(2, 1, 1, 1)
  given = (jnp.asarray(is_edge), jnp.asarray(labelled))
  run = jax.jit(jax.value_and_grad(edges.balanced_cross_entropy))
  loss, gradient = run(jnp.asarray(logits, jnp.float32), *given)
  np.testing.assert_allclose(loss, balanced(logits, is_edge, labelled), rtol=1e-6)
  direction, step = rng.standard_normal(logits.shape), 1e-6
  sides = [balanced(logits + s * direction, is_edge, labelled) for s in (step, -step)]
  np.testing.assert_allclose(
    np.sum(gradient * direction), (sides[0] - sides[1]) / (2 * step), rtol=1e-4
  )
  assert not np.any(np.asarray(gradient)[~labelled])
  for nothing in ((given[0], given[0] & False), (given[0] & False, given[1]), (given[1], given[1])):
    assert run(jnp.asarray(logits, jnp.float32), *nothing)[0] == 0


def magnitude(x_HWK):
  """By the 3x3 filters that smoothing and difference are together, with zeros outside."""
  smooth, slope = np.array([1, 2, 1]) / 4, np.array([-1, 0, 1]) / 2
  total = 0
  for axis in (0, 1):
    along = np.convolve(smooth, slope)
    kernel = np.outer(along, smooth) if axis == 0 else np.outer(smooth, along)
    filtered = [
      ndimage.correlate(x_HWK[..., k], kernel, mode="constant") for k in range(x_HWK.shape[-1])
    ]
    total = total + np.stack(filtered, axis=-1) ** 2
  return np.sqrt(total / 2)


def test_magnitude_of_the_gradient(rng):
  x = rng.standard_normal((1, 6, 7, 2))
  found = jax.jit(edges.gradient_magnitude)(jnp.asarray(x, jnp.float32))[0]
  # a correlation smooths what lies outside, too: compare without the outermost rows and columns
  np.testing.assert_allclose(found[1:-1, 1:-1], magnitude(x[0])[1:-1, 1:-1], atol=1e-6)
  flat = jnp.ones((1, 6, 7, 2))
  run = jax.jit(jax.grad(lambda x: jnp.sum(edges.gradient_magnitude(x)[:, 2:-2, 2:-2])))
  assert not np.any(run(flat))


def compared(logits, labels, noise, temperature):
  total, count = 0.0, 0
  for logit, label, g in zip(logits, labels, noise, strict=True):
    e = np.exp((logit + g) / temperature)
    found = magnitude(e / e.sum(axis=-1, keepdims=True))
    truth = magnitude((label[..., None] == np.arange(CLASSES)).astype(float))
    labelled = (label >= 0) & (label < CLASSES)
    h, w = label.shape
    for r in range(2, h - 2):
      for c in range(2, w - 2):
        if labelled[r - 2 : r + 3, c - 2 : c + 3].all():
          seen = (found[r, c] > 1e-8) | (truth[r, c] > 1e-8)
          total += np.abs(found[r, c] - truth[r, c])[seen].sum()
          count += seen.sum()
  return total / count


def test_gradient_loss(rng):
  labels = label_maps(rng, (2, 14, 15))
  logits, noise = rng.standard_normal((2, *labels.shape, CLASSES))
  logits[..., 3] -= 100  # this class has no gradient in the prediction

  def ours(logits):
    return edges.gradient_loss(logits, labels, jnp.asarray(noise, jnp.float32), temperature=0.5)

  loss, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(loss, compared(logits, labels, noise, 0.5), rtol=1e-5)
  direction, step = rng.standard_normal(logits.shape), 1e-6
  sides = [compared(logits + s * direction, labels, noise, 0.5) for s in (step, -step)]
  slope = (sides[0] - sides[1]) / (2 * step)
  np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3)
  assert jax.eval_shape(ours, logits.astype(jnp.bfloat16)).dtype == jnp.float32


def test_unlabelled_pixels_are_in_no_loss(rng):
  """On a larger canvas with other values, borders and losses are those of the image alone."""
  labels = label_maps(rng, (1, 12, 13))
  logits, noise = rng.standard_normal((2, *labels.shape, CLASSES)).astype(np.float32)
  more = [(0, 0), (0, 3), (0, 5)]

  @jax.jit
  def losses(logits, labels, noise):
    labelled = (labels >= 0) & (labels < CLASSES)
    border = edges.class_borders(labels, CLASSES, 2.0)
    return (
      jnp.sum(border),
      edges.balanced_cross_entropy(logits[..., 0], border, labelled),
      edges.gradient_loss(logits, labels, noise, temperature=0.5),
    )

  alone = losses(logits, labels, noise)
  padded = losses(
    np.pad(logits, [*more, (0, 0)], constant_values=7),
    np.pad(labels, more, constant_values=255),
    np.pad(noise, [*more, (0, 0)], mode="reflect"),
  )
  np.testing.assert_allclose(padded, alone, rtol=1e-6)
  changed = np.where(((labels >= 0) & (labels < CLASSES))[..., None], logits, -3)
  np.testing.assert_allclose(losses(changed, labels, noise), alone, rtol=1e-6)
  assert all(value == 0 for value in losses(logits, labels * 0 + 255, noise))
