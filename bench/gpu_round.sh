#!/usr/bin/env bash
# One round on a machine with a GPU, torch with CUDA, triton and nvcc; no network: builds, tests, sanitizes, measures.
#
#   bench/gpu_round.sh [FOLDER]     results go to FOLDER (bench/results): gpu-CHIP-DATE.json, -decode.json, .md and .log
#
# PYTHON names the interpreter that has torch and what fssa_fast needs (python3), COMMIT what is measured where git
# cannot tell. Nothing of the interpreter's environment is changed: the package is built into a folder of its own. Every
# step has a limit, under eight minutes together; a step that fails is told in the results and the others go on. Returns
# 1 where the build, a test or a measurement failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=$(mkdir -p "${1:-$root/bench/results}" && cd "${1:-$root/bench/results}" && pwd)
python=${PYTHON:-python3}
cd "$root"

for need in nvcc "$python"; do
  command -v "$need" >/dev/null || { echo "$need: not found"; exit 1; }
done
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

# step LIMIT NAME COMMAND...: runs it, with a limit in seconds; tells how it went.
step() {
  local limit=$1 title=$2 begin=$SECONDS code
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
  [ "$code" = 0 ]
}

# The interpreter's own folder first on its path would hide the built package: PYTHONSAFEPATH.
export PYTHONSAFEPATH=1 PYTHONPATH="$work/site:$root:$root/tests" FSSA_CUDA=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET FSSA_BACKEND
tests=(tests/test_kernels.py tests/test_cuda.py)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8)  # most of their time goes into compiling

mkdir -p "$work/source"
tar --exclude=./build --exclude='./.*' --exclude='*.so' -cf - . | tar -xf - -C "$work/source"
if step 100 build "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$work/site" "$work/source"; then
  step 20 environment "$python" -m fssa_fast || failed=1
  step 130 tests "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" || failed=1
  if command -v compute-sanitizer >/dev/null; then
    # Where a sanitizer cannot attach to the device it says so and nothing is concluded from it.
    cases=("film 1030 bfloat16" "film_norm 130 float16" "lora three bfloat16" "lora many rows float32" "context few bfloat16")
    for tool in memcheck racecheck; do
      step 35 "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m emulation.emulated device "${cases[@]}"
    done
  else
    echo "compute-sanitizer	not installed	0 s" | tee -a "$steps"
  fi
  step 95 benchmarks "$python" -m bench.gpu --json "$work/gpu.json" || failed=1
  step 60 decode "$python" -m bench.decode --shapes qwen2.5-1.5b --rows 32 64 --ranks 128 --systems transformers peft_mixed attached fused_base fused --seconds 0.5 --stream 0 --json "$results/$name-decode.json" || failed=1
else
  failed=1
fi

{
  printf 'commit\t%s\n' "${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  printf 'nvcc\t%s\n' "$(nvcc --version | tail -n 1)"
  printf 'nvidia-smi\t%s\n' "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>&1 | head -n 1)"
} >"$work/about"
"$python" -m bench.gpu_report "$work" "$results/$name" || failed=1
echo "$results/$name.md"
exit "$failed"
