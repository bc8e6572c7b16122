"""The least time of a program against times by hand."""

import pytest

from fpt_jax.errors import UserError
from scripts.tpu_chips import Chip, chip_of, roofline

# 100 operations, 10 bytes of memory and 2 bytes of network per second
CHIP = Chip(flops=100.0, memory=1000, memory_rate=10.0, network_rate=2.0)


@pytest.mark.parametrize(
  ("flops", "memory_bytes", "network_bytes", "seconds", "bound", "utilisation"),
  [
    (800, 50, 4, 8.0, "compute", 1.0),
    (200, 50, 4, 5.0, "memory", 0.4),
    (200, 50, 16, 8.0, "network", 0.25),
  ],
)
def test_the_slowest_resource_sets_the_time(
  flops, memory_bytes, network_bytes, seconds, bound, utilisation
):
  least = roofline(CHIP, flops=flops, memory_bytes=memory_bytes, network_bytes=network_bytes)
  assert (least.seconds, least.bound, least.utilisation) == (seconds, bound, utilisation)


def test_a_chip_by_hand():
  """394 TFLOP, 1.638 TB and 100 GB on v5e: two seconds of each, and half a second of network."""
  least = roofline(chip_of("v5e:2x4"), flops=394e12, memory_bytes=1.638e12, network_bytes=100e9)
  assert (least.compute, least.memory, least.network) == (2.0, 2.0, 0.5)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "", "2x4"])
def test_unknown_chips_are_reported(topology):
  with pytest.raises(UserError, match="must be one of v5e, v5p, v6e, v4"):
    chip_of(topology)
