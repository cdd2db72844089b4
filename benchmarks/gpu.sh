#!/usr/bin/env bash
# Every GPU check and benchmark of the project, in under 8 minutes on one GPU:
#     benchmarks/gpu.sh [DATA] [RESULTS]
# DATA is a data set in the folder layout with splits train and val; procedural scenes when left out. JSON goes to RESULTS
# (default benchmarks/results), named after the GPU. Needs no installed package: the import roots are set here. Exits with 1
# when a check fails, after running the rest.
#     benchmarks/gpu.sh --effect [DATA] [RESULTS]
# goes on with the study of benchmarks/effect.py instead (DATA is CamVid), for about 10 minutes: call it again until nothing
# is left. EFFECT names a folder that keeps teachers and stores from one call to the next.
set -uo pipefail
cd "$(dirname "$0")/.."
effect=
[ "${1:-}" = --effect ] && { effect=yes; shift; }
data=${1:-scenes:360x480,train=192,val=32,seed=0}
results=${2:-benchmarks/results}
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/cli${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no usable GPU")' || exit 1
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
if [ -n "$effect" ]; then
  "$python" benchmarks/effect.py --data "$data" --out "${EFFECT:-$work/effect}" --json "$results/study-$gpu.json" \
    --parallel 4 --minutes 8
  exit
fi
failed=()
budget=470 # seconds for all steps together
step() { # NAME, most seconds, command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  limit=$((budget - SECONDS < limit ? budget - SECONDS : limit))
  echo "== $name (at most $limit s)"
  { [ "$limit" -gt 0 ] && timeout "$limit" "$@"; } || failed+=("$name")
  echo "== $name: $((SECONDS - began)) s"
}

step accuracy 60 "$python" -m kdcache_cli bench-kernels --check --device cuda
step kernels 150 "$python" -m kdcache_cli bench-kernels --device cuda --json "$results/kernels-$gpu.json"
if "$python" -c 'import pytest' 2>/dev/null; then
  # Most of the tests' time is compiling: several processes, where pytest-xdist is there.
  processes=()
  "$python" -c 'import xdist' 2>/dev/null && processes=(-n 12)
  step tests 200 "$python" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib "${processes[@]}" \
    -k "cuda or graph or triton or gpu or feed" tests/kernels tests/train/test_{graph,feed,resident}.py \
    tests/distill
fi
step build 60 "$python" benchmarks/build.py --device cuda --data "$data" --size 288x384 --render-threads 8 \
  --batch-size 16 --records 512 --repeats 3 --json "$results/build-$gpu.json"
PYTHON=$python step camvid 180 benchmarks/camvid.sh "$data" "$work" 288x384 1000 0
step gradients 40 "$python" benchmarks/gradients.py --device cuda --data "$data" --cache "$work/camvid.zarr" \
  --teacher "$work/teacher" --student "$work/student-kl" --json "$results/gradients-$gpu.json"
step steps 60 "$python" benchmarks/steps.py --device cuda --cache "$work/camvid.zarr" --batch-size 16 \
  --seconds 1 --iterations 300 --json "$results/steps-$gpu.json"
step loader 60 "$python" -m kdcache_cli bench-loader --cache "$work/camvid.zarr" --device cuda --batch-size 16 \
  --json "$results/loader-$gpu.json"
step step 60 "$python" benchmarks/step.py --device cuda --data "$data" --batch-size 16 --steps 20 --workers 2 \
  --json "$results/step-$gpu.json"
step live 60 "$python" benchmarks/live.py --device cuda --data "$data" --cache "$work/camvid.zarr" \
  --teacher "$work/teacher" --out "$work/live" --pairs 2 --iterations 200 --json "$results/live-$gpu.json"
"$python" benchmarks/collect.py "$work" --data "$data" --json "$results/training-$gpu.json"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
