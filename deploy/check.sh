#!/usr/bin/env bash
# Does what the Dockerfile's build stages do, in clean virtual environments in place of images, and runs what they install.
# Stands in for a build where there is no container engine. Needs Python 3.11 or newer and pip's usual sources.
#
#   deploy/check.sh              the client
#   deploy/check.sh services     the services too, on the demo pair; torch from TORCH_INDEX if that is set
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec < /dev/null

python="${PYTHON:-python3}"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT

# What .dockerignore lets through, and nothing else.
mkdir "$place/src"
while read -r path; do
    [[ ! -e $path ]] || cp -r --parents "$path" "$place/src"
done < <(sed -n 's/^!//p' .dockerignore)
find "$place/src" \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
cd "$place/src"

install_project() {  # venv, extras...
    local venv="$1"
    shift
    "$venv/bin/python" deploy/requirements.py "$@" > "$place/requirements.txt"
    "$venv/bin/pip" install -q -c constraints.txt -r "$place/requirements.txt"
    "$venv/bin/pip" install -q --no-deps .
}

"$python" -m venv "$place/client"
install_project "$place/client" cli
cd "$place"
client/bin/specpair --version
client/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is not None)'
! client/bin/specpair health --target 127.0.0.1:1 2> /dev/null
client/bin/pip check

[[ ${1:-} == services ]] || exit 0
cd "$place/src"
"$python" -m venv "$place/service"
"$place/service/bin/pip" install -q -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
install_project "$place/service" cli target draft
cd "$place"
service/bin/pip check

# One after the other, as an image starts them: from the environment, with nothing writable but the cache.
serve() {  # role, port
    local role="$1" port="$2" upper="${1^^}" health=1
    env "SPECPAIR_${upper}_MODEL=$place/src/models/demo/$role" "SPECPAIR_${upper}_LISTEN=127.0.0.1:$port" \
        OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 HOME="$place/home" "service/bin/specpair-$role" 2> "$place/$role.log" &
    local process=$!
    for _ in $(seq 60); do
        sleep 2
        if service/bin/specpair health "--$role" "127.0.0.1:$port" > /dev/null 2>&1; then health=0; break; fi
        kill -0 "$process" 2> /dev/null || break
    done
    kill -TERM "$process" 2> /dev/null || true
    local status=0
    wait "$process" || status=$?
    if ((health || status)); then
        cat "$place/$role.log" >&2
        echo "$role: health $health, exit status $status" >&2
        return 1
    fi
    echo "$role: healthy, and ended by SIGTERM with status 0"
}
serve target "${SPECPAIR_CHECK_PORT:-50951}"
serve draft "${SPECPAIR_CHECK_PORT:-50951}"
