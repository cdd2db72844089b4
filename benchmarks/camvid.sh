#!/usr/bin/env bash
# The main job on real images: teacher, store, students without and with it, evaluation.
#     benchmarks/camvid.sh DATA OUT [SIZE] [ITERATIONS] [THREADS]
# DATA is CamVid in the folder layout (images/{train,val}, labels/{train,val}, classes.txt). Continues where it stopped.
set -euo pipefail
kdcache() { "${PYTHON:-python3}" -m kdcache_cli "$@"; }
data=$1 out=$2 size=${3:-144x192} iterations=${4:-4000} threads=${5:-0}
training=(--iterations "$iterations" --batch-size 8 --lr 2e-3 --warmup 100 --class-weights sqrt --threads "$threads"
  --log-every 50)
resume() { [ ! -d "$1" ] || echo --resume; }
student=(--model kdcache:tiny --cache "$out/camvid.zarr" --val "$data" "${training[@]}")
kdcache train-teacher --data "$data" --model kdcache:base --size "$size" --out "$out/teacher" "${training[@]}" $(resume "$out/teacher")
kdcache build-teacher-cache --data "$data" --teacher "$out/teacher" --views full --out "$out/camvid.zarr"
kdcache verify "$out/camvid.zarr" --teacher "$out/teacher" --data "$data"
kdcache train-student "${student[@]}" --method none --out "$out/student-none" $(resume "$out/student-none")
kdcache train-student "${student[@]}" --method kl --out "$out/student-kl" $(resume "$out/student-kl")
for run in teacher student-none student-kl; do
  kdcache evaluate "$out/$run" --data "$data" --split val
done
