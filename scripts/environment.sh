# Sourced by demo.sh and test.sh: makes .venv with vdr and the extras in $1, or re-uses it in a moment.
# Needs Python 3.11 or newer with venv; no compiler. PYTHON=/path/to/python chooses another one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

make_environment() {
    local extras=$1 python=${PYTHON:-python3} stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "vdr needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/python3.11" >&2
        exit 4
    }
    stamp=.venv/.made-of-$( (cat pyproject.toml constraints.txt scripts/environment.sh; "$python" -V) | sha256sum | cut -c1-16)-${extras:-plain}
    if [ ! -e "$stamp" ]; then
        echo "making .venv (a few minutes, once)"
        "$python" -m venv --clear .venv
        # torch first: without a GPU a CPU build is enough; with one, pip's default brings CUDA.
        install_tested "torch>=2.6"
        install_tested --editable ".${extras:+[$extras]}"
        if [ "$extras" = test ]; then
            install_tested "$(gym_requirement)" || echo "reasoning-gym cannot be installed (it needs a C compiler): its tests are skipped"
        fi
        touch "$stamp"
    fi
    export PATH="$root/.venv/bin:$PATH"
}

# reasoning-gym, as pyproject.toml's extra gym names it: one of its requirements is compiled.
gym_requirement() { sed -n 's/^gym = \["\(.*\)"\]$/\1/p' pyproject.toml; }

# pip install, at the versions of constraints.txt; at the newest allowed ones where those cannot be had (another Python).
install_tested() {
    local pip=(.venv/bin/pip install --quiet --disable-pip-version-check)
    "${pip[@]}" --constraint constraints.txt "$@" && return
    echo "the versions of constraints.txt cannot be had for $(.venv/bin/python -V): installing the newest allowed ones"
    "${pip[@]}" "$@"
}
