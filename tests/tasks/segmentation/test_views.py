"""Windows, mirror images and sizes against NumPy, and on canvases larger than the image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops.mirror import mirror
from fpt_jax.tasks.segmentation import views

WEIGHT_CK = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def logits(image_BHWC, size_B2):
  """Returns logits that depend on the pixel and on the mean of the window or image."""
  area_B = jnp.prod(size_B2, axis=1).astype(jnp.float32)
  mean_BC = image_BHWC.sum(axis=(1, 2)) / area_B[:, None]
  seen_BHWC = image_BHWC + jnp.roll(image_BHWC, 1, axis=1)
  return (seen_BHWC + 3 * mean_BC[:, None, None]) @ WEIGHT_CK


def on_canvas(images, canvas):
  """Returns the images as a batch on one canvas, and their sizes."""
  batch = np.zeros((len(images), *canvas, 3), np.float32)
  for b, image_HWC in enumerate(images):
    batch[b, : image_HWC.shape[0], : image_HWC.shape[1]] = image_HWC
  return batch, np.array([image.shape[:2] for image in images], np.int32)


@functools.partial(jax.jit, static_argnames=("window", "overlap", "multiple"))
def probabilities(image_BHWC, size_B2, **options):
  return views.probabilities(logits, image_BHWC, size_B2, classes=4, **options)


def test_a_window_of_the_images_size_is_the_whole_image(rng):
  image_BHWC, size_B2 = on_canvas([rng.normal(size=(21, 30, 3)) for _ in range(2)], (32, 32))
  whole = probabilities(image_BHWC, size_B2)
  window = probabilities(image_BHWC, size_B2, window=(21, 30), overlap=0.5, multiple=16)
  larger = probabilities(image_BHWC, size_B2, window=(300, 200), overlap=0.5, multiple=16)
  np.testing.assert_array_equal(window, whole)
  np.testing.assert_array_equal(larger, whole)
  assert (np.asarray(whole)[:, 21:] == 0).all() and (np.asarray(whole)[:, :, 30:] == 0).all()


def starts(edge, window, step):
  """Returns the starts of consecutive windows; the last window ends at the edge."""
  places = [0]
  while places[-1] + window < edge:
    places.append(min(places[-1] + step, edge - window))
  return places


@pytest.mark.parametrize(("window", "overlap"), [((8, 10), 1 / 3), ((7, 31), 0.0), ((40, 9), 0.5)])
def test_windows_are_averaged(window, overlap, rng):
  """Two images of different sizes on one canvas, against a loop over the windows of each."""
  images = [rng.normal(size=size) * 0.3 for size in ((21, 31, 3), (9, 26, 3))]
  image_BHWC, size_B2 = on_canvas(images, (23, 33))
  found = np.asarray(probabilities(image_BHWC, size_B2, window=window, overlap=overlap, multiple=4))
  for b, image_HWC in enumerate(images):
    (height, width), (h, w) = image_HWC.shape[:2], window
    step = [int(np.ceil(n * (1 - overlap))) for n in (min(h, 23), min(w, 33))]
    expected, count = np.zeros((height, width, 4)), np.zeros((height, width, 1))
    for y in starts(height, h, step[0]):
      for x in starts(width, w, step[1]):
        part = np.s_[y : y + h, x : x + w]
        expected[part] += numpy_probabilities_on_canvas(image_HWC[part], window)
        count[part] += 1
    np.testing.assert_allclose(found[b, :height, :width], expected / count, atol=1e-5)
    assert (found[b, height:] == 0).all() and (found[b, :, width:] == 0).all()


def numpy_probabilities_on_canvas(image_HWC, window):
  """Computes probabilities on a window's canvas: `logits` roll its last row to before the first one."""
  room = min(-(-min(window[0], 23) // 4) * 4, 23)
  padded = np.zeros((room, *image_HWC.shape[1:]))
  padded[: len(image_HWC)] = image_HWC
  mean = image_HWC.mean(axis=(0, 1))[None, None]
  scores = np.exp(((padded + np.roll(padded, 1, axis=0)) + 3 * mean) @ WEIGHT_CK.astype(float))
  return (scores / scores.sum(-1, keepdims=True))[: len(image_HWC)]


def test_mirror_images_stay_at_the_left(rng):
  images = [rng.normal(size=size) for size in ((5, 7, 3), (4, 3, 3))]
  image_BHWC, size_B2 = on_canvas(images, (6, 8))
  expected, _ = on_canvas([image[:, ::-1] for image in images], (6, 8))
  mirrored = mirror(jnp.asarray(image_BHWC), jnp.asarray(size_B2))
  np.testing.assert_array_equal(mirrored, expected)
  np.testing.assert_array_equal(mirror(mirrored, jnp.asarray(size_B2)), image_BHWC)
