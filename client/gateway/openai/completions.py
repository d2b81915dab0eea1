"""`POST /v1/completions`: raw prompts, several at once, with echo, logprobs and best_of.

Every event of a stream has an id. The same request again with `Last-Event-ID`, to any gateway,
continues after what was received, as in `chat`: the answer is generated again from its seed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import msgspec
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from starlette.responses import Response

from broker.protocol.messages import TokenLogprob
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.convert import completion_calls, seeded, wants_usage_so_far
from client.gateway.errors import GatewayError, invalid
from client.gateway.openai.answers import TextChoice, best_of, pick_seed
from client.gateway.openai.generation import (
    Batches,
    ChoiceEvent,
    Delta,
    Finish,
    Prompted,
    check_token_ids,
)
from client.gateway.openai.logprobs import of_prompt, shortened, text_logprobs
from client.gateway.openai.position import Position
from client.gateway.openai.shapes import (
    FINGERPRINT,
    JSON,
    Chunks,
    UsageSoFar,
    continued,
    dumped,
    error_event,
    logprob_bytes,
    usage_of,
)
from client.gateway.requests import CompletionRequest
from client.gateway.sse import DONE, Source, until_disconnect
from client.gateway.tokens.infill import with_suffix

__all__ = ["completions"]

_PREFIX = "cmpl-"


async def completions(context: RequestContext) -> Response:
    """Continue one or several prompts; see `requests.CompletionRequest` for the body."""
    body = await context.read(CompletionRequest)
    context.check(body.model, body.priority or 0)
    resumed = Position.read(_PREFIX, context.last_event_id) if body.stream else None
    seed = pick_seed(body.seed) if resumed is None else resumed.seed
    prompts = await context.aside(
        completion_calls,
        body,
        seed=seed,
        user=context.share(body.user),
        size_bytes=context.size_bytes,
    )
    if body.suffix:
        if body.echo:
            raise invalid("echo", "`echo` is not served with `suffix`.")
        prompts = await with_suffix(context, prompts, body.suffix)
    candidates = body.best_of or body.n or 1
    calls = [seeded(call, i) for call in prompts for i in range(candidates)]
    position = resumed or Position.first(_PREFIX, calls[0].request.params.seed)
    answer = _Answer(context, body, len(prompts), candidates, position)
    events = context.generate(calls, prompt_field="prompt")
    if body.stream:
        return context.stream(answer.stream(events), answer.failed)
    for event in await until_disconnect(events, context.request.receive):
        answer.take(event)
    text = await aside(answer.logprob_bytes, answer.complete)
    return Response(text, media_type="application/json")


class _Answer:
    def __init__(
        self,
        context: RequestContext,
        body: CompletionRequest,
        prompts: int,
        candidates: int,
        position: Position,
    ) -> None:
        self._context = context
        self._body = body
        self._prompts = prompts
        self._candidates = candidates
        prompt_only = body.max_tokens == 0
        by_id = bool(body.return_tokens_as_token_ids)
        self._choices = [TextChoice(prompt_only, by_id) for _ in range(prompts * candidates)]
        #: Choices of whose prompt the reader has the ids: every event of a choice brings atoms.
        self._prompt_told = {i for i, atoms in enumerate(position.read_atoms) if atoms}
        self._id = position.answer
        options = body.stream_options
        self._so_far = (
            UsageSoFar(len(self._choices), prompts=prompts) if wants_usage_so_far(body) else None
        )
        self._chunks = Chunks(
            Completion,
            "text_completion",
            body.model,
            position,
            len(self._choices),
            logprobs=body.logprobs is not None or bool(body.return_token_ids),
            with_usage=options is not None and bool(options.include_usage),
            so_far=self._so_far,
        )

    def take(self, event: ChoiceEvent) -> tuple[str, list[TokenLogprob]]:
        """Account for one event; returns the new text and log-probabilities of its choice."""
        choice = self._choices[event.choice]
        if self._so_far is not None:
            self._so_far.take(event)
        if self._body.return_token_ids:
            check_token_ids(event)
        if isinstance(event, Prompted):
            choice.prompt_token_ids = event.prompt.token_ids
            choice.prompt_logprobs = event.prompt.logprobs or []
            if not self._body.echo:
                return "", []  # only its tokens were requested
            if self._body.prompt_logprobs is not None:
                shown = shortened(choice.prompt_logprobs, self._body.logprobs or 0)
                told = msgspec.structs.replace(event.prompt, logprobs=shown)
                event = msgspec.structs.replace(event, prompt=told)
        text, logprobs = choice.take(event)
        if isinstance(event, Delta) and not choice.prompt_only:
            self._context.saw_token()
        elif isinstance(event, Finish):
            self._context.completion_tokens += choice.usage.completion_tokens
            if event.choice % self._candidates == 0:
                self._context.prompt_tokens += choice.usage.prompt_tokens
        return text, logprobs

    @property
    def logprob_bytes(self) -> int:
        """Approximate length of the log probabilities as JSON: the cost of writing them."""
        return logprob_bytes(
            tokens
            for choice in self._choices
            for tokens in (choice.logprobs, choice.prompt_logprobs)
        )

    def complete(self) -> str:
        """The answer that is not streamed: the best `n` candidates of each prompt."""
        kept = best_of(self._choices, self._candidates, self._body.n or 1)
        answer = Completion(
            id=self._id,
            object="text_completion",
            created=int(time.time()),
            model=self._body.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.text,
                    finish_reason=choice.finish_reason,
                    logprobs=self._logprobs(choice.logprobs),
                )
                for index, choice in enumerate(kept)
            ],
            usage=self._usage(),
            system_fingerprint=FINGERPRINT,
        )
        if self._body.return_token_ids:
            # Not of OpenAI's API.
            for shown, choice in zip(answer.choices, kept, strict=True):
                setattr(shown, "prompt_token_ids", choice.prompt_token_ids)  # noqa: B010
                setattr(shown, "token_ids", choice.token_ids)  # noqa: B010
        for shown, choice in zip(answer.choices, kept, strict=True):
            if (most := self._body.prompt_logprobs) is not None:
                scores = shortened(choice.prompt_logprobs, most)
                told = of_prompt(choice.prompt_token_ids, scores)
                setattr(shown, "prompt_logprobs", told)  # noqa: B010
            if choice.continued:
                setattr(shown, "continued", choice.continued)  # noqa: B010
        return answer.model_dump_json(exclude_unset=True)

    def _usage(self) -> CompletionUsage:
        return usage_of([choice.usage for choice in self._choices], prompts=self._prompts)

    async def stream(self, batches: Batches) -> Source:
        """The answer as chunks. Those that end it come with its last text."""
        out: list[bytes] = []
        running = len(self._choices)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for event in batch:
                    running -= isinstance(event, Finish)
                    text, logprobs, ids = self._unread(event, *self.take(event))
                    if text or logprobs or ids:
                        out.append(self._chunk(event.choice, text, logprobs, ids))
                    reader = self._chunks.reader
                    if isinstance(event, Finish) and not reader.skipped(event.choice, 1):
                        reason = self._choices[event.choice].finish_reason
                        out.append(self._chunk(event.choice, "", [], (), JSON.encode(reason)))
                if out and running:
                    yield out
                    out = []
        yield [*out, *self._chunks.last(self._usage), DONE]

    def _unread(
        self, event: ChoiceEvent, text: str, logprobs: list[TokenLogprob]
    ) -> tuple[str, list[TokenLogprob], Sequence[int]]:
        """The part that the reader does not have."""
        index, reader = event.choice, self._chunks.reader
        text = text[reader.skipped(index, len(text)) :]
        ids: Sequence[int] = ()
        if self._body.return_token_ids and isinstance(event, Delta):
            ids = () if self._choices[index].prompt_only else event.token_ids
        if self._body.logprobs is None:
            logprobs = []
        if not logprobs and not ids:
            return text, [], ()
        read = reader.skipped_tokens(index, len(logprobs) or len(ids))
        return text, logprobs[read:], ids[read:]

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: list[TokenLogprob],
        ids: Sequence[int],
        finish_reason: bytes = b"null",
    ) -> bytes:
        shown = self._logprobs(logprobs) if logprobs else None
        beside = continued(self._choices[index].continued) if finish_reason != b"null" else b""
        if self._body.return_token_ids:
            beside += b',"token_ids":' + JSON.encode(ids)
            if index not in self._prompt_told:
                self._prompt_told.add(index)
                prompt_ids = self._choices[index].prompt_token_ids
                beside += b',"prompt_token_ids":' + JSON.encode(prompt_ids)
        return self._chunks.event(
            b'{"finish_reason":%b,"index":%d,"logprobs":%b,"text":%b%b}'
            % (
                finish_reason,
                index,
                dumped(shown) if shown is not None else b"null",
                JSON.encode(text),
                beside,
            )
        )

    def _logprobs(self, tokens: list[TokenLogprob]) -> Logprobs | None:
        if self._body.logprobs is None:
            return None
        return Logprobs.model_construct(**text_logprobs(tokens))

    def failed(self, error: GatewayError) -> list[bytes]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._context.request_id), DONE]
