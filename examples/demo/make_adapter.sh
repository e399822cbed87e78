#!/usr/bin/env bash
# Makes the demo adapter from nothing but the two models, measures it, and writes the demo's users, in an hour and
# fifty minutes on two cores: examples/demo/make_adapter.sh WORK [PYTHON]
# Every step goes on where an interrupted one stopped, or is quick.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:?usage: make_adapter.sh WORK [PYTHON]}
python=${2:-.venv/bin/python}
mkdir -p "$work"
run() { "$python" -m "examples.demo.$@" --cache-dir "$work/base"; }

run sample "$work/samples.jsonl" --rounds 1
[ -e "$work/first/steering.json" ] || run train "$work/samples.jsonl" "$work/first" --steps 240
[ -e "$work/fresh.jsonl" ] || run resample "$work/first" "$work/samples.jsonl" "$work/fresh.jsonl"
[ -e "$work/second/steering.json" ] || run train "$work/samples.jsonl" "$work/second" --adapter "$work/first" \
  --fresh "$work/fresh.jsonl" --steps 160 --learning-rate 2e-4 --likelihood-weight 0.5 --strength 0.7
[ -e "$work/third/steering.json" ] || run train "$work/samples.jsonl" "$work/third" --adapter "$work/second" --alone \
  --fresh "$work/fresh.jsonl" --pictures 1000 --steps 70 --learning-rate 1.5e-4 --likelihood-weight 0.1 --seed 3
[ -e "$work/fourth/steering.json" ] || run train "$work/samples.jsonl" "$work/fourth" --adapter "$work/third" --alone \
  --fresh "$work/fresh.jsonl" --pictures 1000 --steps 30 --learning-rate 1.5e-4 --likelihood-weight 0.3 --seed 4
run train "$work/samples.jsonl" "$work/adapter" --adapter "$work/fourth" --alone \
  --fresh "$work/fresh.jsonl" --pictures 1000 --steps 25 --learning-rate 1.5e-4 --likelihood-weight 0.3 --seed 5
"$python" -m examples.demo.choices "$work/samples.jsonl" "$work/choices.json"
run evaluate "$work/adapter" "$work/samples.jsonl" "$work/results" --repeats 3
