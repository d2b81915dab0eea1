"""`POST /v1/completions`: raw prompts, several at once, with echo, logprobs and best_of."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from starlette.responses import Response

from broker.protocol.messages import FinishReason, TokenLogprob, Usage
from client.gateway.convert import completion_calls, seeded
from client.gateway.errors import GatewayError
from client.gateway.generation import ChoiceEvent, Delta, Finish, Prompted
from client.gateway.openai_shared import IMPOSSIBLE, error_event, new_id, pick_seed, usage_of
from client.gateway.requests import CompletionRequest, parse
from client.gateway.sse import DONE, Event, until_disconnect
from client.gateway.visit import Visit

__all__ = ["completions"]


async def completions(visit: Visit) -> Response:
    """Continue one or several prompts; see `requests.CompletionRequest` for the body."""
    body = parse(CompletionRequest, await visit.body())
    visit.check(body.model, body.priority or 0)
    prompts = completion_calls(body, seed=pick_seed(body.seed), user=visit.share(body.user))
    candidates = body.best_of or body.n or 1
    calls = [seeded(call, i) for call in prompts for i in range(candidates)]
    answer = _Answer(visit, body, len(prompts), candidates)
    events = visit.generate(calls)
    if body.stream:
        return visit.stream(answer.stream(events), answer.failed)
    for event in await until_disconnect(events, visit.request.receive):
        answer.take(event)
    return Response(answer.complete(), media_type="application/json")


@dataclass(slots=True)
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    #: Characters before the first token of the next log-probabilities.
    offset: int = 0
    usage: Usage = field(default_factory=Usage)
    finish_reason: Literal["stop", "length"] = "stop"

    @property
    def mean_logprob(self) -> float:
        """What `best_of` goes by."""
        known = [token.logprob for token in self.logprobs if token.logprob is not None]
        return sum(known) / len(known) if known else IMPOSSIBLE


class _Answer:
    def __init__(
        self, visit: Visit, body: CompletionRequest, prompts: int, candidates: int
    ) -> None:
        self._visit = visit
        self._body = body
        self._prompts = prompts
        self._candidates = candidates
        self._choices = [_Choice() for _ in range(prompts * candidates)]
        self._id = new_id("cmpl-")
        self._created = int(time.time())
        #: With `max_tokens: 0` the one token that the bus makes is not part of the answer.
        self._prompt_only = body.max_tokens == 0
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)

    def take(self, event: ChoiceEvent) -> tuple[str, list[TokenLogprob]]:
        """Account for one event; returns the new text and log-probabilities of its choice."""
        choice = self._choices[event.choice]
        text, logprobs = "", []
        match event:
            case Prompted():
                text, logprobs = event.prompt.text, event.prompt.logprobs or []
            case Delta() if not self._prompt_only:
                self._visit.saw_token()
                text, logprobs = event.text, event.logprobs or []
            case Finish():
                choice.usage = event.end.usage
                if self._prompt_only:
                    choice.usage = Usage(prompt_tokens=event.end.usage.prompt_tokens)
                stopped = event.end.finish_reason is FinishReason.STOP
                choice.finish_reason = "stop" if stopped else "length"
                self._visit.completion_tokens += choice.usage.completion_tokens
                if event.choice % self._candidates == 0:
                    self._visit.prompt_tokens += choice.usage.prompt_tokens
        choice.text += text
        choice.logprobs += logprobs
        return text, logprobs

    def complete(self) -> str:
        """The answer that is not streamed: the best `n` candidates of each prompt."""
        kept: list[_Choice] = []
        for prompt in range(self._prompts):
            first = prompt * self._candidates
            candidates = self._choices[first : first + self._candidates]
            if self._candidates > (self._body.n or 1):
                candidates.sort(key=lambda choice: -choice.mean_logprob)
            kept += candidates[: self._body.n or 1]
        answer = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.text,
                    finish_reason=choice.finish_reason,
                    logprobs=self._logprobs(choice, choice.logprobs),
                )
                for index, choice in enumerate(kept)
            ],
            usage=self._usage(),
        )
        return answer.model_dump_json(exclude_unset=True)

    def _usage(self) -> CompletionUsage:
        return usage_of([choice.usage for choice in self._choices], prompts=self._prompts)

    async def stream(
        self, events: AsyncGenerator[ChoiceEvent, None]
    ) -> AsyncGenerator[Event, None]:
        """The answer as chunks."""
        try:
            async for event in events:
                text, logprobs = self.take(event)
                if text or logprobs:
                    yield self._chunk(event.choice, text, logprobs, None)
                if isinstance(event, Finish):
                    reason = self._choices[event.choice].finish_reason
                    yield self._chunk(event.choice, "", [], reason)
        finally:
            await events.aclose()
        if self._with_usage:
            yield Event(self._envelope([], usage=self._usage()))
        yield DONE

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: list[TokenLogprob],
        finish_reason: Literal["stop", "length"] | None,
    ) -> Event:
        # A chunk's finish reason is null until the last; the type of the whole answer forbids it.
        choice = CompletionChoice.model_construct(
            index=index,
            text=text,
            finish_reason=finish_reason,
            logprobs=self._logprobs(self._choices[index], logprobs) if logprobs else None,
        )
        return Event(self._envelope([choice], usage=None))

    def _envelope(self, choices: list[CompletionChoice], usage: CompletionUsage | None) -> str:
        chunk = Completion.model_construct(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
        )
        if self._with_usage:
            chunk.usage = usage
        return chunk.model_dump_json(exclude_unset=True, warnings=False)

    def _logprobs(self, choice: _Choice, tokens: list[TokenLogprob]) -> Logprobs | None:
        if self._body.logprobs is None:
            return None
        texts, offsets = [], []
        for token in tokens:
            texts.append(token.token.decode(errors="replace"))
            offsets.append(choice.offset)
            choice.offset += len(texts[-1])
        return Logprobs.model_construct(
            tokens=texts,
            # Null for the first token of a prompt: nothing stands before it.
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {top.token.decode(errors="replace"): top.logprob for top in token.top} or None
                for token in tokens
            ],
            text_offset=offsets,
        )

    def failed(self, error: GatewayError) -> list[Event]:
        """The end of a stream that fails after its first event."""
        return [error_event(error, self._visit.request_id), DONE]
