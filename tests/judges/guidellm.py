"""`guidellm` loads the gateway by each of its request formats, with the demo model's tokenizer."""

from __future__ import annotations

import json

from tests.judges.stage import Stage, environment, run
from worker.demo import model_path

PACKAGES = ("guidellm==0.8.1",)
REQUESTS = 20
TOKENS = 16
FORMATS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def judge(stage: Stage) -> None:
    """Raises AssertionError where a request failed or a token was miscounted."""
    python = environment("guidellm", PACKAGES)
    for request_format in FORMATS:
        report = stage.folder / "guidellm.json"
        backend = f"kind=openai_http,target={stage.url},model=demo,request_format={request_format}"
        run(
            stage,
            *(python.parent / "guidellm", "run", "--disable-console-interactive"),
            *("--backend", backend, "--tokenizer", f"kind=hf_auto,model={model_path()}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"),
            *("--profile", "kind=concurrent,streams=4"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--output", f"kind=json,path={report}"),
        )
        [benchmark] = json.loads(report.read_text())["benchmarks"]
        requests = benchmark["requests"]
        assert not requests["errored"], requests["errored"][0]["info"]["error"]
        good = requests["successful"]
        assert len(good) == REQUESTS, len(good)
        for request in good:
            assert request["prompt_tokens"] > 0 and request["output_tokens"] == TOKENS, request
