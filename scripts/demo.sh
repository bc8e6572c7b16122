#!/usr/bin/env bash
# Trains Mask R-CNN with FPT and without transformers on generated images whose small objects only context
# tells apart, and shows both side by side: bash scripts/demo.sh [WORKDIR [FLAGS]]
# Installs the requirements, generates Context Shapes, trains, evaluates and draws detections. FLAGS are those of
# fpt_jax.main, such as --config.steps=500.
set -euo pipefail

if [[ "${1:-}" == -* ]]; then
  echo "error: the folder comes before the flags: bash scripts/demo.sh WORKDIR $*" >&2
  exit 2
fi
workdir="${1:-/tmp/fpt_jax_demo}"
[[ "$workdir" == /* ]] || workdir="$PWD/$workdir"
flags=("${@:2}")
# shellcheck source=scripts/_environment.sh
source "$(dirname "$0")/_environment.sh"
use_environment requirements.txt

config=configs/coco_mask.py:demo
data="--config.data.data_dir=$workdir/data"
baseline="$workdir/fuse" # the same network, without transformers

run() { # MODE CONFIG WORKDIR [FLAGS]
  "$python" -m fpt_jax.main --mode="$1" --config="$2" --workdir="$3" "$data" ${flags[@]+"${flags[@]}"} "${@:4}"
}
twelve=--config.data.eval_split='val[:12]'

train_baseline() {
  run train $config,fpt=fuse "$baseline"
  run predict $config,fpt=fuse "$baseline" "$twelve"
}

"$python" -m fpt_jax.main --mode=prepare --config=$config "$data" ${flags[@]+"${flags[@]}"}
mkdir -p "$baseline"
train_baseline > "$baseline/log.txt" 2>&1 &
training=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
run train $config "$workdir"
run explain $config "$workdir" "$twelve" > "$workdir/explain.txt" 2>&1 &
explaining=$!
run predict $config "$workdir" "$twelve"
wait $explaining || { tail -n 3 "$workdir/explain.txt" >&2; exit 1; }
echo "waiting for the baseline without transformers, log: $baseline/log.txt"
wait $training || { tail -n 3 "$baseline/log.txt" >&2; exit 1; }
"$python" scripts/compare_runs.py --out="$workdir/side_by_side.png" FPT="$workdir" \
  "without transformers=$baseline"
sed -n '/attention on the objects/,$p' "$workdir/explain.txt"
echo "pictures: $workdir/predictions/contact_sheet.png"
echo "what FPT attends to: $workdir/explain"
echo "metrics: $workdir/metrics.jsonl"
echo "TensorBoard: tensorboard --logdir $workdir"
