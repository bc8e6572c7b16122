"""RoIAlign: a fixed grid of averaged bilinear samples from every region of a feature map.

The samples of a bin form a grid, and a bilinear weight is a row weight times a column weight, so the mean
over a bin factorises: out[r, p, q] = sum_hw Y[r, p, h] X[r, q, w] features[h, w]. The "einsum"
implementation builds Y and X and multiplies (TPU: no gathers); "gather" reads only the rows and columns
with nonzero weight (CPU).

Shape suffixes: H W rows and columns of a map, C channels, R regions, P Q bins, S samples of a bin
along one axis, T taps (pixels with weight) along one axis, 4 coordinates.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpt_jax.ops import boxes as box_ops
from fpt_jax.ops.conditions import compute_if

Implementation = Literal["auto", "gather", "einsum"]

# FPN (Lin et al., eq. 1): a region with a side of 224 pixels is pooled from the level of stride 2**4.
CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4.0

# Regions that "einsum" processes at once, at least and at most; an eighth of all between. It bounds the
# memory of intermediate results. Each block reads the whole pyramid: many regions have large blocks.
_EINSUM_REGIONS = (16, 64)


@jax.named_scope("roi_align")
def roi_align(
  features_HWC: jax.Array,
  boxes_R4: jax.Array,
  output_size: int | tuple[int, int],
  *,
  spatial_scale: float,
  sampling_ratio: int,
  aligned: bool,
  implementation: Implementation = "auto",
) -> jax.Array:
  """Pools each box of one feature map into a grid of bins.

  A sample more than one pixel outside the map counts as zero; a nearer one has the value of the border.
  Differentiable with respect to the features only.

  Args:
    features_HWC: [H, W, C] float.
    boxes_R4: [R, 4] float, pixels of the image.
    output_size: bins (rows, columns), or one number for both.
    spatial_scale: cells of the map per pixel of the image.
    sampling_ratio: samples per bin along each axis; 0 or less for the number of cells per bin, rounded up.
    aligned: True if a pixel's centre lies at +0.5. False as in torchvision's detectors: it lies at +0, and
      a box is at least one cell wide and high.
    implementation: "gather" (CPU) or "einsum" (TPU); "auto" chooses by platform. With an adaptive number
      of samples, any number of cells may have weight, so "einsum" is always used.

  Returns:
    [R, P, Q, C] in the features' dtype.

  Raises:
    ValueError: a shape, a dtype or an option is not as described.

  Source: He et al., Mask R-CNN, section 3; sample positions as in torchvision.
  """
  _check(features_HWC, boxes_R4)
  boxes_R4 = jax.lax.stop_gradient(jnp.asarray(boxes_R4, jnp.float32))
  level_R = jnp.zeros(len(boxes_R4), jnp.int32)
  spec = _spec(
    (features_HWC,), (spatial_scale,), output_size, sampling_ratio, aligned, implementation
  )
  return _pool((features_HWC,), boxes_R4, level_R, spec)


@jax.named_scope("roi_align")
def multilevel_roi_align(
  pyramid: tuple[jax.Array, ...],
  strides: tuple[int, ...],
  boxes_R4: jax.Array,
  valid_R: jax.Array,
  output_size: int | tuple[int, int],
  *,
  sampling_ratio: int,
  aligned: bool = False,
  canonical_size: float = CANONICAL_SIZE,
  implementation: Implementation = "auto",
) -> jax.Array:
  """Pools each box from the level of a pyramid that fits its size.

  Args:
    pyramid: [H, W, C] maps, fine to coarse, with the same channels and dtype.
    strides: pixels per cell of each level, powers of two, each twice the one before.
    boxes_R4: [R, 4] float, pixels of the image.
    valid_R: [R] bool; invalid regions give zeros and no gradient.
    output_size: as for `roi_align`.
    sampling_ratio: as for `roi_align`.
    aligned: as for `roi_align`.
    canonical_size: as for `assign_levels`.
    implementation: as for `roi_align`.

  Returns:
    [R, P, Q, C] in the features' dtype.

  Raises:
    ValueError: a shape, a dtype or an option is not as described.

  Source: Lin et al., Feature Pyramid Networks, eq. 1.
  """
  if not pyramid or len(pyramid) != len(strides):
    raise ValueError(f"expected one stride for each of {len(pyramid)} levels, got {strides}")
  for features_HWC in pyramid:
    _check(features_HWC, boxes_R4)
  if len({(f.shape[-1], f.dtype) for f in pyramid}) > 1:
    raise ValueError(
      "levels must agree in channels and dtype, got "
      + ", ".join(f"{f.dtype} {f.shape}" for f in pyramid)
    )
  if valid_R.shape != boxes_R4.shape[:1] or valid_R.dtype != jnp.bool_:
    raise ValueError(f"valid_R must be bool [{len(boxes_R4)}], got {valid_R.dtype} {valid_R.shape}")
  boxes_R4 = jax.lax.stop_gradient(jnp.asarray(boxes_R4, jnp.float32))
  boxes_R4 = jnp.where(valid_R[:, None], boxes_R4, 0)
  level_R = jnp.where(valid_R, assign_levels(boxes_R4, strides, canonical_size), -1)
  scales = tuple(1 / stride for stride in strides)
  spec = _spec(pyramid, scales, output_size, sampling_ratio, aligned, implementation)
  return _pool(tuple(pyramid), boxes_R4, level_R, spec)


def assign_levels(
  boxes_R4: jax.Array, strides: tuple[int, ...], canonical_size: float = CANONICAL_SIZE
) -> jax.Array:
  """Chooses the level that each box is pooled from.

  Args:
    boxes_R4: [R, 4] float, pixels of the image.
    strides: pixels per cell of each level, powers of two, each twice the one before.
    canonical_size: side of the smallest square that is pooled from the level of stride 16, pixels.

  Returns:
    [R] int32 indices in [0, len(strides)): floor(4 + log2(sqrt(area) / canonical_size)), clipped.

  Raises:
    ValueError: the strides are not consecutive powers of two.

  Source: Lin et al., Feature Pyramid Networks, eq. 1; 1e-6 is added as in torchvision.
  """
  finest = round(math.log2(strides[0]))
  if list(strides) != [2 ** (finest + i) for i in range(len(strides))]:
    raise ValueError(f"strides must be consecutive powers of two, got {strides}")
  size_R = jnp.sqrt(jnp.maximum(box_ops.area(jnp.asarray(boxes_R4, jnp.float32)), 0))
  level_R = jnp.floor(_CANONICAL_LEVEL + jnp.log2(size_R / canonical_size) + 1e-6)
  return jnp.clip(level_R, finest, finest + len(strides) - 1).astype(jnp.int32) - finest


class _Spec(NamedTuple):
  """The static part of a call."""

  shapes: tuple[tuple[int, int, int], ...]
  dtype: jnp.dtype
  scales: tuple[float, ...]
  output_size: tuple[int, int]
  sampling_ratio: int
  aligned: bool
  implementation: Implementation


def _spec(pyramid, scales, output_size, sampling_ratio, aligned, implementation):
  if isinstance(output_size, int):
    output_size = (output_size, output_size)
  if len(output_size) != 2 or min(output_size) < 1:
    raise ValueError(f"output_size must be positive, one or two numbers, got {output_size}")
  if implementation not in ("auto", "gather", "einsum"):
    raise ValueError(f"implementation must be auto, gather or einsum, got {implementation!r}")
  if sampling_ratio <= 0:
    implementation = "einsum"
  return _Spec(
    shapes=tuple(features.shape for features in pyramid),
    dtype=pyramid[0].dtype,
    scales=tuple(map(float, scales)),
    output_size=tuple(output_size),
    sampling_ratio=max(sampling_ratio, 0),
    aligned=aligned,
    implementation=implementation,
  )


def _check(features_HWC, boxes_R4):
  if features_HWC.ndim != 3 or not jnp.issubdtype(features_HWC.dtype, jnp.floating):
    raise ValueError(
      f"features_HWC must be floating [H, W, C], got {features_HWC.dtype} {features_HWC.shape}"
    )
  if boxes_R4.ndim != 2 or boxes_R4.shape[1] != 4:
    raise ValueError(f"boxes_R4 must be [R, 4], got {boxes_R4.shape}")


# Pooling is linear in the features, so the backward pass needs only the boxes: the weights are computed
# again instead of saved, and nothing as large as the forward pass stays in memory.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pool(pyramid, boxes_R4, level_R, spec):
  pools = {
    "gather": _one_image_at_a_time(lambda *args: _gather(spec, *args)),
    "einsum": lambda *args: _einsum(spec, *args),
  }
  return _dispatch(pools, spec, pyramid, boxes_R4, level_R)


def _pool_forward(pyramid, boxes_R4, level_R, spec):
  return _pool(pyramid, boxes_R4, level_R, spec), (boxes_R4, level_R)


def _pool_backward(spec, residuals, gradient_RPQC):
  boxes_R4, level_R = residuals
  transposes = {
    "gather": _one_image_at_a_time(lambda *args: _gather_transpose(spec, *args)),
    "einsum": lambda *args: _einsum_transpose(spec, *args),
  }
  return _dispatch(transposes, spec, gradient_RPQC, boxes_R4, level_R), None, None


_pool.defvjp(_pool_forward, _pool_backward)


def _one_image_at_a_time(function):
  """A function whose last argument is level_R; gathers with a batch axis are several times slower on CPUs.

  For a batch, it is inside a condition, so that what it allocates is allocated when the boxes are known.
  """
  sequential = jax.custom_batching.sequential_vmap(function)
  batchable = jax.custom_batching.custom_vmap(function)

  @batchable.def_vmap
  def of_batch(axis_size, are_batched, *args):
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, are_batched)

    def images():
      return jax.vmap(sequential, axes, axis_size=axis_size)(*args)

    result = compute_if(jnp.any(args[-1] >= 0), images)
    return result, jax.tree.map(lambda _: True, result)

  return batchable


def _dispatch(functions, spec, *args):
  if spec.implementation == "auto":
    return jax.lax.platform_dependent(*args, cpu=functions["gather"], default=functions["einsum"])
  return functions[spec.implementation](*args)


def _einsum(spec, pyramid, boxes_R4, level_R):
  # float32 features have float32 weights on TPU too; bfloat16 features are multiplied as bfloat16.
  precision = "highest" if spec.dtype == jnp.float32 else None
  einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=spec.dtype)

  def one_region(box_4, level):
    pooled_PQC = jnp.zeros((*spec.output_size, spec.shapes[0][-1]), spec.dtype)
    for i, features_HWC in enumerate(pyramid):
      rows_PH = _matrix(box_4, 0, features_HWC.shape[0], spec.scales[i], spec)
      columns_QW = _matrix(box_4, 1, features_HWC.shape[1], spec.scales[i], spec)
      rows_PH = jnp.where(level == i, rows_PH, 0).astype(spec.dtype)
      half_PWC = einsum("PH,HWC->PWC", rows_PH, features_HWC)
      pooled_PQC += einsum("QW,PWC->PQC", columns_QW.astype(spec.dtype), half_PWC)
    return pooled_PQC

  least, most = _EINSUM_REGIONS
  block = min(max(len(boxes_R4) // 8, least), most)
  return jax.lax.map(lambda region: one_region(*region), (boxes_R4, level_R), batch_size=block)


def _einsum_transpose(spec, gradient_RPQC, boxes_R4, level_R):
  pyramid = tuple(jax.ShapeDtypeStruct(shape, spec.dtype) for shape in spec.shapes)
  transpose = jax.linear_transpose(
    lambda pyramid: _einsum(spec, pyramid, boxes_R4, level_R), pyramid
  )
  return transpose(gradient_RPQC)[0]


def _gather(spec, pyramid, boxes_R4, level_R):
  channels = spec.shapes[0][-1]

  def zeros(*_):
    return jnp.zeros((*spec.output_size, channels), spec.dtype)

  def of_level(features_HWC, index_PXQY, rows_PX, columns_QY):
    flat_NC = features_HWC.reshape(-1, channels)
    half_PQYC = sum(
      rows_PX[:, x, None, None, None] * flat_NC[index_PXQY[:, x]].astype(jnp.float32)
      for x in range(rows_PX.shape[1])
    )
    pooled_PQC = jnp.sum(columns_QY[None, ..., None] * half_PQYC, axis=2)
    return pooled_PQC.astype(spec.dtype)

  # To join the levels would take longer than to pool a few regions.
  branches = [zeros, *(functools.partial(of_level, x_HWC) for x_HWC in pyramid)]

  def one_region(region):
    box_4, level = region
    row_PX, column_QY, *weights = _taps(box_4, level, spec)
    index_PXQY = row_PX[:, :, None, None] + column_QY[None, None]
    return jax.lax.switch(level + 1, branches, index_PXQY, *weights)

  return jax.lax.map(one_region, (boxes_R4, level_R))


def _gather_transpose(spec, gradient_RPQC, boxes_R4, level_R):
  channels = spec.shapes[0][-1]
  sizes = [height * width for height, width, _ in spec.shapes]

  def add_region(flat_NC, region):
    gradient_PQC, box_4, level = region
    row_PX, column_QY, rows_PX, columns_QY = _taps(box_4, level, spec)
    first = jnp.asarray(np.cumsum([0, *sizes[:-1]]))[level]
    index_PXQY = first + row_PX[:, :, None, None] + column_QY[None, None]
    weight_PXQY = rows_PX[:, :, None, None] * columns_QY[None, None]
    cells_PXQYC = weight_PXQY[..., None] * gradient_PQC[:, None, :, None].astype(jnp.float32)
    return flat_NC.at[index_PXQY].add(cells_PXQYC), None

  flat_NC = jnp.zeros((sum(sizes), channels), jnp.float32)
  flat_NC, _ = jax.lax.scan(add_region, flat_NC, (gradient_RPQC, boxes_R4, level_R))
  levels_NC = jnp.split(flat_NC, np.cumsum(sizes)[:-1])
  return tuple(
    level_NC.reshape(shape).astype(spec.dtype)
    for level_NC, shape in zip(levels_NC, spec.shapes, strict=True)
  )


def _bins(box_4, axis, scale, spec):
  """Returns the first edges and the size of a region's bins along one axis (0: rows), in cells."""
  offset = 0.5 if spec.aligned else 0.0
  start = box_4[1 - axis] * scale - offset
  extent = box_4[3 - axis] * scale - offset - start
  if not spec.aligned:
    extent = jnp.maximum(extent, 1.0)
  size = extent / spec.output_size[axis]
  return start + jnp.arange(spec.output_size[axis]) * size, size


