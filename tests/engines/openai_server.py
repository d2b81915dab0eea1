"""A stand-in for servers of OpenAI's API: `python -m tests.engines.openai_server JSON`.

Its model is a function of the text so far, so that an answer which is continued is the one that was
interrupted. The words of the last user message say what happens: `#think`, `#call`, `#cut=5`, ... .
The options say which server it is: what it is called, what it takes and where it differs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

WORDS = [f"{a}{b}" for a in ("ka", "mo", "ri", "tu", "sé", "zo", "né", "la") for b in "abdegiko"]
EOS = len(WORDS)
LENGTH = 24
"""Words of an answer."""


@dataclass
class Options:
    """Which server it is."""

    port: int = 0
    owned_by: str = "vllm"
    models: list[str] = field(default_factory=lambda: ["stand-in"])
    key: str = ""
    #: How it continues a message: "flag", "last", "repeats" (with what it was given), "none".
    manner: str = "flag"
    images: bool = True
    #: Leaves images out without a word.
    blind: bool = False
    chats: bool = True
    completions: bool = True
    embeds: bool = False
    ids: bool = False
    context: int = 512
    delay_ms: float = 0.0
    usage: bool = True
    #: A whole JSON object where a stream was asked for.
    whole: bool = False
    #: Refuses what is not of its own parameters.
    strict: bool = False
    #: Calls the first tool that it is given, unless it has its result.
    calls: bool = False
    #: What it does with `max_tokens` beyond its room: "refuses", "openai" for its words, whose
    #: bound is on the answer, or "cuts".
    beyond: str = "refuses"
    #: Tells the prompt's tokens with each chunk, as llama.cpp does if asked to.
    timings: bool = False
    #: Another model: its answers differ.
    salt: str = ""
    #: Status of /health.
    health: int = 200


class State:
    """What the stand-in has seen, for tests: `GET /seen`."""

    lock = threading.Lock()
    bodies: ClassVar[list[dict[str, Any]]] = []
    cut: ClassVar[set[str]] = set()
    running = 0
    left = 0


@dataclass(frozen=True)
class Reply:
    """What is answered to a request: the pieces of a stream, and all that comes with them."""

    body: dict[str, Any]
    deltas: list[dict[str, Any]]
    finish: str
    usage: dict[str, Any]
    #: Instructions to the server: the words of the prompt that begin with #.
    orders: dict[str, str]
    asked: str
    chat: bool


def following(text: str, salt: str) -> int:
    """The next token of a text."""
    return hashlib.sha256((salt + text).encode()).digest()[0] % len(WORDS)


def words_of(text: str) -> int:
    return len(text.split())


def shown(content: Any) -> str:
    if isinstance(content, list):
        parts = [p.get("text", "" if Handler.options.blind else "<image>") for p in content]
        return " ".join(parts)
    return content or ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: Options

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        key = self.options.key
        if key and self.headers.get("authorization") != f"Bearer {key}":
            self.answer(401, {"error": {"message": "wrong key", "code": 401}})
            return False
        return True

    def do_GET(self) -> None:
        options = self.options
        if self.path == "/seen":
            seen = {"bodies": State.bodies, "running": State.running, "left": State.left}
            self.answer(200, seen)
        elif self.path == "/health":
            self.answer(options.health, {})
        elif not self.allowed():
            return
        elif self.path == "/v1/models":
            rows = [
                {"id": name, "owned_by": options.owned_by, "max_model_len": options.context}
                for name in options.models
            ]
            self.answer(200, {"object": "list", "data": rows})
        elif self.path == "/version" and options.owned_by == "vllm":
            self.answer(200, {"version": "0.0-stand-in"})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.allowed():
            return
        with State.lock:
            State.bodies.append(dict(body))
        if body.get("model") not in self.options.models:
            self.answer(404, {"error": {"message": f"no model {body.get('model')}"}})
        elif self.path == "/v1/chat/completions" and self.options.chats:
            self.chat(body)
        elif self.path == "/v1/completions" and self.options.completions:
            self.complete(body)
        elif self.path == "/v1/embeddings" and self.options.embeds:
            rows = [
                {"index": i, "embedding": [float(len(text)), 0.5, -1.0]}
                for i, text in enumerate(body["input"])
            ]
            self.answer(200, {"data": rows[::-1], "usage": {"prompt_tokens": len(rows)}})
        else:
            self.answer(404, {"detail": "Not Found"})

    # --- what is asked ----------------------------------------------------------------------------

    def chat(self, body: dict[str, Any]) -> None:
        options = self.options
        messages = body["messages"]
        asked = shown(next(m["content"] for m in reversed(messages) if m["role"] == "user"))
        if options.strict and (unknown := set(body) & {"stream_options", "top_k", "min_p"}):
            self.answer(422, {"detail": f"Unexpected fields: {unknown}"})
            return
        if "<image>" in asked and not options.images:
            self.answer(400, {"error": {"message": "this is not a multimodal model"}})
            return
        flagged = bool(body.get("continue_final_message"))
        if flagged and options.manner != "flag":
            self.answer(400, {"error": {"message": "continue_final_message is not known"}})
            return
        prompt = "\n".join(f"{m['role']}: {shown(m['content'])}" for m in messages[:-1])
        last = messages[-1]
        prefix = ""
        if last["role"] == "assistant" and options.manner in ("flag", "last", "repeats"):
            prefix = shown(last["content"])
        else:
            prompt += f"\n{last['role']}: {shown(last['content'])}"
        if self.fits(body, words_of(prompt) + words_of(prefix)):
            self.generate(body, prompt.strip(), prefix, asked, chat=True)

    def fits(self, body: dict[str, Any], prompt_tokens: int) -> bool:
        """Whether the answer has the room it asks for; cuts or refuses it otherwise."""
        options = self.options
        asked, room = body.get("max_tokens") or 1, options.context - prompt_tokens
        said = f"maximum context length is {options.context} tokens"
        if options.beyond == "openai" and room > 0:
            room = 16
            said = f"max_tokens is too large: {asked}. This model supports at most 16 completion "
            said += "tokens"
        if asked <= room:
            return True
        if options.beyond == "cuts" and room > 0:
            body["max_tokens"] = room
            return True
        self.answer(400, {"object": "error", "message": said, "code": 400})
        return False

    def complete(self, body: dict[str, Any]) -> None:
        prompt = body["prompt"]
        if isinstance(prompt, list):
            if not self.options.ids:
                self.answer(400, {"error": {"message": "prompt must be a string"}})
                return
            prompt = " ".join(map(str, prompt))
        if not self.fits(body, words_of(prompt)):
            return
        if body.get("max_tokens") is None:
            body["max_tokens"] = 16
        # The answer begins after the last question mark.
        asked, mark, prefix = prompt.rpartition("?")
        self.generate(body, asked + mark, prefix, asked, chat=False)

    # --- what is answered -------------------------------------------------------------------------

    def generate(
        self, body: dict[str, Any], prompt: str, prefix: str, asked: str, *, chat: bool
    ) -> None:
        options = self.options
        orders = dict(
            (word[1:].partition("=")[0], word.partition("=")[2])
            for word in asked.split()
            if word.startswith("#")
        )
        if options.calls and chat and body["messages"][-1]["role"] != "tool":
            orders["call"] = ""
        if "busy" in orders and self.once("busy" + asked):
            wait = orders["busy"] or "0.2"
            self.answer(429, {"error": {"message": "queue full"}}, {"retry-after": wait})
            return
        if "bad" in orders:
            self.answer(400, {"error": {"message": "that parameter is wrong", "code": 400}})
            return
        if "boom" in orders:
            self.answer(500, {"error": {"message": "CUDA error", "code": 500}})
            return
        most = body.get("max_tokens") or LENGTH
        count = words_of(prefix)
        text = prefix
        deltas: list[dict[str, Any]] = []
        if "think" in orders and not prefix:
            deltas += [{"reasoning_content": f"step {n}. "} for n in range(4)]
        if "call" in orders and body.get("tools"):
            name = body["tools"][0]["function"]["name"]
            head = {"index": 0, "id": "c1", "type": "function", "function": {"name": name}}
            deltas.append({"tool_calls": [head]})
            for part in ('{"ci', 'ty": "Par', 'is"}'):
                deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        else:
            if prefix and options.manner == "repeats" and chat:
                deltas.append({"content": prefix})
            for _ in range(min(most, LENGTH - count)):
                word = " " + WORDS[following(prompt + text, options.salt)]
                if "odd" in orders:
                    word += "\u2028"
                deltas.append({"content": word})
                text += word
        finish = "length" if len(deltas) == most and count + most < LENGTH else "stop"
        if "call" in orders and body.get("tools"):
            finish = "tool_calls"
        for stop in body.get("stop") or ():
            whole = "".join(delta.get("content") or "" for delta in deltas)
            if stop in whole:
                deltas = [{"content": whole.partition(stop)[0]}]
        usage = {
            "prompt_tokens": words_of(prompt) + count,
            "completion_tokens": len(deltas),
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        self.respond(Reply(body, deltas, finish, usage, orders, asked, chat))

    def once(self, what: str) -> bool:
        with State.lock:
            new = what not in State.cut
            State.cut.add(what)
        return new

    def respond(self, reply: Reply) -> None:
        options, body = self.options, reply.body
        if not body.get("stream") or options.whole:
            content = "".join(delta.get("content") or "" for delta in reply.deltas)
            message: dict[str, Any] = {"role": "assistant", "content": content}
            choice = {"message": message} if reply.chat else {"text": content}
            choice |= {"index": 0, "finish_reason": reply.finish}
            if body.get("return_token_ids"):
                choice["token_ids"] = [1] * len(reply.deltas)
            self.answer(200, {"choices": [choice], "usage": reply.usage})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with State.lock:
            State.running += 1
        try:
            self.events(reply)
        except OSError:
            with State.lock:
                State.left += 1
            self.close_connection = True
        finally:
            with State.lock:
                State.running -= 1

    def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        raw = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(raw), raw))
        self.wfile.flush()

    def events(self, reply: Reply) -> None:
        options, body = self.options, reply.body
        cut = int(reply.orders.get("cut", -1))
        for number, delta in enumerate(reply.deltas):
            if number == cut and self.once("cut" + reply.asked):
                self.connection.shutdown(2)
                raise OSError("cut")
            if "mid" in reply.orders and number == int(reply.orders["mid"]):
                self.event({"error": {"message": "a failure in the middle", "code": 500}})
                return
            if options.delay_ms:
                time.sleep(options.delay_ms / 1000)
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": delta} if reply.chat else {"text": delta["content"]}
            if body.get("logprobs") and "content" in delta:
                word = delta["content"]
                entry = {"token": word, "logprob": -0.5, "bytes": list(word.encode())}
                top = [{"token": word, "logprob": -0.5, "bytes": list(word.encode())}]
                choice["logprobs"] = {"content": [entry | {"top_logprobs": top}]}
            event: dict[str, Any] = {"choices": [choice]}
            if (body.get("stream_options") or {}).get("continuous_usage_stats"):
                event["usage"] = reply.usage | {"completion_tokens": number + 1}
            if body.get("timings_per_token") and options.timings:
                event["timings"] = {"prompt_n": reply.usage["prompt_tokens"] - 1, "cache_n": 1}
            self.event(event)
        end: dict[str, Any] = {"index": 0, "finish_reason": reply.finish}
        self.event({"choices": [end | ({"delta": {}} if reply.chat else {"text": ""})]})
        if options.usage and (body.get("stream_options") or {}).get("include_usage"):
            self.event({"choices": [], "usage": reply.usage})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    Handler.options = options
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
