#!/bin/sh
# Installs FastChat in an environment of its own beside this file: .venv (ignored by git). Its API
# server cannot stream with pydantic 2, where `chunk.json(ensure_ascii=...)` raises.
#
# --with-model: also torch and transformers, for its real model worker (bench.engine). TORCH names the
# torch requirement; if plain `torch` would bring a GPU's libraries, point pip at a CPU build. FastChat
# 0.2.36 reads `rope_scaling` in a way that transformers 5 does not support.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$here/.venv"
pip() { "$here/.venv/bin/pip" install --quiet "$@"; }
pip "fschat==0.2.36" "pydantic<2" "fastapi<0.112"
if [ "${1:-}" = --with-model ]; then
    pip "${TORCH:-torch==2.13.0}" "transformers<5" "fschat[model_worker]==0.2.36" \
        "pydantic<2" "fastapi<0.112"
fi
"$here/.venv/bin/python" -c "import fastchat; print('FastChat', fastchat.__version__)"
