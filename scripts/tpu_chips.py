"""TPU chips: their topologies for the compiler, their published figures, and the least time of a program."""

import dataclasses
import os

from jax.experimental import topologies

from fpt_jax.errors import UserError

GIB = 2**30

# libtpu needs these variables on a machine without a TPU
ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """The figures of one chip.

  Attributes:
    flops: bfloat16 operations per second at the peak; a multiply-add is two of them.
    memory: bytes of HBM that a program may use: the limit in the compiler's message when a program is too
      large. The published size is larger, except that of v5p, which is rounded.
    memory_rate: bytes per second between HBM and the chip.
    network_rate: bytes per second that a chip can send to its neighbours over all its links together: half of
      the published bandwidth per chip where that is bidirectional.
    options: arguments for the compiler in addition to the name of a topology.
  """

  flops: float
  memory: int
  memory_rate: float
  network_rate: float
  options: dict[str, str] = dataclasses.field(default_factory=dict)


# Peak and bandwidths of HBM and of the interconnect per chip, as published, with HBM of 16, 95, 32 and 32 GB:
# cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /v4, read 2026-11-26. The page on v4 has no bandwidth of the
# interconnect: six links of 50 GB/s are in Jouppi et al. 2023, arXiv:2304.01433.
CHIPS = {
  "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 200e9),
  "v5p": Chip(459e12, int(95.74 * GIB), 2765e9, 600e9),
  "v6e": Chip(918e12, int(31.25 * GIB), 1600e9, 400e9),
  # without "megacore", each of the two cores of a chip would be a device
  "v4": Chip(275e12, int(30.75 * GIB), 1200e9, 300e9, {"chip_config_name": "megacore"}),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The least time of a program on a chip: that of the resource which would be busy longest at its peak.

  Attributes:
    compute, memory, network: seconds of arithmetic, of HBM and of the interconnect.
  """

  compute: float
  memory: float
  network: float

  @property
  def seconds(self) -> float:
    """The least time in seconds."""
    return max(self.compute, self.memory, self.network)

  @property
  def bound(self) -> str:
    """Name of the resource that needs it."""
    return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

  @property
  def utilisation(self) -> float:
    """Share of the peak arithmetic rate in the least time: the largest possible MFU."""
    return self.compute / self.seconds


def roofline(chip: Chip, *, flops: float, memory_bytes: float, network_bytes: float) -> Roofline:
  """Returns the least time of a program.

  Args:
    chip: the chip.
    flops: arithmetic operations of a chip.
    memory_bytes: bytes that a chip reads from and writes to its HBM.
    network_bytes: bytes that a chip sends.
  """
  return Roofline(
    flops / chip.flops, memory_bytes / chip.memory_rate, network_bytes / chip.network_rate
  )


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology such as "v5e:2x4".

  Raises:
    UserError: the chip is not known.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not shape:
    raise UserError(
      f"--topology={topology} must be one of {', '.join(CHIPS)} with the numbers of chips along the axes, "
      "such as v5e:2x4 or v5p:2x2x2"
    )
  return CHIPS[name]


def devices_of(topology: str) -> list:
  """Returns the devices of a topology, one per chip.

  Raises:
    UserError: libtpu is not installed or does not know the topology.
  """
  options = chip_of(topology).options
  os.environ |= ENVIRONMENT
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except (RuntimeError, ValueError, KeyError) as error:
    raise UserError(
      f"--topology={topology}: {error}; is libtpu installed (requirements-test.txt)?"
    ) from error
  return list(described.devices)
