"""A model as a flat dictionary of named arrays, which are trained, sharded, saved and imported.

Names are paths, such as "backbone.stages.0.1.conv2.kernel". Jitted functions take the dictionary as an
argument; the structure of the model (`Skeleton`) is static and holds no arrays.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from fpt_jax.run.sharding import whole_weights

Arrays = dict[str, jax.Array]


def within(name: str, beginning: str) -> bool:
  """Returns whether a dotted name is `beginning` or lies below it."""
  return name == beginning or name.startswith(f"{beginning}.")


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """The structure of a model, without its arrays.

  Attributes:
    graphdef: graph of the modules.
    variables: for every name, its path and a variable with an abstract value.
  """

  graphdef: nnx.GraphDef
  variables: dict[str, tuple[tuple, nnx.Variable]]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array by name."""
    return {
      name: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
      for name, (_, variable) in self.variables.items()
    }

  def parameters(self) -> set[str]:
    """Returns the names of the trainable arrays; the others are batch statistics and frozen variables."""
    return {name for name, (_, v) in self.variables.items() if isinstance(v, nnx.Param)}

  def statistics(self) -> set[str]:
    """Returns the names of the batch statistics that training updates."""
    return {name for name, (_, v) in self.variables.items() if isinstance(v, nnx.BatchStat)}

  def fill(self, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """Returns the model with these arrays, given by name; weights that are stored in shares are gathered."""
    arrays = whole_weights(arrays)
    state = nnx.from_flat_state(
      [(path, v.replace(arrays[name])) for name, (path, v) in self.variables.items()]
    )
    return nnx.merge(self.graphdef, state, copy=True)


def skeleton(build: Callable[[], nnx.Module]) -> Skeleton:
  """Returns the structure of the model that `build` returns, without computing any weight."""
  graphdef, state = nnx.split(nnx.eval_shape(build))
  flat = nnx.to_flat_state(state)
  return Skeleton(graphdef, {".".join(map(str, path)): (path, v) for path, v in flat})


def arrays_of(model: nnx.Module) -> Arrays:
  """Returns the arrays of a model by name."""
  flat = nnx.to_flat_state(nnx.state(model))
  return {".".join(map(str, path)): variable[...] for path, variable in flat}


def initial_arrays(
  build: Callable[[], nnx.Module],
  shardings: jax.sharding.Sharding | dict[str, jax.sharding.Sharding] | None = None,
) -> Arrays:
  """Returns the arrays of the model that `build` returns, computed in one compiled program.

  Args:
    build: function that returns the model.
    shardings: sharding of every array, or of each one by name; None leaves it to the compiler.
  """
  # hundreds of programs of random numbers, each of which runs once: compiled quickly, with the same values
  options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
  return jax.jit(lambda: arrays_of(build()), out_shardings=shardings, compiler_options=options)()
