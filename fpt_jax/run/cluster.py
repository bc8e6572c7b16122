"""Which processes train together, and how this one joins them."""

import dataclasses
import math
import os
import pathlib
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping

import jax

from fpt_jax.errors import UserError, one_line

# Google's PCI vendor, by which a machine with TPU chips is recognised, as JAX does.
_PCI_DEVICES = "/sys/bus/pci/devices"
_GOOGLE = "0x1ae0"
_METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SECONDS = 5  # that the metadata server of a TPU VM may take


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Processes that train together.

  Attributes:
    source: what says so, for messages.
    arguments: those of `jax.distributed.initialize`; JAX finds out what is missing.
  """

  source: str
  arguments: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


def find(
  coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> Cluster | None:
  """Finds out whether this process is one of several.

  In this order: the arguments; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a TPU pod,
  on GKE or made with `gcloud compute tpus tpu-vm create`, unless JAX_PLATFORMS excludes TPUs; `srun` of Slurm
  with several tasks; `mpirun` of Open MPI with several processes.

  Args:
    coordinator: HOST:PORT of the first process.
    num_processes: number of processes.
    process_id: index of this process.

  Returns:
    The cluster; None for a process on its own.

  Raises:
    UserError: what is given is incomplete or wrong.
  """
  if coordinator or (num_processes, process_id) != (None, None):
    return _named_by_arguments(coordinator, num_processes, process_id)
  if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
    return _named_by_variables(address)
  if _wants_tpu() and (source := _tpu_pod()):
    return Cluster(source)
  # `sbatch` without `srun` sets the number of tasks, but starts one process
  if "SLURM_STEP_NODELIST" in os.environ and _number("SLURM_NTASKS", 1) > 1:
    return Cluster("Slurm", {"cluster_detection_method": "slurm"})
  if "OMPI_MCA_orte_hnp_uri" in os.environ and _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
    return Cluster("Open MPI", {"cluster_detection_method": "ompi"})
  return None


def join(cluster: Cluster | None) -> None:
  """Joins the other processes; None and a second call do nothing.

  Raises:
    UserError: the others cannot be reached.
  """
  if cluster is None or jax.distributed.is_initialized():
    return
  # the collectives of several CPU processes; other devices have their own
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**cluster.arguments)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"cannot join the other processes that {cluster.source} names ({one_line(error, 200)}); set "
      "--coordinator, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
      "JAX_PROCESS_ID, in every process"
    ) from error


def _named_by_arguments(coordinator, num_processes, process_id) -> Cluster:
  if not coordinator or num_processes is None or process_id is None:
    raise UserError("--coordinator=HOST:PORT, --num_processes and --process_id belong together")
  _, _, port = coordinator.rpartition(":")
  if not port.isdecimal() or port == coordinator:
    raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:1234")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} must be 0 to {num_processes - 1}, --num_processes - 1"
    )
  arguments = {
    "coordinator_address": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  return Cluster(f"--coordinator={coordinator}", arguments)


def _named_by_variables(address: str) -> Cluster:
  """Under Slurm and Open MPI, the numbers may be left out."""
  numbers = {}
  for argument, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
    if os.environ.get(name):
      numbers[argument] = _number(name, 0)
  if numbers.get("process_id", 0) >= numbers.get("num_processes", math.inf):
    raise UserError(
      f"JAX_PROCESS_ID={numbers['process_id']} must be less than "
      f"JAX_NUM_PROCESSES={numbers['num_processes']}"
    )
  return Cluster(f"JAX_COORDINATOR_ADDRESS={address}", numbers)


def _number(name: str, default: int) -> int:
  text = os.environ.get(name, "")
  if text and not text.isdecimal():
    raise UserError(f"{name}={text} must be a number")
  return int(text or default)


def _wants_tpu() -> bool:
  """Returns whether JAX_PLATFORMS admits TPUs."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  return not platforms or "tpu" in platforms.split(",")


def _tpu_pod() -> str:
  """What says that this host belongs to a TPU pod; "" if nothing does."""
  if _number("MEGASCALE_NUM_SLICES", 1) > 1:
    return "MEGASCALE_NUM_SLICES"
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # GKE
    if name in os.environ:
      return name if "," in os.environ[name] else ""
  if _has_tpu_chips() and "," in _hosts_of_tpu_vm():
    return "the metadata of the TPU VM"
  return ""


def _has_tpu_chips() -> bool:
  vendors = pathlib.Path(_PCI_DEVICES).glob("*/vendor")
  return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _hosts_of_tpu_vm() -> str:
  """The hosts of the slice that this TPU VM belongs to, separated by commas; "" if it is not on GCE.

  Raises:
    UserError: the metadata server fails. A host that went on alone would leave the others waiting.
  """
  if "TPU_SKIP_MDS_QUERY" in os.environ:
    return ""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/{_METADATA}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return ""
    problem = one_line(error, 200)
  except OSError as error:
    if isinstance(getattr(error, "reason", None), socket.gaierror):
      return ""  # no such server outside of Google Cloud
    problem = one_line(error, 200)
  raise UserError(
    f"the TPU VM's metadata server {server} does not say which hosts belong together ({problem}); set "
    "TPU_SKIP_MDS_QUERY=1 for a single host, or --coordinator, --num_processes and --process_id"
  )
