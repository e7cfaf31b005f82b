#!/usr/bin/env bash
# Install on this machine what some tests need beside Python: iproute2, sshd and pdsh (two hosts on one machine),
# Chromium and axe-core (the report in a browser). scripts/test.sh skips those tests where a tool is missing.
#   sudo bash scripts/install_test_tools.sh
# Packages come from apt, as root; axe-core from npm, into .test-tools/ of this directory.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

packages=()
for tool in ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh chromium:chromium; do
    command -v "${tool%%:*}" >/dev/null || packages+=("${tool##*:}")
done
if [ ${#packages[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "cannot install ${packages[*]}: needs root and apt; install them yourself"
    else
        echo "installing ${packages[*]}"
        log=$(mktemp)
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
            >"$log" 2>&1 || { echo "apt could not install all of them:"; tail -n 3 "$log"; }
        rm -f "$log"
    fi
fi

if [ ! -e .test-tools/node_modules/axe-core/axe.min.js ]; then
    if ! command -v npm >/dev/null; then
        echo "cannot install axe-core: needs npm"
    else
        echo "installing axe-core"
        npm install --silent --no-audit --no-fund --prefix .test-tools axe-core >/dev/null 2>&1 || echo "npm could not install axe-core"
    fi
fi
