"""FastChat's `test_message` and its OpenAI API server, with the gateway as their controller."""

from __future__ import annotations

import openai

from tests.judges.stage import Stage, environment, run, server

#: Its API server streams only under pydantic 1. `test_message` imports what runs models.
PACKAGES = (
    "fschat==0.2.36",
    "pydantic<2",
    "fastapi<0.112",
    "torch<2.14",
    "transformers<5",
    "accelerate",
    "psutil",
    "sentencepiece",
)


def judge(stage: Stage) -> None:
    """Raises AssertionError where FastChat is not content."""
    python = environment("fastchat", PACKAGES)
    _test_message(stage, str(python))
    command = (python, "-m", "fastchat.serve.openai_api_server", "--controller-address", stage.url)
    with (
        server(stage, "/v1/models", *command) as url,
        # Its keys are off; the SDK wants one all the same.
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        _api_server(client)


def _test_message(stage: Stage, python: str) -> None:
    said = run(
        stage,
        *(python, "-m", "fastchat.serve.test_message", "--controller-address", stage.url),
        *("--model-name", "echo", "--message", "Greetings to the bus.", "--max-new-tokens", "4000"),
    )
    assert "Models: ['demo', 'echo']" in said, said
    assert f"worker_addr: {stage.url}" in said, said
    # The echo of a raw prompt, which FastChat's own template made: it stops before the first turn.
    assert "Human: Greetings to the bus.\n" in said, said
    answer = said.partition("Assistant: ")[2].rstrip("\n")
    assert answer.startswith("A chat between") and answer.endswith("human's questions."), said


def _api_server(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list().data) == ["demo", "echo"]
    for model, question, answer in (
        ("echo", "Repeat this.", "Repeat this."),
        ("demo", "What is 3 plus 4?", "3 plus 4 is 7."),
    ):
        asked = {"model": model, "messages": [{"role": "user", "content": question}]}
        whole = client.chat.completions.create(**asked, temperature=0)
        assert whole.choices[0].message.content == answer, whole
        assert whole.usage is not None and whole.usage.completion_tokens > 0
        chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == answer and sum(map(bool, pieces)) > 1, pieces
        assert chunks[-1].choices[0].finish_reason == "stop", chunks[-1]
    asked = {"model": "echo", "prompt": "once more", "max_tokens": 100}
    assert client.completions.create(**asked).choices[0].text == "once more"
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "once more"
    made = client.embeddings.create(model="echo", input=["a", "b"], encoding_format="float")
    assert len(made.data) == 2 and len(made.data[0].embedding) > 1
    try:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    except openai.BadRequestError as error:
        assert "nope" in str(error)
    else:
        raise AssertionError("an unknown model was answered")
