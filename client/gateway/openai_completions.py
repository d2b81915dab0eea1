"""`POST /v1/completions`: raw prompts, several at once, with echo, logprobs and best_of."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Literal

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from starlette.responses import Response

from broker.protocol.messages import TokenLogprob
from client.gateway.answers import TextChoice, best_of, new_id, pick_seed
from client.gateway.convert import completion_calls, seeded
from client.gateway.errors import GatewayError
from client.gateway.generation import ChoiceEvent, Delta, Finish
from client.gateway.openai_shared import error_event, usage_of
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


class _Answer:
    def __init__(
        self, visit: Visit, body: CompletionRequest, prompts: int, candidates: int
    ) -> None:
        self._visit = visit
        self._body = body
        self._prompts = prompts
        self._candidates = candidates
        prompt_only = body.max_tokens == 0
        self._choices = [TextChoice(prompt_only) for _ in range(prompts * candidates)]
        self._id = new_id("cmpl-")
        self._created = int(time.time())
        options = body.stream_options
        self._with_usage = options is not None and bool(options.include_usage)

    def take(self, event: ChoiceEvent) -> tuple[str, list[TokenLogprob]]:
        """Account for one event; returns the new text and log-probabilities of its choice."""
        choice = self._choices[event.choice]
        text, logprobs = choice.take(event)
        if isinstance(event, Delta) and not choice.prompt_only:
            self._visit.saw_token()
        elif isinstance(event, Finish):
            self._visit.completion_tokens += choice.usage.completion_tokens
            if event.choice % self._candidates == 0:
                self._visit.prompt_tokens += choice.usage.prompt_tokens
        return text, logprobs

    def complete(self) -> str:
        """The answer that is not streamed: the best `n` candidates of each prompt."""
        kept = best_of(self._choices, self._candidates, self._body.n or 1)
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

    def _logprobs(self, choice: TextChoice, tokens: list[TokenLogprob]) -> Logprobs | None:
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
