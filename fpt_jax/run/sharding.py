"""The device mesh, and what is sharded how.

The mesh has three axes:

- "data": the images of a batch.
- "fsdp": the images of a batch too; in addition, the weights and the optimizer's state are stored in shares
  along it and gathered where they are used (ZeRO, stage 3; Rajbhandari et al. 2020).
- "query": the rows of an image, in the backbone, the pyramid and FPT, the queries of ST and GT with them, and
  the regions of an image in the heads.

Every layout computes the same losses, up to rounding. XLA partitions the program; this file states what it
cannot know.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpt_jax.errors import UserError
from fpt_jax.ops.mesh import axis_size, mesh_of

AXES = ("data", "fsdp", "query")
BATCH_AXES = ("data", "fsdp")
MIN_SHARED_SIZE = 4096  # values; smaller arrays are not worth the communication

Tree = Any


def mesh(
  shape: Sequence[int] = (-1, 1, 1),
  *,
  batch_sizes: Sequence[int] = (),
  devices: Sequence | None = None,
) -> Mesh:
  """Returns a mesh of all devices.

  Args:
    shape: number of devices along `AXES`; -1 for those that remain.
    batch_sizes: global batch sizes that the mesh must be able to share evenly.
    devices: devices of the mesh; None for all.

  Raises:
    UserError: the shape does not fit the number of devices, an image would be shared by two hosts, or a
      batch cannot be shared evenly.
  """
  count = jax.device_count() if devices is None else len(devices)
  known = math.prod(n for n in shape if n > 0)
  sizes = tuple(count // known if n < 0 else n for n in shape)
  if math.prod(sizes) != count:
    raise UserError(
      f"config.mesh.shape={tuple(shape)} ({', '.join(AXES)}) does not fit {count} devices: the product "
      f"must be {count}, and -1 stands for the devices that remain"
    )
  if devices is None and jax.local_device_count() % sizes[-1]:
    raise UserError(
      f"config.mesh.shape={tuple(shape)}: the {sizes[-1]} devices that share an image must belong to one "
      f"host, and a host has {jax.local_device_count()} devices"
    )
  groups = sizes[0] * sizes[1]
  for batch_size in batch_sizes:
    if batch_size % groups:
      shared = f"{count} devices" if groups == count else f"{groups} groups of {sizes[2]} devices"
      raise UserError(
        f"a batch size of {batch_size} cannot be shared by {shared}; set config.batch_size and "
        f"config.eval.batch_size to multiples of {groups}, or share images with config.mesh.shape"
      )
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays of which every device has a copy."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are split along their first axis, the images of a batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def laid_out(shapes: Tree, mesh: Mesh) -> Tree:
  """Returns the shapes of the weights or of the optimizer's state with their shardings.

  An array of at least `MIN_SHARED_SIZE` values is split over "fsdp" along its longest axis that can be split
  evenly; the others are replicated. So an optimizer's moments are split like the weights they belong to.

  Args:
    shapes: tree of arrays or their shapes.
    mesh: the mesh.
  """
  shares = mesh.shape["fsdp"]

  def one(x) -> jax.ShapeDtypeStruct:
    axes = [a for a in range(len(x.shape)) if x.shape[a] % shares == 0]
    spec = PartitionSpec()
    if shares > 1 and axes and math.prod(x.shape) >= MIN_SHARED_SIZE:
      longest = max(axes, key=lambda a: x.shape[a])
      spec = PartitionSpec(*(None,) * longest, "fsdp")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(one, shapes)


def on_one_device(shapes: Tree) -> Tree:
  """Returns shapes with a sharding on this host's first device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)


def shardings(shapes: Tree) -> Tree:
  """Returns the shardings of a tree of shapes, see `laid_out`."""
  return jax.tree.map(lambda s: s.sharding, shapes)


def describe(mesh: Mesh, state: Tree, batch_size: int) -> str:
  """Returns a sentence on what is sharded how, with the bytes per device.

  Args:
    mesh: the mesh.
    state: shapes of the weights and the optimizer's state, see `laid_out`.
    batch_size: images of a global batch.
  """
  leaves = jax.tree.leaves(state)
  total = sum(math.prod(s.shape) * s.dtype.itemsize for s in leaves)
  share = sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in leaves)
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  rows = f", each over {mesh.shape['query']} devices" if mesh.shape["query"] > 1 else ""
  return (
    f"mesh {sizes}: {batch_size // image_groups(mesh)} images per device{rows}; weights and optimizer "
    f"{share / 1e6:.1f} MB per device of {total / 1e6:.1f} MB"
  )


