#!/usr/bin/env bash
# Trains on a TPU VM or a TPU pod of Google Cloud, see docs/tpu.md. Needs gcloud on this machine.
#
#   bash scripts/tpu_pod.sh COMMAND [SETTINGS] [FLAGS]
#
# Commands, in the order of use:
#   create    ask for the TPU
#   install   copy this checkout to all hosts, and install requirements-tpu.txt there
#   data      put prepared records on all hosts; not needed if --config.data.data_dir is in a bucket
#   start     python -m fpt_jax.main FLAGS on all hosts, detached; FLAGS as in a terminal
#   tail      follow the log of one host
#   status    state of the TPU, and of the training on each host
#   stop      SIGTERM: the run saves a checkpoint and ends
#   resume    start again with the same FLAGS, after create, install and data if the TPU was preempted
#   delete    delete the TPU; the run's folder in the bucket stays
#
# Settings, as flags or as environment variables (NAME, ZONE, ..., SPOT=1):
#   --name=NAME         name of the TPU
#   --zone=ZONE         zone, such as us-west4-a
#   --project=PROJECT   project; by default, that of `gcloud config`
#   --type=TYPE         kind and size, such as v5litepod-16, v5p-32, v6e-16, v4-32
#   --version=VERSION   runtime; by default, the one for JAX on this type
#   --spot              a spot TPU: cheaper, and it can be preempted
#   --queued            wait in the queue for the TPU (a queued resource)
#   --data=FOLDER       records to put on the hosts: a folder of this machine, or gs://bucket/folder
#   --mount             with --data=gs://...: mount it read-only with gcsfuse instead of copying it
#   --worker=N          with tail: index of the host, 0 by default
#   --dry_run           print the commands instead of running them
#
# Every other flag is passed to fpt_jax.main by start and resume.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
POLL_SECONDS="${POLL_SECONDS:-30}" # between two looks at a TPU that is not ready
exec 3>&1                          # for what --dry_run prints where output is captured

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# Prints arguments so that a shell reads them as they are.
quoted() {
  local argument separator="" quote="'" escaped="'\\''"
  for argument in "$@"; do
    if [[ "$argument" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s%s' "$separator" "$argument"
    else
      printf "%s'%s'" "$separator" "${argument//$quote/$escaped}"
    fi
    separator=" "
  done
}

run() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$(quoted "$@")" >&3
    return
  fi
  "$@" || failed "$?" "$@"
}

failed() { # STATUS COMMAND
  [ "$1" != 127 ] || fail "nothing is installed on $name; run install first" # worker.sh was not found
  fail "'${*:2:5} ...' failed (status $1), see above"
}

tpus() { # GROUP COMMAND ARGUMENTS
  run gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

# Runs scripts/tpu_worker.sh on a host, or on "all".
on_hosts() { # WORKER ARGUMENTS
  tpus tpu-vm ssh "$name" --worker="$1" --command="bash fpt_jax_pod/worker.sh $(quoted "${@:2}")"
}

# State of the TPU, "" if there is none. PREEMPTED in a dry run of resume.
node_state() {
  if [ -n "$dry_run" ]; then
    tpus tpu-vm list --format='value(name.basename(),state)'
    [ "$command" != resume ] || echo PREEMPTED
    return
  fi
  tpus tpu-vm list --format='value(name.basename(),state)' | awk -v name="$name" '$1 == name { print $2 }'
}

# State of the request in the queue, "" if there is none.
request_state() {
  tpus queued-resources list --format='value(name.basename(),state.state)' |
    awk -v name="$name" '$1 == name { print $2 }'
}

wait_until_ready() {
  local state="" request="" before=""
  while true; do
    state="$(node_state)"
    if [ -n "$dry_run" ] || [ "$state" = READY ]; then
      return
    fi
    [ -z "$queued" ] || request="$(request_state)"
    case "$state/$request" in
      PREEMPTED/* | TERMINATED/* | */SUSPEND* | */FAILED)
        fail "$name is ${state:-$request}; resume makes it again, delete removes it"
        ;;
      STOPP* | HID*) fail "$name is $state; start it with 'gcloud compute tpus tpu-vm start', or delete it" ;;
      /) fail "there is no TPU $name in $zone; create it first" ;;
    esac
    if [ "$state/$request" != "$before" ]; then
      echo "waiting for $name: ${state:-$request}"
      before="$state/$request"
    fi
    sleep "$POLL_SECONDS"
  done
}