def _matrix(box_4, axis, length, scale, spec):
  """[P, length]: the weight of every cell of one axis in each bin."""
  first_P, size = _bins(box_4, axis, scale, spec)
  cell_H = jnp.arange(length, dtype=jnp.float32)
  if spec.sampling_ratio:
    count = spec.sampling_ratio
    step = size / count
    sample_PHS = jnp.arange(count, dtype=jnp.float32)[None, None]
  else:
    count = jnp.ceil(size)
    step = size / jnp.maximum(count, 1)
    # Samples are at least half a cell apart (or there is only one), so at most five lie within the two
    # cells where a cell has weight; a sixth allows for rounding. So there is no limit on the box size.
    reach_PH = (cell_H - 1)[None] - (first_P + 0.5 * step)[:, None]
    nearest_PH = jnp.maximum(jnp.floor(reach_PH / jnp.maximum(step, 1e-6)), 0)
    sample_PHS = nearest_PH[..., None] + jnp.arange(6, dtype=jnp.float32)[None, None]
  position_PHS = first_P[:, None, None] + (sample_PHS + 0.5) * step
  inside_PHS = (position_PHS >= -1) & (position_PHS <= length) & (sample_PHS < count)
  distance_PHS = jnp.abs(jnp.clip(position_PHS, 0, length - 1) - cell_H[None, :, None])
  weight_PHS = jnp.where(inside_PHS, jnp.maximum(1 - distance_PHS, 0), 0)
  return jnp.sum(weight_PHS, axis=-1) / jnp.maximum(count, 1)


