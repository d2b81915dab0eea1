#!/usr/bin/env bash
# `transformers serve` leaves the pictures out of a question to a model of text, and answers it.
#
# Versions: transformers 5.24.0 (extra serving), torch 2.13.0, Python 3.11.
#
# Behaviour: a chat with an image part, sent to a model that has no vision, is answered with status
# 200: the image part is dropped while the messages are read, and the model answers the words alone.
# Nothing in the answer says so, and the server logs nothing; only `usage.prompt_tokens`, the same as
# without the picture, gives it away. One would expect status 400, as an OpenAI-compatible server
# gives for a part that its model does not take: what comes back looks like an answer about the picture.
#
# Output seen:
#   with a picture: status 200, 4 prompt tokens
#   without it: status 200, 4 prompt tokens
#   said of it by the server: nothing
#   dropped in silence: True
#
# Exits 0 while the behaviour is as described, 1 when it changed.
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "transformers[serving]==5.24.0"
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<s>", "</s>", "<unk>", "what", "is", "this", "?", "a", "cat", "dog"]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
fast.save_pretrained("model")
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )
).save_pretrained("model")
PYTHON
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$work/venv/bin/transformers" serve --host 127.0.0.1 --port "$port" >server.log 2>&1 &
server=$!
"$work/venv/bin/python" - "$port" <<'PYTHON'
import base64
import json
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
png += chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8)) + chunk(b"IEND", b"")
picture = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}


def ask(*parts):
    """Status and prompt tokens of a chat of these parts."""
    body = {
        "model": str(Path("model").resolve()),
        "messages": [{"role": "user", "content": list(parts)}],
        "max_tokens": 2,
        "stream": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{sys.argv[1]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)["usage"]["prompt_tokens"]
    except urllib.error.HTTPError as error:
        return error.code, None


for _ in range(600):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5)
        break
    except OSError:
        time.sleep(0.5)
words = {"type": "text", "text": "what is this ?"}
found = ask(words, {"type": "image_url", "image_url": picture})
plain = ask(words)
log = Path("server.log").read_text().lower()
said = [line for line in log.splitlines() if "image" in line or "ignor" in line or "drop" in line]
print(f"with a picture: status {found[0]}, {found[1]} prompt tokens")
print(f"without it: status {plain[0]}, {plain[1]} prompt tokens")
print(f"said of it by the server: {said or 'nothing'}")
silent = found == plain and found[0] == 200 and not said
print(f"dropped in silence: {silent}")
sys.exit(not silent)
PYTHON
