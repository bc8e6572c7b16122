"""A model as a flat dictionary of named arrays: what is trained, sharded, saved and imported.

Names are paths, "backbone.stages.0.1.conv2.kernel". A jitted function takes the dictionary; the
structure (`Skeleton`) is static and holds no numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from flax import nnx

Arrays = dict[str, jax.Array]


def within(name: str, beginning: str) -> bool:
  """Whether a dotted name is `beginning` or begins with it."""
  return name == beginning or name.startswith(f"{beginning}.")


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without its numbers."""

  graphdef: nnx.GraphDef
  variables: dict[str, tuple[tuple, nnx.Variable]]  # name -> path and variable of an abstract value

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      name: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
      for name, (_, variable) in self.variables.items()
    }

  def parameters(self) -> set[str]:
    """Names of what gradients may change; the rest are batch statistics and frozen numbers."""
    return {name for name, (_, v) in self.variables.items() if isinstance(v, nnx.Param)}

  def fill(self, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """The model with these numbers."""
    state = nnx.from_flat_state(
      [(path, v.replace(arrays[name])) for name, (path, v) in self.variables.items()]
    )
    return nnx.merge(self.graphdef, state, copy=True)


def skeleton(build: Callable[[], nnx.Module]) -> Skeleton:
  """The structure of what `build` returns, without computing a single weight."""
  graphdef, state = nnx.split(nnx.eval_shape(build))
  flat = nnx.to_flat_state(state)
  return Skeleton(graphdef, {".".join(map(str, path)): (path, v) for path, v in flat})


def arrays_of(model: nnx.Module) -> Arrays:
  """The model's numbers by name."""
  flat = nnx.to_flat_state(nnx.state(model))
  return {".".join(map(str, path)): variable[...] for path, variable in flat}


def initial_arrays(build: Callable[[], nnx.Module]) -> Arrays:
  """Initial weights, computed in one compiled program."""
  return jax.jit(lambda: arrays_of(build()))()
