#!/usr/bin/env bash
# Every GPU check and benchmark of the project, in three calls that take at most 8 minutes each on one GPU:
#     benchmarks/gpu.sh --kernels ARCHIVE correctness     is it right
#     benchmarks/gpu.sh --kernels ARCHIVE kernels         how fast are the kernels, and which tiling suits them
#     benchmarks/gpu.sh --kernels ARCHIVE step rest       how fast are trainings
# in full: benchmarks/gpu.sh [--dry] [--kernels ARCHIVE] [--data DATA] [--results DIR] [--minutes N] [PART ...]
# PART, all of them in this order when none is named:
#     correctness  imports; every kernel once against float64, outputs poisoned; memcheck and racecheck of
#                  compute-sanitizer; the accuracy grid; the quick tests of a GPU
#     kernels      ceilings; the loss at three shapes and at 16x11x288x384; tune; ncu; rivals; the other cases
#     step         a training step, eager, compiled and graphed, beside one without a teacher
#     rest         builds, the main job, gradients, loaders, a live teacher
# and, when they are named,
#     tune         the loss at 2 to 12 rows of cells per program, by limits of 128, 152 and 168 registers
#     effect       the study of benchmarks/effect.py (DATA is CamVid), to be called until nothing is left; EFFECT names
#                  a folder that keeps its teachers and stores from one call to the next
#
# --kernels is an archive of benchmarks/precompile.py, made by the same versions; without it all kernels are compiled
# first, which takes 16 cores a minute or two. DATA is a data set in the folder layout with splits train and val;
# procedural scenes when left out. JSON goes to DIR (default benchmarks/results), named after the GPU, as soon as it is
# measured, and a line of calls-GPU.jsonl after each step. --minutes (default 8) is for the whole call: what does not
# fit is named at the end. Needs no installed package: the import roots are set here. What is not installed
# (compute-sanitizer, ncu, pytest) is named and left out. Exits with 1 when a step fails, after running the rest; with 2
# for wrong words and an archive of other versions. --dry goes the same way on a CPU, at sizes that take minutes.
# With Triton 3.6, --dry needs NumPy below 2.4: the interpreter of that Triton takes no later one.
set -uo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
dry='' kernels='' data='' results='' minutes=8 parts=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) dry=yes ;;
    --kernels | --data | --results | --minutes)
      [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift ;;
    correctness | kernels | step | rest | tune | effect) parts+=("$1") ;;
    *) echo "a part is correctness, kernels, step, rest, tune or effect; received '$1'" >&2; exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(correctness kernels step rest)
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/cli${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
kdcache=("$python" -m kdcache_cli)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -n "$dry" ]; then
  device=cpu gpu=dry size=36x48 iterations=8 batch=4
  data=${data:-scenes:48x64,train=16,val=4,seed=0}
  results=${results:-$work/results}
  check=(--dtype fp32)
  shapes=(--shapes 1x3x16x16/4 --repeats 3 --no-memory) all=(--shapes 1x3x16x16/4 --case trained)
  tuned=(--shapes 1x3x16x16/4) profiled=("${tuned[@]}") main=("${shapes[@]}")
  cases=("${shapes[@]}")
  arch=(--arch sm_90) pytest=(--collect-only)
  build=(--records 8 --repeats 3 --teachers kdcache:tiny) gradients=(--batches 1) steps=(--seconds 0.05 --repeats 3 --size 48x64)
  step=(--teacher kdcache:base --student kdcache:tiny --size 36x48 --steps 1 --repeats 3 --no-bounds)
  loader=(--against direct inline --records 8 --repeats 3 --steps 3) live=(--pairs 1 --iterations 8)
else
  "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no usable GPU; --dry needs none")' || exit 1
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
  device=cuda size=288x384 iterations=1000 batch=16
  data=${data:-scenes:360x480,train=192,val=32,seed=0}
  results=${results:-benchmarks/results}
  check=() all=() arch=() pytest=() tuned=() profiled=(--shapes voc) cases=(--shapes voc)
  main=(--shapes voc,ade,cityscapes,16x11x288x384/4)
  build=(--records 512 --repeats 3) gradients=() steps=(--seconds 1) step=(--steps 20 --workers 2) loader=()
  live=(--pairs 2 --iterations 200)
fi
mkdir -p "$results"
budget=$(awk "BEGIN { print int(60 * $minutes) }")

failed=() left=() part=compile
run() { # NAME, most seconds, command
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  local rest=$((budget - (SECONDS - began)))
  if [ "$rest" -lt 5 ]; then left+=("$name"); return; fi
  limit=$((rest < limit ? rest : limit))
  [ -z "$dry" ] || limit=$rest # these are seconds of a GPU
  echo "== $name (at most $limit s)"
  # An interrupt, so that what was measured is written; what ignores it is killed.
  timeout --signal=INT --kill-after=15 "$limit" "$@" || code=$?
  [ "$code" -eq 0 ] || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
  printf '{"part": "%s", "step": "%s", "seconds": %d, "code": %d}\n' "$part" "$name" $((SECONDS - start)) "$code" \
    >> "$results/calls-$gpu.jsonl"
}
found() { # PROGRAM: whether it is there
  command -v "$1" > /dev/null || { echo "== $1 is not installed"; return 1; }
}
checks() { # NAME, most seconds, arguments of gpu_checks.py
  run "$1" "$2" "$python" benchmarks/gpu_checks.py "${@:3}" --json "$results/$1-$gpu.json"
}
bench() { # NAME, most seconds, arguments of bench-kernels
  run "$1" "$2" "${kdcache[@]}" bench-kernels --device "$device" --json "$results/$1-$gpu.json" "${@:3}"
}