def _taps(box_4, level, spec):
  """Finds the cells with weight in a region: X rows per row of bins, Y columns per column of bins.

  Returns:
    row_PX, the index of the first cell of each row in the flattened level, column_QY, and the weights
    rows_PX and columns_QY.
  """
  height, width = (jnp.asarray([shape[i] for shape in spec.shapes])[level] for i in (0, 1))
  scale = jnp.asarray(spec.scales, jnp.float32)[level]
  row_PX, rows_PX = _axis_taps(box_4, 0, height, scale, spec)
  column_QY, columns_QY = _axis_taps(box_4, 1, width, scale, spec)
  return row_PX * width, column_QY, jnp.where(level >= 0, rows_PX, 0), columns_QY


def _axis_taps(box_4, axis, length, scale, spec):
  first_P, size = _bins(box_4, axis, scale, spec)
  count = spec.sampling_ratio
  position_PS = first_P[:, None] + ((jnp.arange(count) + 0.5) * (size / count))[None]
  inside_PS = (position_PS >= -1) & (position_PS <= length)
  position_PS = jnp.clip(position_PS, 0, length - 1)
  low_PS = jnp.floor(position_PS)
  fraction_PS = position_PS - low_PS
  index_PX = jnp.concatenate([low_PS, jnp.minimum(low_PS + 1, length - 1)], axis=1)
  weight_PX = jnp.concatenate([1 - fraction_PS, fraction_PS], axis=1) / count
  return index_PX.astype(jnp.int32), weight_PX * jnp.tile(inside_PS, 2)
