#!/usr/bin/env bash
# What scripts/tpu_pod.sh runs on each host of a TPU pod. Everything is in ~/fpt_jax_pod: the code with its .venv,
# the log, the process id and, once the process has ended, its exit status.
#
#   worker.sh install            unpack ~/fpt_jax_pod.tar.gz and install its requirements
#   worker.sh data URL [mount]   copy gs://bucket/folder to ~/fpt_jax_data, or mount it there read-only
#   worker.sh start [FLAGS]      python -m fpt_jax.main FLAGS, detached; refused while one runs
#   worker.sh status             one line: running, finished, stopped, ...
#   worker.sh tail               follow the log
#   worker.sh stop               SIGTERM, and wait until the process has saved and ended
#
# START_SECONDS: how long `start` watches the new process (10). STOP_SECONDS: how long `stop` waits (900).
set -euo pipefail

pod="$HOME/fpt_jax_pod"
code="$pod/code"
log="$pod/log.txt"
data="$HOME/fpt_jax_data" # the default of config.data.data_dir

say() {
  echo "$(hostname): $*"
}

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

running() {
  local id
  id="$(cat "$pod/pid" 2> /dev/null)" || return 1
  # another process may have the number after a reboot
  grep -aqs 'fpt_jax\.main' "/proc/$id/cmdline"
}

worker_install() {
  if running; then
    fail "process $(cat "$pod/pid") is training; stop it before installing"
  fi
  mkdir -p "$code"
  find "$code" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf "$HOME/fpt_jax_pod.tar.gz" -C "$code"
  cd "$code"
  if [ ! -x .venv/bin/python ]; then
    PYTHON="$(a_python)"
    export PYTHON
  fi
  # shellcheck source=scripts/_environment.sh
  source scripts/_environment.sh
  use_environment requirements-tpu.txt
  # shellcheck disable=SC2154 # use_environment sets it
  say "jax $("$python" -c 'import importlib.metadata as m; print(m.version("jax"))') is installed"
}

# Prints a Python that can make environments. Runtimes with Ubuntu 22.04 have Python 3.10 only; uv brings 3.11.
a_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      command -v "$name"
      return
    fi
  done
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv > /dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | sh >&2
  fi
  uv python install --quiet 3.11 >&2
  uv python find 3.11
}

worker_data() {
  local url="$1" path bucket folder
  if [ "${2:-}" != mount ]; then
    mkdir -p "$data"
    gcloud storage rsync --recursive "$url" "$data"
    say "$url is copied to $data"
    return
  fi
  path="${url#gs://}"
  bucket="${path%%/*}"
  folder="${path#"$bucket"}"
  folder="${folder#/}"
  if mountpoint -q "$data"; then
    say "$data is mounted already"
    return
  fi
  if ! command -v gcsfuse > /dev/null; then
    install_gcsfuse
  fi
  mkdir -p "$data"
  gcsfuse --implicit-dirs -o ro ${folder:+--only-dir="${folder%/}"} "$bucket" "$data"
  say "$url is mounted at $data"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq gcsfuse > /dev/null
}

worker_start() {
  if running; then
    fail "process $(cat "$pod/pid") is training already"
  fi
  [ -x "$code/.venv/bin/python" ] || fail "nothing is installed; run install first"
  rm -f "$pod/pid" "$pod/exit_status"
  echo "$(date -u '+%Y-%m-%d %H:%M:%S') starting: $*" >> "$log"
  setsid bash "$0" detached "$@" < /dev/null >> "$log" 2>&1 &
  for ((i = 0; i < ${START_SECONDS:-10}; i++)); do
    sleep 1
    if [ -e "$pod/exit_status" ]; then
      worker_status
      [ "$(cat "$pod/exit_status")" = 0 ] || exit 1
      return
    fi
  done
  worker_status
}

# Runs the training and keeps its exit status. A shutdown of the host sends SIGTERM to this shell as well.
worker_detached() {
  local id status=0
  trap : TERM
  cd "$code"
  .venv/bin/python -m fpt_jax.main "$@" &
  id=$!
  echo "$id" > "$pod/pid"
  wait "$id" || status=$?
  while kill -0 "$id" 2> /dev/null; do # `wait` ended by the signal
    status=0
    wait "$id" || status=$?
  done
  echo "$status" > "$pod/exit_status"
}

worker_status() {
  local status last i
  for ((i = 0; i < 20; i++)); do # the status is written a moment after the process has ended
    if running || [ ! -e "$pod/pid" ] || [ -e "$pod/exit_status" ]; then
      break
    fi
    sleep 0.5
  done
  last="$(tail -n 1 "$log" 2> /dev/null | cut -c 1-300)" || true
  if running; then
    say "running, process $(cat "$pod/pid"): $last"
  elif ! [ -e "$pod/pid" ]; then
    say "never started"
  elif ! status="$(cat "$pod/exit_status" 2> /dev/null)"; then
    say "lost, ended without a status: $last"
  elif [ "$status" = 0 ]; then
    say "finished: $last"
  else
    say "ended with status $status: $last"
  fi
}

worker_tail() {
  exec tail -n 40 -F "$log"
}

worker_stop() {
  if running; then
    kill -TERM "$(cat "$pod/pid")"
    for ((i = 0; i < ${STOP_SECONDS:-900}; i++)); do
      running || break
      sleep 1
    done
    if running; then
      fail "process $(cat "$pod/pid") is still running ${STOP_SECONDS:-900} s after SIGTERM; see its log"
    fi
  fi
  worker_status
}

case "${1:-}" in
  install | data | start | detached | status | tail | stop) "worker_$1" "${@:2}" ;;
  *) fail "worker.sh needs install, data, start, status, tail or stop, not '${1:-}'" ;;
esac
