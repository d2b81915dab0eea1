#!/bin/sh
# FastChat in an environment of its own, beside this file: .venv (ignored by git). Its API server
# cannot stream with pydantic 2 (`chunk.json(ensure_ascii=...)` raises there).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$here/.venv"
"$here/.venv/bin/pip" install --quiet "fschat==0.2.36" "pydantic<2" "fastapi<0.112"
"$here/.venv/bin/python" -c "import fastchat; print('FastChat', fastchat.__version__)"
