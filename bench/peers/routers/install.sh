#!/bin/sh
# Installs popular HTTP routers, each in an environment of its own beside this file (ignored by git):
# smg/.venv, vllm_router/.venv, litellm/.venv.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
install() {
    "${PYTHON:-python3}" -m venv "$here/$1/.venv"
    "$here/$1/.venv/bin/pip" install --quiet "$2"
}
install smg smg
install vllm_router vllm-router
install litellm "litellm[proxy]"
