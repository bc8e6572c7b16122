"""Which processes train together, and how this one joins and leaves them."""

import contextlib
import dataclasses
import http.client
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import flags

from fpt_jax.errors import RunAgainError, UserError, one_line
from fpt_jax.run import hosts

_METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SECONDS = 5  # that the metadata server of a TPU VM may take
# parts of the errors of Gloo, NCCL and the coordination service in processes that lack another one
_LOSSES = ("Gloo", "remote process exited", "CoordinationServiceError", "BarrierError")
_FLAGS = "--coordinator, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Processes that train together.

  Attributes:
    source: what says so, for messages.
    arguments: those of `jax.distributed.initialize`; JAX finds out what is missing.
  """

  source: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find(
  coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> Cluster | None:
  """Finds out whether this process is one of several.

  In this order: the arguments; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a TPU pod,
  on GKE or made with `gcloud compute tpus tpu-vm create`, unless JAX_PLATFORMS excludes TPUs; `srun` of Slurm
  with several tasks; `mpirun` of Open MPI 4 with several processes.

  Args:
    coordinator: HOST:PORT of the first process.
    num_processes: number of processes; 1 alone for a process on its own, whatever the environment says.
    process_id: index of this process.

  Returns:
    The cluster; None for a process on its own.

  Raises:
    UserError: what is given is incomplete or wrong.
  """
  if (coordinator, num_processes, process_id) == ("", 1, None):
    return None
  if coordinator or (num_processes, process_id) != (None, None):
    return _named_by_arguments(coordinator, num_processes, process_id)
  if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
    return _named_by_variables(address)
  if _wants_tpu() and (source := _tpu_pod()):
    return Cluster(source)
  # SLURM_NTASKS does not do: `sbatch` and `salloc` set it for their shell too, which is one process
  if "SLURM_STEP_NODELIST" in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
    return Cluster("Slurm", {"cluster_detection_method": "slurm"})
  if _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
    if "OMPI_MCA_orte_hnp_uri" not in os.environ:
      raise UserError(
        "OMPI_COMM_WORLD_SIZE is above 1, but only Open MPI 4 says where the first process is; "
        f"set {_FLAGS} in every process, or --num_processes=1 for processes on their own"
      )
    return Cluster("Open MPI", {"cluster_detection_method": "ompi"})
  return None


def define_flags() -> Callable[[], Cluster | None]:
  """Defines --coordinator, --num_processes and --process_id; returns `find` with their values."""
  coordinator = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of the first of several processes that work together; also set --num_processes and "
    "--process_id. TPU pods, Slurm and Open MPI need none of them.",
  )
  num_processes = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
  process_id = flags.DEFINE_integer("process_id", None, "Index of this process.", lower_bound=0)
  return lambda: find(coordinator.value, num_processes.value, process_id.value)


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
  except (ValueError, RuntimeError, OSError) as error:
    raise UserError(
      f"cannot join the other processes that {cluster.source} names ({one_line(error, 200)}); set {_FLAGS}, "
      "or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, in every process"
    ) from error


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
  """Context in which an error that another process has caused by ending becomes a RunAgainError."""
  try:
    yield
  except Exception as error:
    if jax.distributed.is_initialized() and _is_loss(error):
      raise RunAgainError(
        f"another process has ended, see its log; this is process {jax.process_index()} of "
        f"{jax.process_count()}; run the same command again in all of them, and it resumes from the newest "
        "checkpoint"
      ) from error
    raise


def _is_loss(error: BaseException) -> bool:
  """Returns whether an error, or one that has led to it, is that of a process which lacks another one."""
  cause: BaseException | None = error
  while cause is not None:
    if any(part in str(cause) for part in _LOSSES):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def all_leave(seconds: float) -> bool:
  """Waits for all processes to end; returns whether they do. True for a process on its own."""
  if not jax.distributed.is_initialized():
    return True
  try:
    hosts.wait_for_all_hosts(seconds, "leaving")
  except (RuntimeError, ValueError):  # some have not come, or the coordination service has ended
    return False
  return True


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
    # which would give each process one GPU under Slurm, and ask the metadata server on a TPU VM
    "cluster_detection_method": "deactivate",
  }
  return Cluster(f"--coordinator={coordinator}", arguments)


def _named_by_variables(address: str) -> Cluster:
  """Under Slurm and Open MPI, the numbers may be left out."""
  numbers: dict[str, Any] = {}
  for argument, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
    if os.environ.get(name):
      numbers[argument] = _number(name, 0)
  if len(numbers) == 2:
    if numbers["process_id"] >= numbers["num_processes"]:
      raise UserError(
        f"JAX_PROCESS_ID={numbers['process_id']} must be less than "
        f"JAX_NUM_PROCESSES={numbers['num_processes']}"
      )
    numbers["cluster_detection_method"] = "deactivate"
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
  """Returns what says that this host belongs to a TPU pod, "" if nothing does."""
  if _number("MEGASCALE_NUM_SLICES", 1) > 1:
    return "MEGASCALE_NUM_SLICES"
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # GKE
    if name in os.environ:
      return name if "," in os.environ[name] else ""
  return "the metadata of the TPU VM" if "," in _hosts_of_tpu_vm() else ""


def _hosts_of_tpu_vm() -> str:
  """Returns the hosts of this TPU VM's slice, separated by commas; "" on machines that are no TPU VM.

  Raises:
    UserError: the metadata server fails. A host that went on alone would leave the others waiting.
  """
  if "TPU_SKIP_MDS_QUERY" in os.environ:  # JAX sets it on machines without TPU chips
    return ""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/{_METADATA}", headers={"Metadata-Flavor": "Google"}
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=_SECONDS) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return ""
    problem = one_line(error, 200)
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, "reason", None)
    if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
      return ""  # no such server outside of Google Cloud
    problem = one_line(error, 200)
  raise UserError(
    f"the TPU VM's metadata server {server} does not say which hosts belong together ({problem}); set "
    f"--num_processes=1 for a single host, or {_FLAGS}"
  )
