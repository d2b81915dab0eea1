"""`POST /v1/systemone`: the API's formats, its limits, and refusals that name what is wrong."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.gateway.conftest import GatewayProcess

QUESTIONS: dict[str, Any] = {
    "refund": {"type": "noul", "instructions": "Is a refund asked for?"},
    "tone": {"type": "choice", "criteria": {"calm": "A polite message", "angry": None}},
    "urgency": {"type": "score", "criteria": ["Can wait", {"when": "Today"}]},
}
IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
ASSET = {"type": "image", "format": "png", "data_base64": IMAGE}


def ask(gateway: GatewayProcess, **body: Any) -> tuple[int, Any]:
    with gateway.http() as http:
        plain = {"model": "echo", "state": "Twice charged.", "questions": QUESTIONS} | body
        answer = http.post("/v1/systemone", json=plain)
        return answer.status_code, answer.json()


def test_an_answer_has_the_shapes_of_the_api(gateway: GatewayProcess) -> None:
    status, body = ask(gateway)
    assert status == 200 and set(body) == {"model", "answers", "usage"}
    assert body["model"] == "echo" and body["usage"]["output_tokens"] == 0
    assert body["usage"]["input_tokens"] > 0
    answers = body["answers"]
    assert list(answers) == list(QUESTIONS)
    assert set(answers["refund"]) == {"type", "noul"}
    assert set(answers["tone"]) == {"type", "choice", "confidence", "probabilities"}
    assert set(answers["urgency"]) == {"type", "score", "legend", "confidence", "probabilities"}
    assert answers["urgency"]["legend"] == {"0": "Can wait", "1": {"when": "Today"}}
    assert {name: answer["type"] for name, answer in answers.items()} == {
        name: question["type"] for name, question in QUESTIONS.items()
    }


@pytest.mark.parametrize("state", ["", {"message": "text"}, ["text", {"a": 1}]])
def test_a_state_is_any_text_map_or_list(gateway: GatewayProcess, state: Any) -> None:
    assert ask(gateway, state=state)[0] == 200


def test_assets_appear_where_they_are_named(gateway: GatewayProcess) -> None:
    with_image = ask(gateway, state="see img-1", assets={"img-1": ASSET})
    as_url = f"data:image/png;base64,{IMAGE}"
    same = ask(gateway, state="see img-1", assets={"img-1": {"data_base64": as_url}})
    assert with_image == same and with_image[0] == 200
    assert with_image[1]["answers"] != ask(gateway, state="see img-1")[1]["answers"]


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"questions": {}}, "questions", "at least one"),
        ({"questions": {f"q{i}": QUESTIONS["tone"] for i in range(65)}}, "questions", "at most 64"),
        ({"questions": {"a": {"type": "choice"}}}, "questions.a", "no allowed answers"),
        ({"questions": {"a": {"type": "score", "criteria": []}}}, "questions.a", "'a'"),
        ({"questions": {"a": {"type": "rank"}}}, "questions.a", "unknown type 'rank'"),
        ({"questions": {"a": {"instructions": "?"}}}, "questions.a", "'a' needs a type"),
        ({"questions": {"a": "?"}}, "questions.a", "'a' is a dict"),
        ({"questions": {"a": {"type": "noul", "x": 1}}}, "questions.a", "no field 'x'"),
        ({"questions": {"a": {"type": "noul", "instructions": 1}}}, "questions.a", "'a'"),
        ({"questions": ["a"]}, "questions", "object"),
        ({"state": 3}, "state", "state"),
        ({"state": None}, "state", "state"),
        ({"stream": True}, "stream", "not a field"),
        ({"model": ""}, "model", "model"),
        ({"state": "i", "assets": {"i": {"data_base64": "?"}}}, "assets.i.data_base64", "base64"),
        ({"state": "no image", "assets": {"img-1": ASSET}}, "assets", "'img-1' stands neither"),
        ({"state": "12345", "assets": dict.fromkeys("12345", ASSET)}, "assets", "length <= 4"),
        (
            {"state": "i", "assets": {"i": {"data_base64": "https://example.com/a.png"}}},
            "assets.i.data_base64",
            "base64",
        ),
    ],
)
def test_a_body_that_is_wrong_is_refused_in_both_shapes(
    gateway: GatewayProcess, body: dict[str, Any], param: str, word: str
) -> None:
    status, answer = ask(gateway, **body)
    assert status == 422
    error = answer["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_request"
    assert error["param"] == param and word in error["message"] and error["request_id"]
    [detail] = answer["detail"]
    assert detail["loc"] == ["body", *param.split(".")]
    assert detail["msg"] == error["message"] and detail["type"] == "value_error"


def test_a_refusal_by_the_bus_has_the_usual_error_format(gateway: GatewayProcess) -> None:
    status, answer = ask(gateway, model="nope")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert answer["error"]["param"] == "model" and "detail" not in answer


def test_the_models_say_that_they_decide(gateway: GatewayProcess) -> None:
    with gateway.http() as http:
        [model] = http.get("/v1/models").json()["data"]
    assert "decide" in model["kinds"]


def test_a_request_is_accounted_for(gateway: GatewayProcess) -> None:
    with gateway.http() as http:
        body = {"model": "echo", "state": "x", "questions": QUESTIONS}
        answer = http.post("/v1/systemone", json=body)
    assert answer.headers["x-bus-requests"]
    line = gateway.logged(answer.headers["x-request-id"], status=200, path="/v1/systemone")
    assert line["prompt"] == answer.json()["usage"]["input_tokens"]
