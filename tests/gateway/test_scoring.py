"""Rerank, score and classify: Jina's, Cohere's, vLLM's and Text Embeddings Inference's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import Bus
from tests.support.openai_process import StandIn

QUERY = "red roses"
DOCUMENTS = ["the sky is blue", "red roses are red", "roses"]
ORDER = [(1, 1.0), (2, 0.5), (0, 0.0)]


def ask(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_rerank_as_jina_and_vllm_have_it(http: httpx.Client, path: str) -> None:
    told = ask(http, path, model=MODEL, query=QUERY, documents=DOCUMENTS)
    assert [(one["index"], one["relevance_score"]) for one in told["results"]] == ORDER
    assert told["results"][0]["document"] == {"text": DOCUMENTS[1]}
    assert told["model"] == MODEL and told["id"].startswith("rerank-")
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] > 0
    objects = [{"text": document} for document in DOCUMENTS]
    same = ask(http, path, query={"text": QUERY}, documents=objects, return_documents=False)
    assert [set(one) for one in same["results"]] == [{"index", "relevance_score"}] * 3
    top = ask(http, path, query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [one["index"] for one in top["results"]] == [1, 2]
    assert len(ask(http, path, query=QUERY, documents=DOCUMENTS, top_n=9)["results"]) == 3


def test_rerank_as_cohere_has_it(http: httpx.Client) -> None:
    told = ask(http, "/v2/rerank", model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=1)
    assert told["results"] == [{"index": 1, "relevance_score": 1.0}]
    assert told["meta"]["billed_units"] == {"search_units": 1}
    assert told["meta"]["tokens"]["input_tokens"] == told["usage"]["prompt_tokens"]


def test_rerank_as_text_embeddings_inference_has_it(http: httpx.Client) -> None:
    told = ask(http, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=False, return_text=True)
    assert [(one["index"], one["score"]) for one in told] == ORDER
    assert told[0]["text"] == DOCUMENTS[1]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items")]
)
def test_scores_of_pairs(http: httpx.Client, path: str, names: tuple[str, str]) -> None:
    one, many = names
    told = ask(http, path, model=MODEL, **{one: QUERY, many: DOCUMENTS})
    assert [row["score"] for row in told["data"]] == [0.0, 1.0, 0.5]
    assert [row["index"] for row in told["data"]] == [0, 1, 2]
    assert told["object"] == "list" and told["data"][0]["object"] == "score"
    paired = ask(http, path, **{one: ["red", "sky"], many: ["red", "the sea"]})
    assert [row["score"] for row in paired["data"]] == [1.0, 0.0]
    assert ask(http, path, **{one: "x", many: "x"})["data"][0]["score"] == 1.0


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_labels_of_texts(http: httpx.Client, path: str) -> None:
    told = ask(http, path, model=MODEL, input=["aaab", "b"])
    first, second = told["data"]
    assert first == {"index": 0, "label": "odd", "probs": [0.25, 0.75], "num_classes": 2}
    assert second["label"] == "even" and told["labels"] == ["even", "odd"]
    assert told["usage"]["prompt_tokens"] == 5
    assert ask(http, path, input="aaab")["data"] == [first]
    assert ask(http, path, input=[97, 97, 97, 98])["data"] == [first]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": QUERY}, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": []}, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "texts": ["x"]}, "documents"),
        ("/v1/rerank", {"documents": DOCUMENTS}, "query"),
        ("/v1/rerank", {"query": QUERY, "documents": ["x", {"image": "y"}]}, "documents[1].image"),
        ("/v1/rerank", {"query": QUERY, "documents": ["x"], "max_tokens_per_doc": 5}, "max_tokens"),
        ("/v1/rerank", {"query": QUERY, "documents": ["x"], "truncate_prompt_tokens": 5}, "trunc"),
        ("/v1/score", {"text_1": "x"}, "text_1"),
        ("/v1/score", {"text_1": ["x", "y"], "text_2": ["x"]}, "text_2"),
        ("/v1/score", {"text_1": "x", "text_2": []}, "text_2"),
        ("/v1/classify", {}, "input"),
        ("/v1/classify", {"input": ["x", [1]]}, "input"),
    ],
)
def test_a_body_that_is_wrong_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    answer = http.post("/v1/rerank", json={"model": "nope", "query": "x", "documents": ["x"]})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_many_documents_are_one_request_here_and_several_on_the_bus(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    documents = [f"document {index}" for index in range(300)]
    answer = http.post("/v1/rerank", json={"query": "document 7", "documents": documents})
    told = answer.json()
    assert told["results"][0]["index"] == 7 and len(told["results"]) == 300
    assert len(answer.headers["x-bus-requests"].split(",")) == 5
    line = gateway.logged(answer.headers["x-request-id"], status=200, path="/v1/rerank")
    assert line["prompt"] == told["usage"]["prompt_tokens"]


def test_the_models_say_what_they_do(http: httpx.Client) -> None:
    [model] = http.get("/v1/models").json()["data"]
    assert {"rerank", "classify"} <= set(model["kinds"])


def test_a_model_that_embeds_scores_by_the_cosine(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    """The stand-in's vectors are the length of a text, 0.5 and -1."""

    def cosine(one: str, other: str) -> float:
        a, b = len(one), len(other)
        return (a * b + 1.25) / math.sqrt((a * a + 1.25) * (b * b + 1.25))

    with (
        StandIn(models=["vectors"], chats=False, completions=False, embeds=True) as server,
        Bus(tmp_path) as own,
    ):
        own.start_broker()
        own.start_worker("one", engine="openai", base_url=server.url)
        own.wait_ready(1)
        texts = ["a", "a longer text", "", "a"]
        with make_gateway(bus=own).http() as http:
            told = ask(http, "/v1/score", text_1="ab", text_2=texts, use_activation=False)
            wanted = [cosine("ab", text) for text in texts]
            assert [row["score"] for row in told["data"]] == pytest.approx(wanted)
            # Each text is embedded once.
            assert told["model"] == "vectors" and told["usage"]["prompt_tokens"] == 4
            told = ask(http, "/v1/rerank", query="ab", documents=texts, top_n=2)
            order = sorted(range(4), key=lambda index: -wanted[index])[:2]
            assert [row["index"] for row in told["results"]] == order
            assert told["results"][0]["relevance_score"] == pytest.approx(max(wanted))
            refused = http.post("/v1/classify", json={"input": "a"})
            assert refused.status_code == 400, refused.text
