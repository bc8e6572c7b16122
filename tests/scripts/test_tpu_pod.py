"""scripts/tpu_pod.sh: the commands that it gives to gcloud, and a pod of two hosts that are local folders."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.runs import ROOT

SCRIPT = ROOT / "scripts" / "tpu_pod.sh"
SETTINGS = ("--name=fpt", "--zone=us-west4-a", "--project=lab")
WHERE = "--zone=us-west4-a --project=lab"
FLAGS = ("--config=configs/coco_mask.py:fpt=st+gt", "--workdir=gs://bucket/run")
LIST = f"gcloud compute tpus tpu-vm list '--format=value(name.basename(),state)' {WHERE}"
VARIABLES = (
  *("NAME", "ZONE", "PROJECT", "TYPE", "VERSION"),
  *("SPOT", "QUEUED", "DATA", "MOUNT", "POLL_SECONDS"),
)


def tpu_pod(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
  clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
  return subprocess.run(
    ["bash", SCRIPT, *arguments],
    env=clean | environment, capture_output=True, text=True, check=False, timeout=120,
  )  # fmt: skip


def dry_run(*arguments: str, **environment: str) -> list[str]:
  """Returns the commands that would run; comments and other lines are left out."""
  done = tpu_pod(*arguments, "--dry_run", **environment)
  assert done.returncode == 0, done.stderr
  return [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (
      ("create", "--type=v5litepod-16"),
      "tpu-vm create fpt --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite",
    ),
    (
      ("create", "--type=v4-32", "--version=mine", "--spot"),
      "tpu-vm create fpt --accelerator-type=v4-32 --version=mine --spot",
    ),
    (
      ("create", "--type=v6e-16", "--spot", "--queued"),
      "queued-resources create fpt --node-id=fpt --accelerator-type=v6e-16 "
      "--runtime-version=v2-alpha-tpuv6e --spot",
    ),
    (
      ("data", "--data=gs://bucket/records"),
      "tpu-vm ssh fpt --worker=all '--command=bash fpt_jax_pod/worker.sh data gs://bucket/records'",
    ),
    (
      ("data", "--data=gs://bucket/records", "--mount"),
      "tpu-vm ssh fpt --worker=all "
      "'--command=bash fpt_jax_pod/worker.sh data gs://bucket/records mount'",
    ),
    (
      ("start", *FLAGS),
      "tpu-vm ssh fpt --worker=all '--command=bash fpt_jax_pod/worker.sh start "
      "--config=configs/coco_mask.py:fpt=st+gt --workdir=gs://bucket/run'",
    ),
    (
      ("tail", "--worker=3"),
      "tpu-vm ssh fpt --worker=3 '--command=bash fpt_jax_pod/worker.sh tail'",
    ),
    (("stop",), "tpu-vm ssh fpt --worker=all '--command=bash fpt_jax_pod/worker.sh stop'"),
    (("delete",), "tpu-vm delete fpt"),
    (("delete", "--queued"), "queued-resources delete fpt --force"),
  ],
)
def test_what_gcloud_gets(arguments, expected):
  assert dry_run(*SETTINGS, *arguments) == [f"gcloud compute tpus {expected} {WHERE}"]


def test_settings_may_be_variables():
  variables = {"NAME": "pod", "ZONE": "z", "TYPE": "v5p-32", "SPOT": "1"}
  create = (
    "gcloud compute tpus tpu-vm create pod --accelerator-type=v5p-32 --version=v2-alpha-tpuv5"
  )
  assert dry_run("create", **variables) == [f"{create} --spot --zone=z"]


def test_a_variable_that_could_mean_the_opposite():
  done = tpu_pod(*SETTINGS, "create", "--type=v4-8", "--dry_run", SPOT="0")
  assert done.returncode == 2
  assert done.stderr == "error: spot is '0'; set the variable to 1, or to nothing\n"


def test_records_of_this_machine_are_copied(tmp_path):
  (tmp_path / "coco_instances").mkdir()
  make, copy = dry_run(*SETTINGS, "data", f"--data={tmp_path}")
  assert "--command=mkdir -p fpt_jax_data" in make
  files = f"{tmp_path}/coco_instances fpt:fpt_jax_data --worker=all"
  assert copy == f"gcloud compute tpus tpu-vm scp --recurse {files} {WHERE}"


def test_what_resume_would_do_after_a_preemption():
  commands = dry_run(
    *SETTINGS, "resume", *FLAGS, "--type=v5litepod-16", "--spot", "--data=gs://bucket/records"
  )
  verbs = [command.removeprefix("gcloud compute tpus ").split(" fpt")[0] for command in commands]
  looking = LIST.removeprefix("gcloud compute tpus ")
  assert verbs == [
    *(looking, "tpu-vm delete", "tpu-vm create", looking),
    "tpu-vm scp /tmp/fpt_jax_pod.tar.gz",
    *("tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"),
  ]
  assert "--quiet" in commands[1] and "--spot" in commands[2]
  for command, word in zip(commands[-3:], ("install", "data", "start"), strict=True):
    assert f"worker.sh {word}" in command


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((), ("which command?", "--help")),
    (("crate",), ("unknown command 'crate'", "create")),
    (("create", "--type=v4-8"), ("--name is missing",)),
    (("create", "--name=a", "--type=v4-8"), ("--zone is missing",)),
    ((*SETTINGS, "create"), ("--type is missing",)),
    ((*SETTINGS, "create", "--type=v9-8"), ("--version is missing", "v9-8")),
    ((*SETTINGS, "create", "--type"), ("--type needs a value",)),
    ((*SETTINGS, "create", "--steps=3"), ("create has no flag --steps=3",)),
    ((*SETTINGS, "create", "v4-8"), ("unexpected argument 'v4-8'",)),
    ((*SETTINGS, "tail", "--worker=all"), ("--worker=all must be the index",)),
    ((*SETTINGS, "data"), ("--data is missing",)),
    ((*SETTINGS, "data", "--data=/none"), ("--data=/none", "no such folder")),
    ((*SETTINGS, "data", "--data=/tmp", "--mount"), ("--mount needs --data=gs://",)),
    ((*SETTINGS, "start", "--workdir=gs://b/r"), ("--config=FILE is missing",)),
    ((*SETTINGS, "start", "--config=configs/x.py:a", "--workdir=gs://b/r"), ("configs/x.py does not exist",)),
    ((*SETTINGS, "start", FLAGS[0], "--workdir=/runs/a"), ("--workdir=/runs/a must be gs://",)),
    ((*SETTINGS, "start", FLAGS[0]), ("--workdir= must be gs://",)),
    ((*SETTINGS, "start", *FLAGS, "--mode=predict"), ("--mode=predict runs in one process",)),
  ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(arguments, words):
  done = tpu_pod(*arguments, "--dry_run")
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  for word in words:
    assert word in line


def test_without_gcloud(tmp_path):
  for tool in ("bash", "dirname", "sed"):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  done = tpu_pod(*SETTINGS, "delete", PATH=str(tmp_path))
  assert done.returncode == 2
  assert done.stderr.startswith("error: gcloud is not installed")


def test_settings_are_not_flags_of_the_training():
  text = tpu_pod("--help").stdout
  settings = set(re.findall(r"^ +--(\w+)", text, re.MULTILINE))
  assert {"name", "zone", "dry_run"} <= settings
  flags = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / "fpt_jax" / "main.py").read_text())
  assert "workdir" in flags
  assert not settings & set(flags)


BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tpu.md").read_text(), re.DOTALL)
COMMANDS = [
  line
  for block in BLOCKS
  for line in re.sub(r"\\\n *", "", block).splitlines()
  if line.startswith("bash scripts/tpu_pod.sh")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_documentation_exist(line, tmp_path):
  (tmp_path / "fpt_jax_data" / "coco").mkdir(parents=True)
  settings = {"NAME": "fpt", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "HOME": str(tmp_path)}
  done = subprocess.run(
    ["bash", "-c", f"{line.partition(' #')[0]} --dry_run"],
    cwd=ROOT, env=os.environ | settings, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "gcloud" in done.stdout


def test_what_needs_google_cloud_is_marked_in_the_documentation():
  assert len(COMMANDS) > 8
  for block in BLOCKS:
    needs = re.search(r"gs://|^gcloud |tpu_pod\.sh (?!--help|.*--dry_run)", block, re.MULTILINE)
    assert block.startswith("# not run\n") == bool(needs), block


def test_the_shell_scripts_pass_shellcheck():
  beside = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
  assert shellcheck, "install requirements-test.txt"
  scripts = sorted((ROOT / "scripts").glob("*.sh"))
  done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# A TPU service of one pod with two hosts: each is a folder, in which the commands run.
GCLOUD = """\
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(__file__).parent.parent / "cloud"
group, verb, *rest = sys.argv[3:]
with open(cloud / "calls.jsonl", "a") as file:
  file.write(json.dumps([verb, *rest]) + "\\n")
