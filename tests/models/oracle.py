"""float64 NumPy for tests of models: convolution by loops, and gradients by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np

from fpt_jax.models.state import arrays_of


def convolve(x_BHWC, kernel, *, stride=1, dilation=1, pads=None, bias=0.0):
  """Convolves position by position; `pads` are the pads before the rows and the columns."""
  k, _, inputs, outputs = kernel.shape
  B, H, W, C = x_BHWC.shape
  top, left = pads or (dilation * (k // 2),) * 2
  sizes = [-(-n // stride) for n in (H, W)]
  y = np.zeros((B, *sizes, outputs))
  depthwise = inputs == 1 and C > 1
  for r, c, i, j in np.ndindex(*sizes, k, k):
    row, column = r * stride - top + i * dilation, c * stride - left + j * dilation
    if 0 <= row < H and 0 <= column < W:
      seen = x_BHWC[:, row, column]
      y[:, r, c] += seen * kernel[i, j, 0] if depthwise else seen @ kernel[i, j]
  return y + bias


def batch_norm(x, arrays, name, epsilon=1e-5):
  part = {key: arrays[f"{name}.norm.{key}"] for key in ("scale", "bias", "mean", "var")}
  return (x - part["mean"]) / np.sqrt(part["var"] + epsilon) * part["scale"] + part["bias"]


def randomised(module, rng) -> dict[str, jax.Array]:
  """Returns random float32 arrays for a module, since many initial values are zero or one."""
  return random_arrays(arrays_of(module), rng)


def random_arrays(shapes, rng) -> dict[str, jax.Array]:
  """Like `randomised`, for arrays or shapes by name."""
  arrays = {}
  for name, value in shapes.items():
    spread = np.sqrt(2 / max(1, np.prod(value.shape[:-1]))) if len(value.shape) > 1 else 0.3
    offset = 1.0 if name.endswith(("scale", "var")) else 0.0
    array = offset + spread * rng.uniform(-1, 1, value.shape)
    arrays[name] = jnp.asarray(array, jnp.float32)
  return arrays


def assert_equals_reference(ours, reference, arrays, x, seen, rng, tolerance=2e-5, step=1e-5):
  """Asserts that values and directional derivatives equal those of a reference.

  Args:
    ours: function (arrays, x) -> output.
    reference: the same in float64 NumPy.
    arrays: float32 arrays by name; derivatives are taken with respect to each of them and x.
    x: float32 input.
    seen: mask of the outputs to compare, broadcast with them.
    rng: generator of the directions.
    tolerance: largest difference of values, relative to the largest value.
    step: step of the finite differences; smaller steps meet fewer kinks of a ReLU or a maximum.
  """
  arrays64 = {n: np.asarray(a, np.float64) for n, a in arrays.items()}
  x64 = x.astype(np.float64)
  y = np.asarray(jax.jit(ours)(arrays, x))
  want = reference(arrays64, x64)
  assert y.shape == want.shape
  assert np.abs(np.where(seen, y - want, 0)).max() <= tolerance * np.abs(want).max()

  weight = np.where(seen, rng.standard_normal(want.shape), 0)
  total = jax.jit(jax.grad(lambda a, x: jnp.sum(ours(a, x) * weight.astype(np.float32)), (0, 1)))
  gradients, gradient_x = total(arrays, x)
  gradients["x"] = gradient_x
  for name, gradient in gradients.items():
    value = x64 if name == "x" else arrays64[name]
    direction = np.sign(np.asarray(gradient)) + 0.1 * rng.standard_normal(value.shape)
    sides = []
    for side in (step, -step):
      moved = value + side * direction
      changed = (arrays64, moved) if name == "x" else (arrays64 | {name: moved}, x64)
      sides.append(np.sum(reference(*changed) * weight))
    slope = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(
      np.sum(np.asarray(gradient, np.float64) * direction),
      slope,
      rtol=1e-3,
      atol=1e-4,
      err_msg=name,
    )
