"""`Client`: the blocking client. Builds a call, starts it, waits; contains no bus logic.

Safe to use from several threads; a stream belongs to one thread at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

from broker.protocol.messages import Kind
from client import calls
from client.calls import Call, Classified, Embeddings, Messages, Prompt
from client.choices import ChoiceStream
from client.classification import (
    Classifications,
    Reranked,
    classifications_from,
    paired,
    reranked_from,
)
from client.closing import Closing
from client.completion import Completion
from client.core.events import Answered, End
from client.core.shapes import Format, T
from client.decisions import Decisions, decisions_from
from client.errors import BusError
from client.face import BaseClient, drain_args
from client.images import Image
from client.io.thread import Transport
from client.parameters import (
    CallOptions,
    ChatOptions,
    ClassifyOptions,
    ConversationOptions,
    EmbedOptions,
    GenerateOptions,
    documented,
)
from client.stream import Inbox, Stream
from client.version import software

__all__ = ["Client"]


class Client(BaseClient, Closing):
    """A client of the bus.

    ```
    with Client() as client:
        print(client.chat("demo", "What is in this image?", images=["image.png"]))
        for piece in client.chat("demo", "Tell me a story", stream=True).text:
            print(piece, end="", flush=True)
    ```

    `help(Client.chat)` lists the options of a call; other calls take those that apply to them. An
    unknown option raises `TypeError`, which names similar ones. All calls raise `BusError`s.
    """

    def _prepare(self) -> None:
        self._transport = Transport(self._connection, software())
        # Also at the end of the process, so that workers are told rather than left to notice.
        self._finalizer = weakref.finalize(self, _shut_down, self._transport)

    def _current_transport(self) -> Transport:
        return self._transport

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = ...,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> Completion[T]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = ...,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> Stream[T]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = ...,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> list[Completion[T]]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = ...,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> ChoiceStream[T]: ...

    @overload
    def chat(
        self,
        model: str | None,
        messages: Messages,
        *,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> Completion[T]: ...

    @overload
    def chat(
        self,
        model: str | None,
        messages: Messages,
        *,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> Stream[T]: ...

    @overload
    def chat(
        self,
        model: str | None,
        messages: Messages,
        *,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> list[Completion[T]]: ...

    @overload
    def chat(
        self,
        model: str | None,
        messages: Messages,
        *,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[ChatOptions],
    ) -> ChoiceStream[T]: ...

    @documented(ChatOptions)
    def chat(
        self,
        *given: Any,
        messages: Messages | None = None,
        model: str | None = None,
        images: Sequence[Image] = (),
        n: int | None = None,
        stream: bool = False,
        response_format: Format[Any] | None = None,
        **params: Unpack[ChatOptions],
    ) -> Completion[Any] | Stream[Any] | list[Completion[Any]] | ChoiceStream[Any]:
        """The answer to a conversation: `chat(messages, model=...)`, or `chat(model, messages)`.

        `messages`: a text, or a list of `{"role": ..., "content": ...}`. `model`: a name, or None
        for the only model served. `images` (paths, bytes, Pillow images) join the last user
        message; or place them by parts `{"type": "image", "image": ...}`. `stream=True` returns a
        `Stream` at once; otherwise the call waits for the whole answer.

        `n`: so many answers, with the seeds `seed`, `seed + 1`, ...: a list of them, or a
        `ChoiceStream`. `response_format`: a class (a pydantic model, a dataclass, ...) or OpenAI's
        form, which the answer keeps to; its `parsed` is then an instance of the class. With `tools`
        (OpenAI's form, or classes) the answer has `tool_calls`.
        """
        model, messages = calls.model_and_messages(given, model, messages)
        options = {**params, "response_format": response_format}
        call = calls.chat(self._defaults, model, messages, images, options)
        return self._answer(call, n, stream)

    @overload
    def generate(
        self,
        prompt: str | None = ...,
        *,
        model: str | None = ...,
        token_ids: Sequence[int] | None = ...,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[GenerateOptions],
    ) -> Completion[T]: ...

    @overload
    def generate(
        self,
        prompt: str | None = ...,
        *,
        model: str | None = ...,
        token_ids: Sequence[int] | None = ...,
        images: Sequence[Image] = ...,
        n: None = ...,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[GenerateOptions],
    ) -> Stream[T]: ...

    @overload
    def generate(
        self,
        prompt: str | None = ...,
        *,
        model: str | None = ...,
        token_ids: Sequence[int] | None = ...,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[False] = ...,
        response_format: Format[T] | None = ...,
        **params: Unpack[GenerateOptions],
    ) -> list[Completion[T]]: ...

    @overload
    def generate(
        self,
        prompt: str | None = ...,
        *,
        model: str | None = ...,
        token_ids: Sequence[int] | None = ...,
        images: Sequence[Image] = ...,
        n: int,
        stream: Literal[True],
        response_format: Format[T] | None = ...,
        **params: Unpack[GenerateOptions],
    ) -> ChoiceStream[T]: ...

    @documented(GenerateOptions)
    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        images: Sequence[Image] = (),
        n: int | None = None,
        stream: bool = False,
        response_format: Format[Any] | None = None,
        **params: Unpack[GenerateOptions],
    ) -> Completion[Any] | Stream[Any] | list[Completion[Any]] | ChoiceStream[Any]:
        """Continue a raw prompt (`<image>` for each image) or token ids, without a template.

        `model`, `images`, `n`, `stream` and `response_format` as in `chat`.
        """
        options = {**params, "response_format": response_format}
        call = calls.complete(self._defaults, model, prompt, token_ids, images, options)
        return self._answer(call, n, stream)

    @documented(EmbedOptions)
    def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        model: str | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Vectors of texts or lists of token ids."""
        made = calls.embed(self._defaults, model, inputs, dict(options))
        return calls.embeddings_from(self.ends_of(made))

    def ends_of(self, made: Sequence[Call]) -> list[End]:
        """The ends of requests that are answered as a whole, in order."""
        streams = [self._stream(call) for call in made]
        try:
            return [_end_of(stream) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    @documented(ClassifyOptions)
    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        top_n: int | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Reranked:
        """Documents in the order of their relevance to a query, by a cross-encoder.

        `top_n`: only so many of them [all]. Each is scored as if it had been alone.
        """
        pairs = paired(query, documents)
        made = calls.rerank(self._defaults, model, pairs, dict(options))
        return reranked_from(self.ends_of(made), documents, top_n)

    @documented(ClassifyOptions)
    def classify(
        self,
        inputs: Classified | Sequence[Classified],
        *,
        model: str | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classifications:
        """The score of each of the model's labels for texts, or for pairs of texts (tuples)."""
        made = calls.classify(self._defaults, model, inputs, dict(options))
        count = sum(len(call.request.pairs or call.request.inputs or ()) for call in made)
        return classifications_from(self.ends_of(made), count)

    @documented(CallOptions)
    def decide(
        self,
        model: str | None,
        state: Any,
        questions: Mapping[str, Any],
        *,
        images: Mapping[str, Image] | Sequence[Image] = (),
        **options: Unpack[CallOptions],
    ) -> Decisions:
        """Answers to typed questions about a state: a probability for every allowed answer.

        `model`: a name, or None for the only model served. `state`: text, or a dict or list that
        the model sees as JSON. `questions`: a dict from names to questions of the types noul (true
        or false), choice and score:

        ```
        {
            "refund": {"type": "noul", "instructions": "Is a refund asked for?"},
            "tone": {"type": "choice", "criteria": {"calm": "A polite message", "angry": None}},
            "urgency": {"type": "score", "criteria": ["Can wait", "This week", "Today"]},
        }
        ```

        `images` (paths, bytes, Pillow images): a dict from the text that an image stands for,
        anywhere in the state or a question; or a list, whose images are called `<image-1>`,
        `<image-2>`, ... and go before the state where they are named nowhere.
        """
        call = calls.decide(self._defaults, model, state, questions, images, dict(options))
        end = _end_of(self._stream(call))
        return decisions_from(end, call.request.questions or {})

    @documented(ConversationOptions)
    def count(
        self,
        messages: Messages | None = None,
        *,
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        images: Sequence[Image] = (),
        **options: Unpack[ConversationOptions],
    ) -> int:
        """Tokens of a text, a conversation (with its template and images), or token ids."""
        return int(
            self._field("count", Kind.COUNT, messages, model, token_ids, images, dict(options))
        )

    @documented(ConversationOptions)
    def tokenize(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        add_special_tokens: bool = True,
        **options: Unpack[ConversationOptions],
    ) -> list[int]:
        """Token ids of a text or a conversation.

        `add_special_tokens`: a text has the tokens that a completion of it would have; False: those
        of the text alone.
        """
        args = {} if add_special_tokens else {"add_special_tokens": False}
        return list(
            self._field("token_ids", Kind.TOKENIZE, messages, model, None, (), dict(options), args)
        )

    @documented(CallOptions)
    def detokenize(
        self, token_ids: Sequence[int], *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> str:
        """The text of token ids."""
        return str(self._field("text", Kind.DETOKENIZE, None, model, token_ids, (), dict(options)))

    @documented(ConversationOptions)
    def template(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        **options: Unpack[ConversationOptions],
    ) -> str:
        """The prompt that the model's chat template makes of a conversation."""
        call = calls.chat(self._defaults, model, messages, (), dict(options), Kind.TEMPLATE)
        return str(calls.field_of(_end_of(self._stream(call)), "text"))

    def models(self) -> list[dict[str, Any]]:
        """The models served, with workers, capacity and queue of each (SPEC.md section 10)."""
        return list(self.query("bus.models"))

    def workers(self) -> list[dict[str, Any]]:
        """The workers, each with its state, slots and statistics."""
        return list(self.query("bus.workers"))

    def clients(self) -> list[dict[str, Any]]:
        """The clients of the broker."""
        return list(self.query("bus.clients"))

    def requests(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The latest requests, with state and outcome of each."""
        return list(self.query("bus.requests", {} if limit is None else {"limit": limit}))

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the broker."""
        return dict(self.query("bus.stats"))

    def drain(
        self, worker: str, *, deadline_s: float | None = None, reason: str = ""
    ) -> dict[str, Any]:
        """Let a worker finish its requests and accept nothing new. An operator's verb."""
        return dict(self.query("bus.drain", drain_args(worker, deadline_s, reason)))

    def hold(self, worker: str) -> dict[str, Any]:
        """Keep a worker on the bus but give it nothing new until it is released. An operator's
        verb."""
        return dict(self.query("bus.hold", {"worker": worker}))

    def release(self, worker: str) -> dict[str, Any]:
        """End a `hold`. An operator's verb."""
        return dict(self.query("bus.release", {"worker": worker}))

    def load(self, worker: str, model: str) -> dict[str, Any]:
        """Give a model the next turn at a worker that loads on demand. An operator's verb."""
        return dict(self.query("bus.load", {"worker": worker, "model": model}))

    def unload(self, worker: str, model: str = "") -> dict[str, Any]:
        """Unload a model at a worker that loads on demand, once what runs of it has ended; without
        a name, all of them. An operator's verb."""
        return dict(self.query("bus.unload", {"worker": worker, "model": model}))

    def query(
        self, verb: str, args: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Ask the broker itself (SPEC.md section 10)."""
        inbox = Inbox()
        query_id = self._ask(verb, args, timeout, inbox)
        try:
            (item,) = inbox.get()
        except BaseException:
            self._forget(query_id)
            raise
        if isinstance(item, BusError):
            raise item
        assert isinstance(item, Answered), item
        return item.result

    def close(self) -> None:
        """Cancel everything that is open, end the session and the thread. Idempotent."""
        self._finalizer()

    def _answer(
        self, call: Call, n: int | None, stream: bool
    ) -> Completion[Any] | Stream[Any] | list[Completion[Any]] | ChoiceStream[Any]:
        if n is None:
            started = self._stream(call)
            return started if stream else started.result()
        starts = [partial(self._start, one) for one in calls.choices(call, n)]
        choices = ChoiceStream[Any](starts, self)
        return choices if stream else choices.result()

    def _stream(self, call: Call) -> Stream:
        inbox = Inbox()
        return Stream(self._start(call, inbox), inbox, self)

    def _field(
        self,
        name: str,
        kind: Kind,
        given: Messages | None,
        model: str | None,
        token_ids: Sequence[int] | None,
        images: Sequence[Image],
        options: dict[str, Any],
        tokenize_args: dict[str, Any] | None = None,
    ) -> Any:
        call = calls.text_or_messages(
            self._defaults, kind, model, given, token_ids, images, options, tokenize_args
        )
        return calls.field_of(_end_of(self._stream(call)), name)


def _shut_down(transport: Transport) -> None:
    transport.close()
    transport.join()


def _end_of(stream: Stream) -> End:
    stream.result()
    return stream.end