flags = dict(a.partition("=")[::2] for a in rest if a.startswith("--"))
names = [a for a in rest if not a.startswith("--")]
state = cloud / "state"
request = cloud / "request"
homes = [cloud / "host0", cloud / "host1"]
def make():
  assert not state.exists(), "ALREADY_EXISTS"
  for home in homes:
    shutil.copytree(cloud / "image", home, symlinks=True)
  state.write_text("READY")
if group == "queued-resources":
  if verb == "create":
    assert not request.exists(), "ALREADY_EXISTS"
    request.write_text("WAITING_FOR_RESOURCES")
  elif verb == "delete":
    request.unlink()
    state.unlink(missing_ok=True)
  elif request.exists():
    print(f"fpt\\t{request.read_text()}")
    if request.read_text() == "WAITING_FOR_RESOURCES":  # its turn comes after somebody has looked
      make()
      request.write_text("ACTIVE")
elif verb == "list":
  print("another\\tREADY")
  if state.exists():
    print(f"fpt\\t{state.read_text()}")
elif verb == "create":
  make()
elif verb == "delete":
  state.unlink()
elif verb == "scp":
  for home in homes:
    shutil.copy(names[0], home / names[1].removeprefix("fpt:"))
elif verb == "ssh":
  chosen = homes if flags["--worker"] == "all" else [homes[int(flags["--worker"])]]
  running = [
    subprocess.Popen(["bash", "-c", flags["--command"]], cwd=home, env={**os.environ, "HOME": str(home)})
    for home in chosen
  ]
  sys.exit(max(process.wait() for process in running))
