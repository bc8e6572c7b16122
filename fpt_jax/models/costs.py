"""Parameters, multiply-adds and activation memory, module by module, without running the model.

The model is traced with shapes only, and the equations of the trace are counted:

- multiply-adds: those of convolutions and matrix products. Interpolation (RoIAlign, means over bins,
  upsampling), non-maximum suppression and element-wise operations are not counted, as in papers.
- attention: the products inside `ops.mos_attention` and `ops.local_attention`, counted separately and
  independently of their implementation. For Q queries, K keys (window^2 of them for local attention), C
  channels and M parts, the literal formula (eq. 2 to 5 of the FPT paper) has Q K C for the scores of all
  parts, Q K M to mix them and Q K C for the values; distances add K C for the norms of the keys, where K
  is the whole map. Relative positions (attention-augmented convolutions) count as the products that
  compute them: the positions of a row and a column are channels of the keys.
- parameters: the trainable arrays, including those of frozen backbones; running statistics and frozen
  normalisations, which torch counts as buffers, are not included.
- activations: bytes of the outputs of the counted operations, in the dtype of the computation. For
  attention and interpolation, only the result counts: scores and samples are never all in memory.

Modules are named by the beginnings of their parameters' names.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from fpt_jax.errors import UserError
from fpt_jax.models.state import Skeleton, within
from fpt_jax.ops.target import written_out

ATTENTION = "attention"  # scope of attention, which is counted separately
INTERPOLATIONS = ("roi_align", "bins", "upsample")  # scopes that are not counted
ELSEWHERE = "elsewhere"  # name for equations outside all scopes


@dataclasses.dataclass
class Cost:
  """The cost of a module for the inputs that were traced.

  Attributes:
    parameters: number of trainable parameters.
    multiply_adds: multiply-adds of convolutions and matrix products, without attention.
    attention: multiply-adds of attention.
    activation_bytes: bytes of the outputs of all these operations.
  """

  parameters: int = 0
  multiply_adds: int = 0
  attention: int = 0
  activation_bytes: int = 0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.parameters + other.parameters,
      self.multiply_adds + other.multiply_adds,
      self.attention + other.attention,
      self.activation_bytes + other.activation_bytes,
    )

  def as_dict(self) -> dict[str, int]:
    return dataclasses.asdict(self)


def count(run: Callable, structure: Skeleton, *inputs: jax.ShapeDtypeStruct) -> dict[str, Cost]:
  """Counts the cost of `run(arrays, *inputs)` by module.

  Args:
    run: function of a model's arrays and the inputs.
    structure: structure of the model.
    inputs: shapes and dtypes of the inputs.

  Returns:
    Costs by name of the module, in the order of the computation.

  Raises:
    UserError: there is a product inside a loop whose length depends on the data.
  """
  with written_out():
    jaxpr = jax.make_jaxpr(run)(structure.shapes, *inputs).jaxpr
  beginnings = {
    ".".join(parts[:n])
    for parts in (name.split(".") for name in structure.shapes)
    for n in range(1, len(parts))
  }
  costs: dict[str, Cost] = {}
  _count_equations(jaxpr, (), 1, functools.partial(_module_of, beginnings=beginnings), costs)
  parameters = structure.parameters()
  for name, shape in structure.shapes.items():
    if name in parameters:
      module = _owner(name, costs)
      costs[module] = costs.get(module, Cost()) + Cost(parameters=math.prod(shape.shape))
  return costs


def _owner(parameter: str, modules: Mapping[str, Cost]) -> str:
  """Returns the longest module name that a parameter's name begins with, or the name's first part."""
  owners = [m for m in modules if within(parameter, m)]
  return max(owners, key=len) if owners else parameter.split(".")[0]


def _module_of(scopes: tuple[str, ...], beginnings: set[str]) -> str:
  """Returns the module of an equation: its longest run of scopes that begins a parameter's name."""
  for interpolation in INTERPOLATIONS:
    if interpolation in scopes:
      return interpolation
  name = ""
  for scope in scopes:
    longer = f"{name}.{scope}" if name else scope
    if longer not in beginnings:
      break
    name = longer
  return name or ELSEWHERE


