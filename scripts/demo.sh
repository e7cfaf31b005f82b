#!/usr/bin/env bash
# The whole product on the embedded default: train with the bonus, evaluate beside the start, score the completions.
#   bash scripts/demo.sh [run directory]          about 2 minutes on 2 cores, after the environment is made
set -euo pipefail
source "$(dirname "$0")/environment.sh"
if [ ! -e .venv ] || ! ls .venv/.made-of-*-test >/dev/null 2>&1; then make_environment ""; else make_environment test; fi

run=${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}
started=$SECONDS
step() { printf '\n== %s\n' "$*"; }

step "vdr train --mode end_of_sequence --output $run"
vdr train --mode end_of_sequence --output "$run"
trained=$((SECONDS - started))

step "vdr eval starter $run"
vdr eval starter "$run" --json "$run/eval.json"

step "vdr score $run --model $run -o $run/scores.parquet"
vdr score "$run" --model "$run" -o "$run/scores.parquet"

step "done"
python - "$run" "$trained" "$((SECONDS - started))" <<'PY'
import json, sys
run, trained, total = sys.argv[1:]
before, after = json.load(open(f"{run}/eval.json"))["models"]
for k in ("pass@1", "pass@8"):
    print(f"held-out {k}: {before[k]:.3f} before, {after[k]:.3f} after ({after[k] / before[k]:.2f}x)")
print(f"training took {trained} s, everything {total} s")
print(f"model        {run}/model            (AutoModelForCausalLM.from_pretrained)")
print(f"metrics      {run}/metrics.jsonl    (tensorboard --logdir {run})")
print(f"completions  {run}/completions/     (Parquet, every 10 steps)")
print(f"scores       {run}/scores.parquet   (uncertainty of every saved completion)")
print(f"report       {run}/report.html")
PY
