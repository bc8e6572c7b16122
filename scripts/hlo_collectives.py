"""The communication between the chips of a compiled program, from its HLO text."""

import dataclasses
import math
import re

from scripts.hlo_text import Program, arrays_of, size_of, sizes_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of `KINDS`.
    bytes: bytes of its operands or of its results on a chip, whichever are more: of the whole value.
    group: number of chips that take part in it.
    times: how often it runs.
    type: text of the type of its results.
    source: name of the operation in the traced program.
  """

  kind: str
  bytes: int
  group: int
  times: int
  type: str
  source: str

  @property
  def dtype(self) -> str:
    """Dtype of its largest array, such as "bf16"."""
    return max(arrays_of(self.type), key=size_of).partition("[")[0]

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in one run, by the algorithms that send least, such as rings."""
    if self.kind == "collective-permute":
      return self.bytes
    passes = 2 if self.kind == "all-reduce" else 1
    return passes * self.bytes * (self.group - 1) / self.group


def collectives(program: Program) -> list[Collective]:
  """Returns the collective operations of a program in their order."""
  found = []
  for computation, scheduled, times in program.runs():
    fused = scheduled.opcode == "fusion"
    name = scheduled.called("calls")
    inside = program.computations[name] if fused else computation
    for one in inside.values() if fused else (scheduled,):
      kind = one.opcode.removesuffix("-start")
      if kind not in KINDS or goes_on(one.attributes):
        continue
      if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion of an all-reduce and a slice of its result
      operands = sum(sum(sizes_of(inside[operand].type)) for operand in one.operands)
      results = sum(sizes_of(one.type))
      if one.opcode.endswith("-start"):
        results = max(sizes_of(one.type))  # the type has the operands as well
      size, source = max(operands, results), one.source or scheduled.source
      found.append(Collective(kind, size, group_size(one.attributes), times, one.type, source))
  return found


def goes_on(attributes: str) -> bool:
  """Returns whether a collective began before: those that overlap with other work are in several fusions."""
  return bool(re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', attributes))


def group_size(attributes: str) -> int:
  """Returns how many chips take part in a collective, from the attributes of its instruction."""
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(iota[1])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(listed[1].split(","))
  return 2  # a permutation has pairs
