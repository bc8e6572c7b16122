"""Boxes against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_area_and_iou_by_hand():
  a_N4 = jnp.array([[0.0, 0, 4, 2], [0, 0, 0, 0]])
  b_M4 = jnp.array([[2.0, 0, 6, 2], [0, 0, 4, 2], [4, 0, 8, 2], [0, 0, 0, 0]])
  np.testing.assert_array_equal(boxes.area(a_N4), [8, 0])
  # Half of each overlaps: 4 / (8 + 8 - 4). Touching and padded boxes do not overlap.
  np.testing.assert_allclose(boxes.iou(a_N4, b_M4), [[1 / 3, 1, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_clip_takes_traced_sizes():
  boxes_14 = jnp.array([[-3.0, -1, 12, 30]])
  clipped = jax.jit(boxes.clip)(boxes_14, 20, 10)
  np.testing.assert_array_equal(clipped, [[0, 0, 10, 20]])


def test_encode_by_hand():
  # A 4 x 2 reference centred on (2, 1); the box is 8 x 2 centred on (6, 2).
  deltas = boxes.encode(jnp.array([[2.0, 1, 10, 3]]), jnp.array([[0.0, 0, 4, 2]]), WEIGHTS)
  np.testing.assert_allclose(deltas, [[10 * 4 / 4, 10 * 1 / 2, 5 * np.log(2), 0]], rtol=1e-6)


def test_decode_undoes_encode_for_every_class(rng):
  corner = rng.uniform(0, 50, (2, 7, 3, 2))
  boxes_NK4 = jnp.asarray(np.concatenate([corner, corner + rng.uniform(1, 40, corner.shape)], -1))
  boxes_NK4, reference_N14 = boxes_NK4[0], boxes_NK4[1, :, :1]
  decoded = boxes.decode(boxes.encode(boxes_NK4, reference_N14, WEIGHTS), reference_N14, WEIGHTS)
  np.testing.assert_allclose(decoded, boxes_NK4, atol=1e-4)


def test_decode_clips_the_scale():
  decoded = boxes.decode(jnp.array([[0.0, 0, 99, 99]]), jnp.array([[0.0, 0, 16, 32]]), (1,) * 4)
  np.testing.assert_allclose(decoded, [[8 - 500, 16 - 1000, 8 + 500, 16 + 1000]], rtol=1e-5)


def test_padding_is_finite_in_values_and_gradients():
  padding_N4, box_N4 = jnp.zeros((2, 4)), jnp.array([[0.0, 0, 4, 2], [0, 0, 0, 0]])

  def everything(a_N4, b_N4):
    deltas_N4 = boxes.encode(a_N4, b_N4, WEIGHTS)
    total = jnp.sum(boxes.iou(a_N4, b_N4)) + jnp.sum(deltas_N4)
    return total + jnp.sum(boxes.decode(deltas_N4, b_N4, WEIGHTS))

  value_and_gradients = jax.jit(jax.value_and_grad(everything, argnums=(0, 1)))
  for pair in ((padding_N4, box_N4), (box_N4, padding_N4)):
    value, gradients = value_and_gradients(*pair)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
  np.testing.assert_array_equal(boxes.encode(padding_N4, box_N4, WEIGHTS), np.zeros((2, 4)))


@pytest.mark.parametrize("bad", [jnp.zeros((3, 5)), jnp.zeros(4), jnp.zeros((3, 4), int)])
def test_wrong_arrays_are_quoted(bad):
  with pytest.raises(ValueError, match=rf"{bad.shape[-1]}|{bad.dtype}"):
    boxes.iou(bad, jnp.zeros((1, 4)))