compile() { # the kernels, before anything launches them
  if [ -n "$kernels" ]; then
    TRITON_CACHE_DIR=$("$python" benchmarks/precompile.py --use "$kernels") || exit 2
  else
    TRITON_CACHE_DIR=$work/kernels
    run compile 240 "$python" benchmarks/precompile.py "${arch[@]}" --folder "$TRITON_CACHE_DIR" "${all[@]}"
  fi
  export TRITON_CACHE_DIR
}

sanitize() { # TOOL of compute-sanitizer: fewer points, for a kernel takes many times as long under it
  found compute-sanitizer || return
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$1" 75 compute-sanitizer --tool "$1" --error-exitcode 86 \
    --log-file "$results/$1-$gpu.txt" "$python" benchmarks/gpu_checks.py once --of 97
}

correctness() {
  checks once 90 once # a few of its kernels are in no archive
  sanitize memcheck
  sanitize racecheck
  bench accuracy 120 --check "${check[@]}"
  "$python" -c 'import pytest' 2> /dev/null || { echo "== pytest is not installed"; return; }
  # Most of the tests' time is compiling: several processes, where pytest-xdist is there.
  local processes=()
  "$python" -c 'import xdist' 2> /dev/null && [ -z "$dry" ] && processes=(-n 12)
  run tests 330 "$python" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib "${processes[@]}" \
    "${pytest[@]}" -m "not slow" -k "cuda or graph or triton or gpu or feed" --junitxml "$results/tests-$gpu.xml" \
    --ignore tests/kernels/test_bad_arguments.py tests/kernels tests/training tests/distill
}

profile() { # each kernel of a step, whole views and windows; the report is for ncu-ui
  local report=$results/ncu-$gpu target=("$python" benchmarks/gpu_checks.py launch "${profiled[@]}" --case plain,warp)
  if ! found ncu; then
    run launch 30 "${target[@]}"
    return
  fi
  run profile 80 ncu --set full --clock-control none --force-overwrite --export "$report" \
    --kernel-name 'regex:^(cells|tiles|prepare)_kernel' "${target[@]}"
  ncu --import "$report.ncu-rep" --csv --page raw > "$work/ncu.csv" && checks ncu 20 ncu "$work/ncu.csv"
}

kernels() {
  checks ceilings 30 ceilings
  bench kernels 100 "${main[@]}" --case plain,trained,warp --against none
  tune
  profile
  bench rivals 170 "${main[@]}" --against eager,compile
  bench kernels-cases 100 "${cases[@]}" --case trained,warp,gate,dist,dist-warp --against eager,compile
}

tune() {
  checks rows 100 rows "${tuned[@]}"
}

step() {
  run steps 120 "$python" benchmarks/steps.py --device "$device" --batch-size "$batch" "${steps[@]}" \
    --json "$results/steps-$gpu.json"
  run step 120 "$python" benchmarks/step.py --device "$device" --data "$data" --batch-size "$batch" "${step[@]}" \
    --json "$results/step-$gpu.json"
}

rest() {
  run build 60 "$python" benchmarks/build.py --device "$device" --data "$data" --size "$size" --render-threads 8 \
    --batch-size "$batch" "${build[@]}" --json "$results/build-$gpu.json"
  PYTHON=$python run camvid 180 benchmarks/camvid.sh "$data" "$work" "$size" "$iterations" 0
  "$python" benchmarks/collect.py "$work" --data "$data" --json "$results/training-$gpu.json" || failed+=(collect)
  local store=(--cache "$work/camvid.zarr")
  run gradients 40 "$python" benchmarks/gradients.py --device "$device" --data "$data" "${store[@]}" \
    --teacher "$work/teacher" --student "$work/student-kl" "${gradients[@]}" --json "$results/gradients-$gpu.json"
  run loader 60 "$python" benchmarks/loader.py "${store[@]}" --device "$device" --batch-size "$batch" "${loader[@]}" \
    --json "$results/loader-$gpu.json"
  run live 90 "$python" benchmarks/live.py --device "$device" --data "$data" "${store[@]}" \
    --teacher "$work/teacher" --out "$work/live" "${live[@]}" --json "$results/live-$gpu.json"
}

effect() {
  run effect "$budget" "$python" benchmarks/effect.py --data "$data" --out "${EFFECT:-$work/effect}" \
    --json "$results/study-$gpu.json" --parallel 4 --minutes $((budget / 60 - 1))
}

"$python" -c 'import kdcache.bench.kernels, kdcache.teacher, kdcache.training, kdcache_cli.app, psutil' || {
  echo "Cannot import what the checks need. Fix: add the missing package to PYTHONPATH." >&2
  exit 1
}
compile
for part in "${parts[@]}"; do "$part"; done
[ ${#left[@]} -eq 0 ] || echo "no time was left for: ${left[*]}"
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
[ ${#left[@]} -eq 0 ] && [ ${#failed[@]} -eq 0 ]
