#!/usr/bin/env bash
# One round on a machine with a GPU, torch with CUDA, triton and nvcc; no network: builds, tests, sanitizes, measures.
#
#   bench/gpu_round.sh [FOLDER]     results go to FOLDER (bench/results): gpu-CHIP-DATE.json, -decode.json, .md and .log
#
# PYTHON names the interpreter that has torch (python3). Nothing of its environment is changed: the package is built into
# a folder of its own. Every step has a limit, under nine minutes together; a step that fails is told in the results and
# the others go on. Returns 1 where the build, a test or a measurement failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=$(mkdir -p "${1:-$root/bench/results}" && cd "${1:-$root/bench/results}" && pwd)
python=${PYTHON:-python3}
cd "$root"

for need in nvcc "$python"; do
  command -v "$need" >/dev/null || { echo "$need: not found"; exit 1; }
done
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

mkdir -p "$work/source"
tar --exclude=./build --exclude='./.*' --exclude='*.so' -cf - . | tar -xf - -C "$work/source"
if step 120 build "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$work/site" "$work/source"; then
  step 20 environment "$python" -m fssa_fast || failed=1
  step 130 tests "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" || failed=1
  if command -v compute-sanitizer >/dev/null; then
    # Where a sanitizer cannot attach to the device it says so and nothing is concluded from it.
    cases=("film 1030 bfloat16" "film_norm 130 float16" "lora three bfloat16" "lora many rows float32" "context few bfloat16")
    for tool in memcheck racecheck; do
      step 40 "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m emulation.emulated device "${cases[@]}"
    done
  else
    echo "compute-sanitizer	not installed	0 s" | tee -a "$steps"
  fi
  step 90 benchmarks "$python" -m bench.gpu --json "$work/gpu.json" --table "$work/gpu.md" || failed=1
  step 75 decode "$python" -m bench.decode --shapes qwen2.5-1.5b --rows 32 64 --ranks 128 --systems transformers peft_mixed attached fused_base fused --seconds 0.5 --stream 0 --json "$results/$name-decode.json" || failed=1
else
  failed=1
fi

"$python" - "$work" "$results/$name" "$steps" <<'PYTHON'
import json, pathlib, subprocess, sys

work, to, steps = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]).read_text()
found = json.loads((work / "gpu.json").read_text()) if (work / "gpu.json").exists() else {"results": []}


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "not found"


found["nvidia-smi"] = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv")
found["nvcc"] = said("nvcc", "--version").splitlines()[-1:]
found["commit"] = said("git", "rev-parse", "HEAD")
found["steps"] = [dict(zip(("step", "outcome", "time"), line.split("\t"))) for line in steps.splitlines()]
pathlib.Path(f"{to}.json").write_text(json.dumps(found, indent=1) + "\n")
table = (work / "gpu.md").read_text() if (work / "gpu.md").exists() else "No measurements.\n"
rows = "".join(f"| {s['step']} | {s['outcome']} | {s['time']} |\n" for s in found["steps"])
pathlib.Path(f"{to}.md").write_text(f"# {to.rsplit('/', 1)[-1]}\n\n| step | outcome | time |\n|---|---|---|\n{rows}\n{table}")
PYTHON
[ -f "$results/$name.json" ] || failed=1
echo "$results/$name.md"
exit "$failed"