default_version() {
  case "$type" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--version is missing: no default for --type=$type; see 'gcloud compute tpus tpu-vm versions list'" ;;
  esac
}

create() {
  need type "kind and size, such as --type=v5litepod-16"
  [ -n "$version" ] || version="$(default_version)"
  if [ -n "$queued" ]; then
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$version" ${spot:+--spot}
  else
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  fi
}

delete() { # [--quiet]: gcloud asks before it deletes, unless it is given
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force "$@"
  else
    tpus tpu-vm delete "$name" "$@"
  fi
}

# The files of this checkout, also new and changed ones, but none that git ignores.
pack() ( # ARCHIVE
  cd "$root"
  git ls-files -z --cached --others --exclude-standard --exclude='.venv*' |
    while IFS= read -r -d '' file; do
      [ ! -f "$file" ] || printf '%s\0' "$file"
    done | COPYFILE_DISABLE=1 tar -czf "$1" --null -T - # no files of macOS's Finder
)

install() {
  local archive="fpt_jax_pod.tar.gz" folder
  git -C "$root" rev-parse --git-dir > /dev/null 2>&1 ||
    fail "$root is not a git checkout; its list of files is what install copies"
  wait_until_ready
  if [ -n "$dry_run" ]; then
    folder=/tmp
    echo "# $folder/$archive: the files of this checkout"
  else
    folder="$(mktemp -d)"
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    pack "$folder/$archive"
  fi
  tpus tpu-vm scp "$folder/$archive" "$name:$archive" --worker=all
  tpus tpu-vm ssh "$name" --worker=all --command="mkdir -p fpt_jax_pod && cd fpt_jax_pod && \
tar -xzOf ../$archive scripts/tpu_worker.sh > worker.new && mv worker.new worker.sh && cd .. && \
bash fpt_jax_pod/worker.sh install"
}