def _scopes(equation) -> tuple[str, ...]:
  # vmap writes its name around the scopes inside it: "vmap(scope)".
  text = re.sub(r"\w+\(|\)", "", str(equation.source_info.name_stack))
  return tuple(filter(None, text.split("/")))


def _count_equations(
  jaxpr: Jaxpr, outside: tuple[str, ...], times: int, module_of: Callable, costs: dict[str, Cost]
) -> None:
  """Adds the costs of a jaxpr to `costs`.

  Args:
    jaxpr: jaxpr to count, including those inside its equations.
    outside: scopes around the jaxpr.
    times: how often the jaxpr is run.
    module_of: function from scopes to the name of the module.
    costs: costs by module, updated in place.
  """
  kept = _left_behind(jaxpr, outside)
  for equation in jaxpr.eqns:
    scopes = outside + _scopes(equation)
    made = Cost()
    if not any(name in scopes for name in INTERPOLATIONS):
      if (products := _multiply_adds(equation)) and ATTENTION in scopes:
        made.attention = times * products
      elif products:
        made.multiply_adds = times * products
        made.activation_bytes = times * sum(_bytes(v) for v in equation.outvars)
      _count_inside(equation, scopes, times, module_of, costs)
    made.activation_bytes += times * sum(_bytes(v) for v in equation.outvars if v in kept)
    if made != Cost():
      module = module_of(scopes)
      costs[module] = costs.get(module, Cost()) + made


def _count_inside(equation, scopes, times, module_of, costs) -> None:
  inner = list(_inner_jaxprs(equation))
  match equation.primitive.name:
    case "scan":
      times *= equation.params["length"]
    case "cond":
      # Blocks without a valid region are skipped; the count is an upper bound.
      branches = []
      for jaxpr in inner:
        _count_equations(jaxpr, scopes, times, module_of, branch := {})
        branches.append(branch)
      most_expensive = max(
        branches, key=lambda branch: sum(c.multiply_adds + c.attention for c in branch.values())
      )
      for module, cost in most_expensive.items():
        costs[module] = costs.get(module, Cost()) + cost
      return
    case "while":
      # The loop of NMS contains nothing to count. A count that depends on the data would be a guess.
      counted: dict[str, Cost] = {}
      for jaxpr in inner:
        _count_equations(jaxpr, scopes, times, module_of, counted)
      if counted:
        raise UserError(
          f"{', '.join(counted)}: products inside a {equation.primitive.name} cannot be counted, "
          "because the number of iterations depends on the data"
        )
      return
  for jaxpr in inner:
    _count_equations(jaxpr, scopes, times, module_of, costs)


def _inner_jaxprs(equation) -> Iterable[Jaxpr]:
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def _left_behind(jaxpr: Jaxpr, outside: tuple[str, ...]) -> set[Var]:
  """Returns the outputs of the attentions and interpolations that begin in this jaxpr."""
  if _hides(outside):
    return set()
  made = {v for e in jaxpr.eqns if _hides(_scopes(e)) for v in e.outvars}
  used = {v for e in jaxpr.eqns if not _hides(_scopes(e)) for v in e.invars if isinstance(v, Var)}
  return made & (used | {v for v in jaxpr.outvars if isinstance(v, Var)})


def _hides(scopes: tuple[str, ...]) -> bool:
  return any(name in scopes for name in (ATTENTION, *INTERPOLATIONS))


def _multiply_adds(equation) -> int:
  """Returns the multiply-adds of a convolution or a matrix product; 0 for anything else."""
  match equation.primitive.name:
    case "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
      # In a transposed convolution, only one input in prod(lhs_dilation) is not an inserted zero.
      zeros = math.prod(equation.params["lhs_dilation"])
      return equation.outvars[0].aval.size * math.prod(kernel) // outputs // zeros
    case "dot_general":
      left = equation.invars[0].aval.shape
      (contracted, _), _ = equation.params["dimension_numbers"]
      return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
  return 0


def _bytes(variable) -> int:
  return variable.aval.size * variable.aval.dtype.itemsize
