"""Which environments tell of several processes, and that such processes find each other."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

from fpt_jax.errors import UserError
from fpt_jax.run import cluster
from tests.runs import ROOT, free_port

NAMES = ("JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "MEGASCALE", "TPU_", "SLURM", "OMPI", "GCE_")
SLURM = {
  "SLURM_JOB_ID": "77",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_NTASKS": "2",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def without_clusters() -> dict[str, str]:
  return {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}


@pytest.fixture
def variables(monkeypatch):
  """Sets variables in an environment that tells of no other process, and has no metadata server."""
  for name in set(os.environ) - set(without_clusters()):
    monkeypatch.delenv(name)
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")

  def set_all(values: dict[str, str]) -> None:
    for name, value in values.items():
      monkeypatch.setenv(name, value)
    if "GCE_METADATA_IP" in values:
      monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)

  return set_all


@pytest.mark.parametrize(
  ("values", "source"),
  [
    ({}, None),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, "TPU_PROCESS_ADDRESSES"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, "MEGASCALE_NUM_SLICES"),
    (SLURM, "Slurm"),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of salloc
    ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # sbatch without srun
    (OPEN_MPI, "Open MPI"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1"),
  ],
)
def test_environments(values, source, variables):
  variables(values)
  found = cluster.find()
  assert (found and found.source) == source


def test_arguments_come_first(variables):
  variables(SLURM)
  found = cluster.find("10.0.0.1:1234", 4, 3)
  expected = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
  # so that JAX does not look at Slurm's variables
  assert found is not None
  assert found.arguments == expected | {"cluster_detection_method": "deactivate"}
  assert cluster.find(num_processes=1) is None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("10.0.0.1:1234", 4, None), "belong together"),
    (("", None, 1), "belong together"),
    (("10.0.0.1", 4, 1), "--coordinator=10.0.0.1 must be HOST:PORT"),
    (("10.0.0.1:1234", 4, 4), "--process_id=4 must be 0 to 3"),
  ],
)
def test_arguments_that_do_not_fit(arguments, message, variables):
  variables({})
  with pytest.raises(UserError, match=message):
    cluster.find(*arguments)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be less than JAX_NUM_PROCESSES=2"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be a number"),
  ],
)
def test_variables_that_do_not_fit(values, message, variables):
  variables({"JAX_COORDINATOR_ADDRESS": "localhost:1"} | values)
  with pytest.raises(UserError, match=message):
    cluster.find()


@contextlib.contextmanager
def metadata_server(status: int, text: str):
  """A server with the part of Google Cloud's metadata that lists the hosts of a slice."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers["Metadata-Flavor"] == "Google"
      assert self.path.endswith("/instance/attributes/worker-network-endpoints")
      self.send_response(status)
      self.end_headers()
      self.wfile.write(text.encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f"127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()


@pytest.mark.parametrize(
  ("status", "text", "source"),
  [
    (200, "unknown:0:10.0.0.1,unknown:1:10.0.0.2", "the metadata of the TPU VM"),
    (200, "10.0.0.1,10.0.0.2", "the metadata of the TPU VM"),
    (200, "unknown:0:10.0.0.1", None),
    (404, "", None),
  ],
)
def test_tpu_vms_ask_the_metadata_server(status, text, source, variables):
  with metadata_server(status, text) as address:
    variables({"GCE_METADATA_IP": address})
    found = cluster.find()
  assert (found and found.source) == source


def test_a_metadata_server_that_fails_is_no_single_host(variables):
  """A host that went on alone would leave the others waiting."""
  with metadata_server(503, "") as address:
    variables({"GCE_METADATA_IP": address})
    with pytest.raises(UserError, match=r"does not say which hosts .*503.*--num_processes=1"):
      cluster.find()
  variables({"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"})
  with pytest.raises(UserError, match="does not say which hosts"):
    cluster.find()
  assert cluster.find(num_processes=1) is None
  variables({"TPU_SKIP_MDS_QUERY": "1"})
  assert cluster.find() is None


def test_outside_of_google_cloud_there_is_no_server(variables):
  variables({"GCE_METADATA_IP": "metadata.invalid"})
  assert cluster.find() is None


def test_open_mpi_5_does_not_say_where_the_first_process_is(variables):
  variables({name: value for name, value in OPEN_MPI.items() if "uri" not in name})
  with pytest.raises(UserError, match=r"only Open MPI 4 says .*--num_processes=1 for processes"):
    cluster.find()


JAX = {"JAX_COORDINATOR_ADDRESS": "localhost:PORT", "JAX_NUM_PROCESSES": "2"}


@pytest.mark.parametrize(
  ("launcher", "rank_names"),
  [
    (SLURM, ("SLURM_PROCID",)),
    (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    (JAX, ("JAX_PROCESS_ID",)),
  ],
)
def test_processes_find_each_other(launcher, rank_names):
  """By the variables of a launcher; none is started."""
  program = (
    "from fpt_jax.run import cluster; cluster.join(cluster.find()); "
    "import jax; print(jax.process_index(), jax.process_count())"
  )
  results = [text.split() for text, _ in run_two(program, launcher, rank_names)]
  assert results == [["0", "2"], ["1", "2"]]


EXCHANGE = """
import jax
from fpt_jax.errors import UserError
from fpt_jax.run import cluster, hosts
cluster.join(cluster.find())
host = jax.process_index()
def refuse():
  raise UserError(f"host {host} refuses")
for value in ("", "x" * 1000 * host, {"host": host, "score": 0.1 + host}):
  assert hosts.gather(value)[host] == value
print(hosts.gather([host, "\u00e9" * host, float("inf")]))
print(hosts.from_first_host(lambda: {"AP": 0.1 + 0.2, "host": host}))
print(hosts.is_true_on_first_host(host == 0), hosts.is_true_on_first_host(host == 1))
print(hosts.on_every_host(lambda: host))
for action in (hosts.on_first_host, hosts.on_every_host):
  try:
    action(refuse if host == 0 else lambda: 1)
  except UserError as error:
    print(error)
"""


def test_hosts_exchange_values_and_errors():
  first, second = (
    [line for line in text.splitlines() if not line.startswith("[Gloo]")]
    for text, _ in run_two(EXCHANGE, JAX, ("JAX_PROCESS_ID",))
  )
  common = [
    "[[0, '', inf], [1, '\u00e9', inf]]",
    "{'AP': 0.30000000000000004, 'host': 0}",
    "True False",
  ]
  assert first == [*common, "0", "host 0 refuses", "host 0 refuses"]
  stopped = [f"{which} host has stopped; see its message" for which in ("the first", "another")]
  assert second == [*common, "1", *stopped]


LOST = """
import os, sys, jax
from fpt_jax.errors import UserError
from fpt_jax.run import cluster, command_line, hosts
def main():
  cluster.join(cluster.find())
  hosts.gather(0)
  if jax.process_index() == int(sys.argv[1]):
    if sys.argv[2] == "killed":
      os.kill(os.getpid(), 9)
    raise UserError("a bad record")
  hosts.gather(1)
try:
  with cluster.noticing_lost_processes():
    main()
except UserError as error:
  command_line.report_and_exit(error)
"""


@pytest.mark.parametrize(("lost", "how", "status"), [(1, "killed", -9), (1, "stops", 2)])
def test_a_process_that_ends_does_not_leave_the_other_waiting(lost, how, status):
  begun = time.monotonic()
  survivor, other = run_two(LOST, JAX, ("JAX_PROCESS_ID",), str(lost), how)
  assert other[1] == status and survivor[1] == 75
  assert "error: another process has ended, see its log; this is process 0 of 2" in survivor[0]
  assert "Traceback" not in survivor[0]
  assert time.monotonic() - begun < 90  # JAX waits 100 s for a heartbeat, and 300 s for an exit
  if how == "stops":
    assert "error: a bad record" in other[0]


def run_two(program, launcher, rank_names, *arguments):
  """Runs a program in two processes; returns standard output and error, and the status, of each."""
  common = without_clusters() | launcher | {"JAX_COORDINATOR_PORT": "PORT", "JAX_PLATFORMS": "cpu"}
  port = str(free_port())
  common = {name: value.replace("PORT", port) for name, value in common.items()}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, *arguments],
      env=common | dict.fromkeys(rank_names, str(i)),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT if arguments else None,
      text=True,
    )
    for i in range(2)
  ]
  texts = [process.communicate(timeout=400)[0] for process in processes]
  return [(text, p.returncode) for text, p in zip(texts, processes, strict=True)]