data() {
  need data_source "folder of prepared records, or gs://bucket/folder: --data=FOLDER" data
  if [[ "$data_source" == gs://* ]]; then
    on_hosts all data "$data_source" ${mount:+mount}
    return
  fi
  [ -z "$mount" ] || fail "--mount needs --data=gs://bucket/folder, not --data=$data_source"
  [ -d "$data_source" ] || fail "--data=$data_source: there is no such folder"
  # the folder's content, whether or not the hosts have the folder
  tpus tpu-vm ssh "$name" --worker=all --command="mkdir -p fpt_jax_data"
  tpus tpu-vm scp --recurse "${data_source%/}"/* "$name:fpt_jax_data" --worker=all
}

# Checks what would otherwise fail on the hosts.
check_flags() {
  local flag config="" workdir="" mode=train
  for flag in ${flags[@]+"${flags[@]}"}; do
    case "$flag" in
      --config=*) config="${flag#*=}" ;;
      --workdir=*) workdir="${flag#*=}" ;;
      --mode=*) mode="${flag#*=}" ;;
    esac
  done
  case "$mode" in
    train) [ -n "$config" ] || fail "--config=FILE is missing, such as --config=configs/coco_mask.py" ;;
    eval) ;;
    *) fail "--mode=$mode runs in one process; on a pod there are train and eval" ;;
  esac
  [ -z "$config" ] || [ -f "$root/${config%%:*}" ] ||
    fail "--config=$config: ${config%%:*} does not exist in $root, the folder that is copied to the hosts"
  [[ "$workdir" == gs://?* ]] ||
    fail "--workdir=$workdir must be gs://bucket/folder: the hosts share no disk, and it goes with the TPU"
}

start() {
  on_hosts all start ${flags[@]+"${flags[@]}"}
}

host_states() {
  tpus tpu-vm ssh "$name" --worker=all --command="if [ -e fpt_jax_pod/worker.sh ]; then \
bash fpt_jax_pod/worker.sh status; else echo \"\$(hostname): nothing installed\"; fi"
}

status() {
  local state request=""
  [ -z "$queued" ] || request="$(request_state)"
  state="$(node_state)"
  [ -n "$dry_run" ] || echo "TPU $name: ${state:-${request:-there is none}}"
  if [ "$state" = READY ] || [ -n "$dry_run" ]; then
    host_states
  fi
}

resume() {
  local state request="" hosts
  state="$(node_state)"
  [ -z "$queued" ] || request="$(request_state)"
  case "$state/$request" in
    PREEMPTED/* | TERMINATED/* | */SUSPEND* | */FAILED)
      echo "$name is ${state:-$request}: making it again"
      delete --quiet
      create
      ;;
    /) create ;;
    READY/*)
      hosts="$(host_states)"
      echo "$hosts"
      if ! grep -vq ': finished: ' <<< "$hosts"; then
        echo "the run has finished"
        return
      fi
      if ! grep -vq ': running, ' <<< "$hosts"; then
        echo "all hosts are running"
        return
      fi
      if grep -q ': running, ' <<< "$hosts"; then
        on_hosts all stop # the others have ended, so these wait for them
      fi
      ;;
  esac
  install
  [ -z "$data_source" ] || data
  start
}

need() { # VARIABLE MEANING [FLAG]
  [ -n "${!1}" ] || fail "--${3:-$1} is missing: $2"
}

name="${NAME:-}" zone="${ZONE:-}" project="${PROJECT:-}" type="${TYPE:-}" version="${VERSION:-}"
spot="${SPOT:-}" queued="${QUEUED:-}" data_source="${DATA:-}" mount="${MOUNT:-}" worker=0 dry_run=""
command=""
flags=()
for argument in "$@"; do
  case "$argument" in
    --help | -h)
      usage
      exit
      ;;
    --name=*) name="${argument#*=}" ;;
    --zone=*) zone="${argument#*=}" ;;
    --project=*) project="${argument#*=}" ;;
    --type=*) type="${argument#*=}" ;;
    --version=*) version="${argument#*=}" ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --data=*) data_source="${argument#*=}" ;;
    --mount) mount=1 ;;
    --worker=*) worker="${argument#*=}" ;;
    --dry_run) dry_run=1 ;;
    --name | --zone | --project | --type | --version | --data | --worker)
      fail "$argument needs a value: $argument=VALUE"
      ;;
    -*) flags+=("$argument") ;;
    *)
      [ -z "$command" ] || fail "unexpected argument '$argument'; flags have the form --flag=VALUE"
      command="$argument"
      ;;
  esac
done

case "$command" in
  create | install | data | tail | status | stop | delete)
    [ "${#flags[@]}" = 0 ] || fail "$command has no flag ${flags[0]}; --help lists the settings"
    ;;
  start | resume) check_flags ;;
  "") fail "which command? create, install, data, start, tail, status, stop, resume or delete; see --help" ;;
  *) fail "unknown command '$command'; choose create, install, data, start, tail, status, stop, resume or delete" ;;
esac
data_source="${data_source/#\~\//$HOME/}"
for argument in spot queued mount; do
  [[ "${!argument}" =~ ^1?$ ]] || fail "$argument is '${!argument}'; set the variable to 1, or to nothing"
done
need name "name of the TPU, such as --name=fpt"
need zone "zone of the TPU, such as --zone=us-west4-a"
[[ "$worker" =~ ^[0-9]+$ ]] || fail "--worker=$worker must be the index of a host, such as 0"
[ -n "$dry_run" ] || command -v gcloud > /dev/null ||
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

case "$command" in
  tail) on_hosts "$worker" tail ;;
  stop) on_hosts all stop ;;
  *) "$command" ;;
esac
