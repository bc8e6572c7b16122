"""Mirror images of padded batches."""

import jax.numpy as jnp
import numpy as np

from fpt_jax.ops.mirror import mirror


def test_each_image_is_mirrored_within_its_own_width(rng):
  sizes = np.array([[4, 6], [3, 4], [4, 1]], np.int32)
  x_BHWC = rng.standard_normal((3, 4, 6, 2)).astype(np.float32)
  found = np.asarray(mirror(jnp.asarray(x_BHWC), jnp.asarray(sizes)))
  for image, before, (_, width) in zip(found, x_BHWC, sizes, strict=True):
    np.testing.assert_array_equal(image[:, :width], before[:, width - 1 :: -1][:, :width])
    # padding stays at the right, mirrored too
    np.testing.assert_array_equal(image[:, width:], before[:, width:][:, ::-1])
  np.testing.assert_array_equal(mirror(jnp.asarray(found), jnp.asarray(sizes)), x_BHWC)
