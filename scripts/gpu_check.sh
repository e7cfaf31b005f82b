#!/usr/bin/env bash
# Checks and measures vdr on one GPU, in at most nine minutes and without a network. Run it again to resume where it was
# cut. Results: one JSON file per part, and a table.
#   bash scripts/gpu_check.sh [--out benchmarks/gpu] [--only step-plain,decode] [--minutes 9] [--dry-run]
# PYTHON=/path/to/python chooses the interpreter; it needs vdr's requirements, pytest, and TRL for the comparison.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/scripts/bench/gpu/check.py" "$@"
