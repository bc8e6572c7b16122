#!/usr/bin/env bash
# Runs the benchmarks and writes each one's section of docs/performance.md, in 45 minutes on two cores:
#   bash scripts/benchmark_all.sh                   # all of them
#   bash scripts/benchmark_all.sh step predict      # some
#   bash scripts/benchmark_all.sh --page=FILE       # sections of another page
#   bash scripts/benchmark_all.sh --quick           # figures that mean nothing, to see that everything runs
# It prints the sections, too. A benchmark that fails leaves its section as it is; name it to run it again. What is
# compared with torch is skipped, or measured alone, where torch is not installed. Other programs on the machine make
# the figures wrong. Linux only.
set -euo pipefail

cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"

benchmarks=(startup convolution attention step predict input growth configs profile)
page=docs/performance.md quick=false names=()
for argument in "$@"; do
  case "$argument" in
    --quick) quick=true ;;
    --page=*) page="${argument#--page=}" ;;
    *)
      if [[ " ${benchmarks[*]} " != *" $argument "* ]]; then
        echo "error: unexpected argument '$argument'; the benchmarks are ${benchmarks[*]}" >&2
        exit 2
      fi
      names+=("$argument")
      ;;
  esac
done
if $quick && [ "$page" = docs/performance.md ]; then
  echo "error: the figures of --quick mean nothing; add --page=FILE" >&2
  exit 2
fi

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
failed=()
core="$(taskset -cp $$ | sed 's/.*: //; s/[,-].*//')" # the first one that this process may use
one_core="taskset -c $core"
torch=true
python -c 'import torch, torchvision' 2> /dev/null || torch=false

pick() { # FULL QUICK
  if $quick; then echo "$2"; else echo "$1"; fi
}

measure() { # NAME COMMAND [COMMAND ...]
  local name="$1" command
  shift
  [[ ${#names[@]} == 0 || " ${names[*]} " == *" $name "* ]] || return 0
  echo "== $name" >&2
  for command in "$@"; do
    echo "   $command" >&2
    {
      printf "\`\`\`bash\n%s\n\`\`\`\n\n" "$command"
      eval "$command" || { failed+=("$name"); return 0; }
      echo
    } >> "$folder/$name"
  done
  python scripts/benchmark_page.py "$page" "$name" < "$folder/$name" || failed+=("$name")
}

measure_with_torch() { # NAME COMMAND [COMMAND ...]
  if $torch; then
    measure "$@"
  elif [[ ${#names[@]} == 0 || " ${names[*]} " == *" $1 "* ]]; then
    echo "$1: skipped, because torch and torchvision are not installed"
  fi
}

measure startup "python scripts/benchmark_startup.py$(pick "" " --repetitions 1 --no_training")"

measure convolution "python scripts/benchmark_convolution.py$(pick "" " --repetitions 1 --images 1")"

attention="python scripts/benchmark_attention.py"
if $quick; then
  measure attention "$attention --tokens 64 --local-side 9 --repetitions 1"
else
  sdpa=""
  $torch && sdpa=" 'torch sdpa wide' 'torch sdpa padded' 'torch sdpa split'"
  measure attention "$attention --tokens 4096 --parts 2 4 --repetitions 3" \
    "$attention --tokens 16384 --similarities dot --only chunked$sdpa --local-side 0 --repetitions 1"
fi

step="python scripts/benchmark_step.py $(pick "--repetitions 9" "--size 64 --repetitions 1")"
measure_with_torch step "$step" "$step --train_backbone" "$one_core $step --no_memory" \
  "$one_core $step --train_backbone --no_memory"

predict="python scripts/benchmark_predict.py"
predict+=" $(pick "--repetitions 5" "--short_edge 64 --long_edge 96 --repetitions 1")"
measure_with_torch predict "$predict" "$one_core $predict --no_memory"

settings=$(pick "--images=64 --repetitions=3" "--images=16 --repetitions=1")
measure input "python scripts/benchmark_input.py $settings"

growth="python scripts/benchmark_growth.py"
measure growth "$growth $(pick "" "--sizes 64 --batches ")--neck_sizes --repetitions 1" \
  "$growth --sizes --batches --neck_sizes $(pick "256 384" "64 --repetitions 1")"

demo=configs/coco_mask.py:demo
settings=$(pick "$demo $demo,literal" "$demo $demo --batch 1 --repetitions 1")
measure configs "python scripts/benchmark_configs.py $settings"

profile="python scripts/profile_step.py --config"
if $quick; then
  measure profile "$profile=$demo --repetitions=1"
else
  torchvision=configs/coco_mask.py:torchvision
  measure profile "$profile=$torchvision --size=320" "$profile=$demo --batch=8" \
    "$profile=$torchvision --size=800 --predict"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "error: ${failed[*]} failed; run bash scripts/benchmark_all.sh ${failed[*]} again" >&2
  exit 1
fi
