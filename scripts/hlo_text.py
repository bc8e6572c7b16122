"""The HLO text of a compiled program: its instructions, and how often each runs.

The text is `jax.stages.Compiled.as_text()`. That of a program for TPUs is scheduled, and the shapes of values
on the chip have their memory space, such as `S(1)`; the others are in HBM.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "c64": 64, "c128": 128, "bf16": 16}  # other names contain the number of bits


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: its name in its computation.
    opcode: such as "fusion".
    type: text of the type of its result, an array or a tuple of them.
    operands: names of its operands.
    literal: text between its parentheses where it has no operands: the value of a constant, or the number
      of a parameter.
    attributes: the rest of the line.
    is_root: whether its result is that of its computation.
  """

  name: str
  opcode: str
  type: str
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  def called(self, attribute: str) -> str:
    """Name of the computation in an attribute such as `body`; "" if there is none."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  def branches(self) -> list[str]:
    """Names of the computations of a conditional."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
      return re.findall(r"[\w.\-]+", listed[1])
    return [self.called("true_computation"), self.called("false_computation")]

  @property
  def source(self) -> str:
    """Name of the operation in the traced program, such as "jit(train_step)/fpt/reduce_sum"."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


Computation = dict[str, Instruction]


class Program:
  """The computations of a program.

  Attributes:
    computations: the computations by name.
    entry: name of the computation that the program begins with.

  Raises:
    ValueError: the text is not that of a program.
  """

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    current: Computation = {}
    for line in text.splitlines():
      head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if head:
        current = self.computations[head[2]] = {}
        self.entry = head[2] if head[1] else self.entry
      elif instruction := parse(line):
        current[instruction.name] = instruction
    if not self.entry:
      raise ValueError("the text has no ENTRY computation")

  def runs(self, name: str = "", times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields computation, instruction and how often it runs, for every instruction that is scheduled.

    All branches of a conditional are yielded, and the body of a loop of unknown length once. What is inside
    fusions is not yielded.
    """
    computation = self.computations[name or self.entry]
    for instruction in computation.values():
      yield computation, instruction, times
      match instruction.opcode:
        case "while":
          length = self.loop_length(computation, instruction)
          yield from self.runs(
            instruction.called("body"), times * (1 if length is None else length)
          )
        case "conditional":
          for branch in instruction.branches():
            yield from self.runs(branch, times)
        case "call":
          yield from self.runs(instruction.called("to_apply"), times)
        case "async-start":
          yield from self.runs(instruction.called("calls"), times)

  def loop_length(self, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop runs; None if that is not a constant.

    The counter is compared with a constant, and one is added in every pass, as in the loops of JAX.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    condition = self.computations[loop.called("condition")]
    root = root_of(condition)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return None
    counter, limit = (condition[operand] for operand in root.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    carried = computation.get(loop.operands[0])
    if limit.opcode != "constant" or not index or carried is None or carried.opcode != "tuple":
      return None
    first = computation.get(carried.operands[int(index[1])])
    while first is not None and first.opcode in ("copy", "bitcast"):
      first = computation.get(first.operands[0])
    if first is None or first.opcode != "constant":
      return None
    return int(limit.literal) - int(first.literal)

  def loops_of_unknown_length(self) -> int:
    """Returns the number of loops whose length depends on the data."""
    return sum(
      instruction.opcode == "while" and self.loop_length(computation, instruction) is None
      for computation, instruction, _ in self.runs()
    )


def parse(line: str) -> Instruction | None:
  """Returns the instruction on a line of the text; None if there is none."""
  begin = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not begin:
    return None
  rest = line[begin.end() :]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  type_text, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition("(")
  rest = rest[len(opcode) :]
  end = _closing(rest)
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
  literal = "" if operands else rest[1:end]
  return Instruction(
    begin[2], opcode, type_text, operands, literal, rest[end + 1 :], bool(begin[1])
  )


def _closing(text: str) -> int:
  """Returns the place of the parenthesis that closes the one at the beginning."""
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def root_of(computation: Computation) -> Instruction:
  """Returns the instruction whose result is that of the computation."""
  return next(i for i in computation.values() if i.is_root)


def arrays_of(type_text: str) -> list[str]:
  """Returns the texts of the arrays in a type, such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`."""
  return re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", type_text)


def is_in_hbm(array: str) -> bool:
  """Returns whether an array is in HBM rather than on the chip."""
  return not re.search(r"S\([1-9]", array)


def size_of(array: str) -> int:
  """Returns the bytes of an array's values, without the padding of its tiles."""
  return _bytes(array, _sides(array))


def stored_size_of(array: str) -> int:
  """Returns the bytes of an array in memory; TPUs pad the last axes to tiles, 8 x 128 with `T(8,128)`."""
  layout = array.partition("{")[2]
  tile = re.search(r":.*?T\(([\d,]+)\)", layout)
  if not tile:
    return size_of(array)
  sides = _sides(array)
  # the layout lists the axes from the last to the first in memory
  stored = [sides[int(axis)] for axis in re.findall(r"\d+", layout.partition(":")[0])][::-1]
  of_tile = [int(side) for side in tile[1].split(",")]
  stored = [1] * (len(of_tile) - len(stored)) + stored
  for place in range(1, len(of_tile) + 1):
    stored[-place] = -(-stored[-place] // of_tile[-place]) * of_tile[-place]
  return _bytes(array, stored)


def _sides(array: str) -> list[int]:
  return [int(side) for side in re.findall(r"\d+", array.partition("[")[2].partition("]")[0])]


def _bytes(array: str, sides: list[int]) -> int:
  dtype = array.partition("[")[0]
  digits = re.search(r"\d+", dtype)
  bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
  return math.prod(sides) * bits // 8


def sizes_of(type_text: str) -> list[int]:
  """Returns the bytes of each array of a type, without the padding of tiles."""
  return [size_of(array) for array in arrays_of(type_text)]


def stored_bytes(type_text: str) -> int:
  """Returns the bytes of the arrays of a type in memory."""
  return sum(stored_size_of(array) for array in arrays_of(type_text))


def hbm_bytes(type_text: str) -> int:
  """Returns the bytes in memory of the arrays of a type that are in HBM."""
  return sum(stored_size_of(array) for array in arrays_of(type_text) if is_in_hbm(array))
