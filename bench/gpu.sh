#!/bin/bash
# Everything of bench/ that needs a GPU, in less than nine minutes: bench/gpu.sh [--dry] [FOLDER]
#
# Leaves one JSON file for each part in FOLDER (left out: bench/results), with the names of the device, the versions and
# the load; each is complete after every row, so that what a time limit cuts off costs only the rest of its part.
# --dry: the same parts on a CPU, on the smallest cases, to see that they run.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
dry=""
[ "${1:-}" = --dry ] && { dry=yes; shift; }
[ -n "${1:-}" ] && { mkdir -p "$1"; ROBUSTKD_BENCH_RESULTS=$(cd "$1" && pwd); export ROBUSTKD_BENCH_RESULTS; }
failed=0

part() {  # seconds allowed, arguments of `python -m bench`
  local limit=$1 began=$SECONDS
  shift
  echo "== python -m bench $*" >&2
  timeout "$limit" "$python" -m bench "$@" || { echo "== failed with $?: python -m bench $*" >&2; failed=1; }
  echo "== $((SECONDS - began)) s" >&2
}

if [ -n "$dry" ]; then
  part 300 step --quick --only 'dgad/resnet18-w0.125/*'
  part 300 breakdown --case dgad/quickstart --repeats 2
  part 300 audit --quick --only 'pgd-20/*'
  part 300 engine --quick --only 'engine/mnv2/onnxruntime-fp32/b1'
  part 300 memory --quick --only 'memory/audit/resnet-18/n64/*'
  exit $failed
fi
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "no CUDA device here" >&2; exit 4; }
gpu="--device cuda"
part 120 step $gpu --precision bf16 --only 'dgad/mnv2/*' --only 'dgad/rn18/*'
part 40 step $gpu --precision bf16-attack --only 'dgad/rn18/*'
part 40 step $gpu --precision fp32 --only 'dgad/rn18/*'
part 30 breakdown $gpu --precision bf16 --case dgad/rn18/wrn-34-10
part 30 breakdown $gpu --precision bf16-attack --case dgad/rn18/wrn-34-10
part 30 breakdown $gpu --precision bf16 --case dgad/mnv2/resnet-18
part 110 audit $gpu --quick
part 70 engine $gpu --quick
part 60 memory $gpu --quick
exit $failed