def image_groups(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
  """Returns the number of groups of devices that share the images of a batch; 1 without a mesh of `AXES`."""
  return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _constrained(tree: Tree, axis: str, *spec) -> Tree:
  """States the sharding of arrays inside a compiled function, if an axis has several devices."""

  def one(x):
    if axis_size(x, axis) == 1:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh_of(x), PartitionSpec(*spec)))

  return jax.tree.map(one, tree)


def whole_weights(arrays: Tree) -> Tree:
  """Gathers the shares of weights where they are used; their gradients are summed and split again."""
  return _constrained(arrays, "fsdp")


def rows_over_query(tree: Tree, *, stride: int) -> Tree:
  """Splits arrays [B, H, ...] along the rows of the images.

  Args:
    tree: the arrays.
    stride: stride of the coarsest level that is computed from them.

  Raises:
    UserError: the devices cannot share the rows of this level evenly, or get fewer than two each.
  """

  for x in jax.tree.leaves(tree):
    shares = axis_size(x, "query")
    rows, left = divmod(x.shape[1], shares * stride)
    # with one row on each device, and images on several, XLA (jax 0.10) computes wrong gradients
    if shares > 1 and (left or rows < 2):
      raise UserError(
        f"images of {x.shape[1]} rows cannot be shared by {shares} devices at a stride of {stride}; with "
        f"this config.mesh.shape, heights must be multiples of {shares * stride}, and at least "
        f"{2 * shares * stride} (config.data.buckets, config.data.crop, config.data.canvas_multiple)"
      )
  return _constrained(tree, "query", BATCH_AXES, "query")


def whole_images(tree: Tree) -> Tree:
  """Gathers the rows of arrays [B, H, ...]."""
  return _constrained(tree, "query", BATCH_AXES)


def in_shares(function: Callable[[Tree, Tree], jax.Array], split: Tree, whole: Tree) -> jax.Array:
  """Computes a function of queries or regions, each of which is independent of the others, over "query".

  Without such an axis, this is `function(split, whole)`. XLA would gather the queries where the function
  computes them block by block.

  Args:
    function: function from `split` and `whole` to an array [B, Q, ...].
    split: arrays [B, Q, ...], which are split along Q.
    whole: arrays [B, ...], which every device needs as a whole.

  Returns:
    [B, Q, ...]: the results in the same order.
  """
  first = jax.tree.leaves(split)[0]
  batch, count = first.shape[:2]
  shares = axis_size(first, "query")
  if shares == 1:
    return function(split, whole)
  mesh = mesh_of(first)
  padding = -count % shares

  def padded(x_BQ):
    return jnp.pad(x_BQ, [(0, 0), (0, padding), *[(0, 0)] * (x_BQ.ndim - 2)])

  images = BATCH_AXES if batch % image_groups(mesh) == 0 else None
  result_BQ = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(PartitionSpec(images, "query"), PartitionSpec(images)),
    out_specs=PartitionSpec(images, "query"),
    check_vma=False,
  )(jax.tree.map(padded, split), whole)
  return result_BQ[:, :count]


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this host's part of a global batch on the devices of the mesh."""
  return {
    name: jax.make_array_from_process_local_data(over_batch(mesh), value)
    for name, value in batch.items()
  }


def place(arrays: Tree, mesh: Mesh) -> Tree:
  """Puts weights, equal on every host, on the devices of the mesh, see `laid_out`."""

  def one(x, shape):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, shape.sharding, lambda index: x[index])

  return jax.tree.map(one, arrays, laid_out(arrays, mesh))


def replicate(arrays: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts arrays, equal on every host, on all devices of the mesh."""
  return {
    name: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(value))
    for name, value in arrays.items()
  }


def local_part(array: jax.Array) -> np.ndarray:
  """Returns this host's part of an array that is sharded along its first axis."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
