#!/usr/bin/env bash
# One round on a machine with a GPU, torch with CUDA and triton; no network: builds, tests, measures, sanitizes.
#
#   bench/gpu_round.sh [FOLDER]     results go to FOLDER (bench/results): gpu-CHIP-DATE.json, .md, .log, -decode-*.json
#
# PYTHON names the interpreter that has torch and what fssa_fast needs (python3), COMMIT what is measured where git
# cannot tell. Nothing of the interpreter's environment is changed: the package is built into a folder of its own. The
# fused form comes first: is it right on the device, then what does it cost. Every part has a limit, is told in the
# results as soon as it ends, and stops no other. Where nvcc is found the CUDA kernels are built meanwhile, and tested
# last. Returns 1 where a part failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=$(mkdir -p "${1:-$root/bench/results}" && cd "${1:-$root/bench/results}" && pwd)
python=${PYTHON:-python3}
cd "$root"

command -v "$python" >/dev/null || { echo "$python: not found"; exit 1; }
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH  # cmake and ninja may lie there
chip=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$chip" ]; then
  echo "torch finds no GPU"
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=gpu-$chip-$(date -u +%Y%m%d-%H%M)
log=$results/$name.log
steps=$work/steps
failed=0
: >"$log"
: >"$steps"
nvcc=$(command -v nvcc || true)
{
  printf 'commit\t%s\n' "${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  printf 'nvcc\t%s\n' "$([ -n "$nvcc" ] && nvcc --version | tail -n 1 || echo 'not installed')"
  printf 'nvidia-smi\t%s\n' "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>&1 | head -n 1)"
} >"$work/about"

report() {
  "$python" -m bench.gpu_report "$work" "$results/$name" || failed=1
}

# step LIMIT NAME COMMAND...: runs it, with a limit in seconds; tells how it went, and writes the results so far.
step() {
  local limit=$1 title=$2 begin=$SECONDS code outcome
  shift 2
  echo "== $title: $*" | tee -a "$log"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  code=$?
  case $code in
    0) outcome="passed" ;;
    124 | 137) outcome="stopped after $limit s" ;;
    *) outcome="failed ($code)" ;;
  esac
  echo "$title	$outcome	$((SECONDS - begin)) s" | tee -a "$steps"
  [ "$code" = 0 ] || failed=1
  report
  return "$code"
}

# build FOLDER CUDA: the package put together in the folder, with the CUDA kernels (1) or without (0). By CMake alone: pip
# would want the build backend, and there is no network.
build() {
  mkdir -p "$1/site"
  cp -r fssa_fast "$1/site/"
  rm -f "$1"/site/fssa_fast/*.so
  cp -r kernels "$1/site/fssa_fast/kernels"
  FSSA_CUDA=$2 cmake -S . -B "$1/build" &&
    cmake --build "$1/build" --parallel &&
    cmake --install "$1/build" --prefix "$1/site"
}

tested() {
  local limit=$1 title=$2
  shift 2
  step "$limit" "tests: $title" "$python" -m pytest -q -p no:cacheprovider "$@"
}

# The interpreter's own folder first on its path would hide the built package: PYTHONSAFEPATH.
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET FSSA_BACKEND
path() { export PYTHONPATH="$work/$1/site:$root:$root/tests"; }
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)  # most of the tests' time goes into compiling

path plain
export -f build
export python
step 60 build bash -c "build '$work/plain' 0"
if [ -n "$nvcc" ]; then
  build "$work/cuda" 1 >"$work/cuda.log" 2>&1 &
  building=$!
fi
step 20 environment "$python" -m fssa_fast
tested 60 "a toy block" tests/test_trial.py
tested 90 "steps, graphs, fused form, engine" "${parallel[@]}" tests/test_block_ops.py tests/test_graphs.py \
  tests/test_flash_ops.py tests/test_fused.py tests/test_engine.py
tested 90 kernels "${parallel[@]}" tests/test_kernels.py
for rows in 1 8 64; do
  step 40 "fused step, $rows rows" "$python" -m bench.decode --shapes qwen2.5-1.5b --rows "$rows" --ranks 128 \
    --systems fused_base fused --seconds 0.5 --stream 0 --json "$results/$name-decode-$rows.json"
done

if [ -n "$nvcc" ]; then
  begin=$SECONDS
  if wait "$building"; then
    echo "CUDA build	passed	waited $((SECONDS - begin)) s" | tee -a "$steps"
    path cuda
    FSSA_CUDA=1 tested 60 "CUDA kernels" "${parallel[@]}" tests/test_cuda.py
  else
    echo "CUDA build	failed	waited $((SECONDS - begin)) s" | tee -a "$steps"
    failed=1
  fi
  cat "$work/cuda.log" >>"$log"
else
  echo "CUDA build	nvcc is not installed	0 s" | tee -a "$steps"
fi
step 95 benchmarks "$python" -m bench.gpu --json "$work/gpu.json"
if [ -n "$nvcc" ] && command -v compute-sanitizer >/dev/null; then
  # Where a sanitizer cannot attach to the device it says so and nothing is concluded from it.
  before=$failed
  cases=("film 1030 bfloat16" "film_norm 130 float16" "lora three bfloat16" "lora many rows float32" "context few bfloat16")
  for tool in memcheck racecheck; do
    step 35 "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m emulation.emulated device "${cases[@]}"
  done
  failed=$before
fi
step 60 "peft, 8 adapters" "$python" -m bench.decode --shapes qwen2.5-1.5b --rows 8 --ranks 16 --seconds 0.5 --stream 0 \
  --systems transformers peft_mixed attached fused --json "$results/$name-decode-peft.json"

report
echo "$results/$name.md"
exit "$failed"
