"""The mesh of devices that an array lies on while a program is traced."""

import jax


def mesh_of(x: jax.Array) -> jax.sharding.AbstractMesh:
  """Returns the mesh of a traced array; an empty one if it is on one device or already a device's share."""
  mesh = jax.sharding.get_abstract_mesh()
  mesh = jax.typeof(x).sharding.mesh if mesh.empty else mesh
  local = jax.sharding.AxisType.Manual in mesh.axis_types
  return jax.sharding.AbstractMesh((), ()) if local else mesh


def axis_size(x: jax.Array, name: str) -> int:
  """Returns the number of devices along an axis of the array's mesh; 1 if there is no such axis."""
  return mesh_of(x).shape.get(name, 1)
