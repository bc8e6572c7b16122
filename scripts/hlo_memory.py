"""The traffic between HBM and the chip of a compiled program, from its HLO text.

Every scheduled instruction reads its operands from HBM and writes its results to it once, except those on the
chip, with the padding of their tiles. Where a fusion takes slices of an operand, the slices count; where it
updates a result in place, the update. A kernel (a custom call) may read an operand several times, so its
traffic is a lower bound. `Compiled.cost_analysis()` would count the body of a loop once, and values on the
chip as well.
"""

from scripts.hlo_collectives import KINDS
from scripts.hlo_text import (
  Computation,
  Instruction,
  Program,
  arrays_of,
  hbm_bytes,
  is_in_hbm,
  root_of,
  stored_bytes,
  stored_size_of,
)

# These move nothing themselves.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional",
  "call", "async-start", "async-update", "async-done", "copy-done", "slice-done", "partition-id",
  "replica-id", "opt-barrier", "add-dependency",
} | {f"{kind}-done" for kind in KINDS}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def memory_bytes(program: Program) -> int:
  """Returns the bytes that a chip reads from and writes to its HBM."""
  return sum(
    times * traffic(program, computation, one) for computation, one, times in program.runs()
  )


def traffic(program: Program, computation: Computation, one: Instruction) -> int:
  """Returns the bytes of one run of an instruction."""
  if one.opcode in _FREE or 'custom_call_target="AllocateBuffer"' in one.attributes:
    return 0
  operands = [computation[name] for name in dict.fromkeys(one.operands)]
  match one.opcode:
    case opcode if opcode in _SLICES:
      return hbm_bytes(one.type) + min(stored_bytes(one.type), hbm_bytes(operands[0].type))
    case "dynamic-update-slice":
      return 2 * min(stored_bytes(operands[1].type), hbm_bytes(one.type))
    case "copy-start":
      to, source = arrays_of(one.type)[:2]
      return stored_size_of(to) * (is_in_hbm(to) + is_in_hbm(source))
    case "slice-start":
      source, *_, to, _ = arrays_of(one.type)
      return stored_size_of(to) * (is_in_hbm(to) + is_in_hbm(source))
    case "fusion":
      return _fusion(program.computations[one.called("calls")], computation, one)
  return hbm_bytes(one.type) + sum(hbm_bytes(operand.type) for operand in operands)


def _fusion(body: Computation, computation: Computation, one: Instruction) -> int:
  users: dict[str, list[Instruction]] = {}
  for instruction in body.values():
    for name in dict.fromkeys(instruction.operands):
      users.setdefault(name, []).append(instruction)
  root = root_of(body)
  results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
  parameters = {int(i.literal): i for i in body.values() if i.opcode == "parameter"}
  total = 0
  for place, name in enumerate(one.operands):
    size = hbm_bytes(computation[name].type)
    total += min(size, _read(parameters[place], users)) if size else 0
  arrays = arrays_of(one.type)
  if len(arrays) != len(results):  # a result is itself a tuple
    return total + hbm_bytes(one.type)
  return total + sum(
    _written(result, body)
    for array, result in zip(arrays, results, strict=True)
    if is_in_hbm(array)
  )


def _read(value: Instruction, users: dict[str, list[Instruction]]) -> int:
  """Returns the bytes of a value inside a fusion that its users need."""
  whole = stored_bytes(value.type)
  total = 0
  for user in users.get(value.name, ()):
    first = user.operands[0] == value.name
    if user.opcode == "bitcast":
      total += _read(user, users)
    elif user.opcode in _SLICES and first:
      total += stored_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and first:
      continue  # only the update is written
    elif user.opcode == "tuple" or user.opcode in KINDS:
      continue  # passed on, or a part of a collective that began before
    else:
      return whole
  return min(whole, total)


def _written(value: Instruction, body: Computation) -> int:
  """Returns the bytes of a result that a fusion writes."""
  while value.opcode == "bitcast":
    value = body[value.operands[0]]
  if value.opcode == "dynamic-update-slice":
    return stored_bytes(body[value.operands[1]].type)
  return 0 if value.opcode == "parameter" or value.opcode in KINDS else stored_bytes(value.type)