"""

# A training that runs until it gets SIGTERM, or until the file `done` exists.
TRAINING = """\
import json, os, pathlib, signal, sys, time
def stop(*_):
  print("error: stopped by a signal; step 7 is saved", flush=True)
  sys.exit(2)
signal.signal(signal.SIGTERM, stop)
print("training", json.dumps(sys.argv[3:]), flush=True)
if "--config=configs/camvid.py" in sys.argv:
  sys.exit("error: a mistake in the config")
while not os.path.exists(pathlib.Path.home() / "done"):
  time.sleep(0.05)
"""


@pytest.fixture
def cloud(tmp_path):
  """The folder of the service, and its gcloud on PATH; no training outlives the test."""
  if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout")
  folder = tmp_path / "cloud"
  (tmp_path / "bin").mkdir()
  gcloud = tmp_path / "bin" / "gcloud"
  gcloud.write_text(f"#!{sys.executable}\n{GCLOUD}")
  gcloud.chmod(0o755)
  # what pip would install: an environment that is up to date, with the training above
  venv = folder / "image" / "fpt_jax_pod" / "code" / ".venv"
  (venv / "bin").mkdir(parents=True)
  files = [*sorted(ROOT.glob("requirements*.txt")), ROOT / "pyproject.toml"]
  content = "".join(file.read_text() for file in files)
  (venv / "installed-requirements-tpu.txt").write_text(content)
  (tmp_path / "training.py").write_text(TRAINING)
  python = venv / "bin" / "python"
  python.write_text(
    textwrap.dedent(f"""\
      #!/bin/bash
      [ "$1" != -m ] || exec {sys.executable} {tmp_path}/training.py "$@"
      exec {sys.executable} "$@"
    """)
  )
  python.chmod(0o755)
  yield folder
  preempt(folder)


def preempt(cloud):
  """The hosts are gone, with everything that runs on them."""
  for host in cloud.glob("host*"):
    if (host / "fpt_jax_pod" / "pid").exists():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int((host / "fpt_jax_pod" / "pid").read_text()), signal.SIGKILL)
      wait_for(host / "fpt_jax_pod" / "exit_status")
    shutil.rmtree(host)
  (cloud / "state").write_text("PREEMPTED")


def wait_for(file, seconds=20):
  for _ in range(seconds * 20):
    if file.exists():
      return
    time.sleep(0.05)
  raise AssertionError(f"{file} does not appear")


def on(cloud, *arguments):
  path = f"{cloud.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
  waits = {"START_SECONDS": "1", "STOP_SECONDS": "20", "POLL_SECONDS": "1"}
  return tpu_pod(*SETTINGS, "--type=v5litepod-16", *arguments, PATH=path, **waits)


def lines_of_hosts(done):
  assert done.returncode == 0, done.stderr
  host = os.uname().nodename
  return [
    line.removeprefix(f"{host}: ") for line in done.stdout.splitlines() if line.startswith(host)
  ]


def calls(cloud):
  return [json.loads(line)[0] for line in (cloud / "calls.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_pod_from_create_to_the_end_of_the_run(cloud):
  flags = (*FLAGS, "--config.eval.short_edges=(600, 800)", "--config.data.name=it's")
  (new := ROOT / "tests" / "new_file_of_a_test.txt").write_text("not committed")
  try:
    assert "there is none" in on(cloud, "status").stdout
    assert "create it first" in on(cloud, "install").stderr
    assert on(cloud, "create").returncode == 0
    assert lines_of_hosts(on(cloud, "status")) == ["nothing installed"] * 2
    assert [line.split()[0] for line in lines_of_hosts(on(cloud, "install"))] == ["jax", "jax"]
  finally:
    new.unlink()
  codes = [cloud / f"host{i}" / "fpt_jax_pod" / "code" for i in (0, 1)]
  for code in codes:
    assert (code / "tests" / new.name).read_text() == "not committed"
    assert (code / "fpt_jax" / "main.py").read_bytes() == (
      ROOT / "fpt_jax" / "main.py"
    ).read_bytes()
    assert not (code / ".git").exists()

  for line in lines_of_hosts(on(cloud, "start", *flags)):
    state, _, said = line.partition(": training ")
    assert state.startswith("running, process ")
    assert json.loads(said) == list(flags)  # as they were given, also the quotes and spaces
  again = on(cloud, "start", *flags)
  assert again.returncode == 2 and again.stderr.count("is training already") == 2
  assert "stop it before installing" in on(cloud, "install").stderr
  assert "all hosts are running" in on(cloud, "resume", *flags).stdout

  stopped = ["ended with status 2: error: stopped by a signal; step 7 is saved"] * 2
  assert lines_of_hosts(on(cloud, "stop")) == stopped
  assert lines_of_hosts(on(cloud, "status")) == stopped
  # nothing is made again, and files of an older checkout are gone
  resumed = on(cloud, "resume", *flags)
  assert [line[:7] for line in lines_of_hosts(resumed)[-2:]] == ["running"] * 2
  assert calls(cloud).count("create") == 1
  assert not any((code / "tests" / new.name).exists() for code in codes)

  preempt(cloud)
  assert "fpt is PREEMPTED; resume makes it again" in on(cloud, "install").stderr
  resumed = on(cloud, "resume", *flags)
  for line in lines_of_hosts(resumed)[-2:]:
    assert json.loads(line.partition(": training ")[2]) == list(flags)
  assert calls(cloud).count("create") == 2 and calls(cloud).count("delete") == 1

  # one host has lost its process: the other one is stopped as well before both start
  process = cloud / "host1" / "fpt_jax_pod" / "pid"
  os.kill(int(process.read_text()), signal.SIGKILL)
  wait_for(process.with_name("exit_status"))
  resumed = on(cloud, "resume", *flags)
  assert [line[:7] for line in lines_of_hosts(resumed)[-2:]] == ["running"] * 2
  assert "step 7 is saved" in (cloud / "host0" / "fpt_jax_pod" / "log.txt").read_text()

  for i in (0, 1):
    (cloud / f"host{i}" / "done").touch()
    wait_for(cloud / f"host{i}" / "fpt_jax_pod" / "exit_status")
  assert "the run has finished" in on(cloud, "resume", *flags).stdout
  assert on(cloud, "delete").returncode == 0
  assert "there is none" in on(cloud, "status").stdout


@pytest.mark.slow
def test_a_mistake_on_the_hosts_is_seen_at_the_start(cloud):
  assert on(cloud, "create").returncode == 0
  assert "nothing is installed on fpt; run install" in on(cloud, "start", *FLAGS).stderr
  assert on(cloud, "install").returncode == 0
  done = on(cloud, "start", "--config=configs/camvid.py", FLAGS[1])
  assert done.returncode == 2
  assert done.stdout.count("ended with status 1: error: a mistake in the config") == 2


@pytest.mark.slow
def test_a_pod_from_the_queue(cloud):
  queued = ("--queued", "--spot")
  assert on(cloud, "create", *queued).returncode == 0
  installed = on(cloud, "install", *queued)
  assert "waiting for fpt: WAITING_FOR_RESOURCES" in installed.stdout
  assert [line.split()[0] for line in lines_of_hosts(installed)] == ["jax", "jax"]
  preempt(cloud)
  (cloud / "state").unlink()
  (cloud / "request").write_text("SUSPENDED")
  assert "fpt is SUSPENDED; resume makes it again" in on(cloud, "install", *queued).stderr
  resumed = on(cloud, "resume", *FLAGS, *queued)
  assert [line[:7] for line in lines_of_hosts(resumed)[-2:]] == ["running"] * 2
  assert calls(cloud).count("create") == 2 and calls(cloud).count("delete") == 1
