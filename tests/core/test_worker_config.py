"""The worker's options: old spellings, environment, names from paths, clear errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from worker import config
from worker.config import ConfigError, WorkerConfig, parse
from worker.demo import caller, model_path
from worker.engines.base import EngineOptions
from worker.engines.registry import announced
from worker.naming import name_from_path, pair_names
from worker.replaced import REPLACED


def given(*arguments: str, **environment: str) -> WorkerConfig:
    """The configuration from these arguments and TOKENBUS_WORKER_ variables."""
    return parse(arguments, {f"TOKENBUS_WORKER_{key}": value for key, value in environment.items()})


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("liuhaotian/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/data/tuned/checkpoint-400", "tuned_checkpoint-400"),
        ("/data/tuned/checkpoint-400/", "tuned_checkpoint-400"),
        ("checkpoint-400", "checkpoint-400"),
        ("model", "model"),
    ],
)
def test_the_name_is_the_last_part_of_the_path_and_a_checkpoint_includes_its_parent(
    path: str, name: str
) -> None:
    assert name_from_path(path) == name


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no model name"):
        name_from_path("/")


@pytest.mark.parametrize(
    ("paths", "names", "groups"),
    [
        (["a/x"], [], (("x",),)),
        (["a/x"], ["one,two"], (("one", "two"),)),
        (["a/x"], ["one", "two"], (("one", "two"),)),
        (["a/x", "b/y"], [], (("x",), ("y",))),
        (["a/x,b/y"], ["one,two"], (("one",), ("two",))),
        (["a/x", "b/y"], ["one,uno", "two"], (("one", "uno"), ("two",))),
    ],
)
def test_names_are_assigned_to_their_models(
    paths: list[str], names: list[str], groups: tuple[tuple[str, ...], ...]
) -> None:
    assert pair_names(paths, names)[1] == groups


@pytest.mark.parametrize(
    ("paths", "names", "words"),
    [
        (["a/x", "b/x"], [], "two models would be served as 'x'"),
        (["a/x", "b/y"], ["one"], "give one for each model"),
        (["a/x"], ["n" * 300], "longer than 256 bytes"),
    ],
)
def test_names_that_do_not_fit_are_refused(paths: list[str], names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair_names(paths, names)


# --- options --------------------------------------------------------------------------------------


def test_without_any_option_the_demo_model_is_served_on_this_machine() -> None:
    config = given()
    assert config.brokers == ("tcp://127.0.0.1:5556",)
    assert config.engine.engine == "transformers"
    assert config.engine.model_paths == (str(model_path()),)
    assert config.engine.model_names == (("demo",),)
    assert (config.grace_s, config.drain_s, config.engine_stall_s) == (30.0, 30.0, 120.0)
    assert config.worker_id != given().worker_id


def test_bundled_models_are_named_instead_of_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    both = given("--model-path", "demo,demo-tools").engine
    assert both.model_paths == (str(model_path()), str(caller.model_path()))
    assert both.model_names == (("demo",), ("demo-tools",))
    (tmp_path / "demo-tools").mkdir()
    assert given("--model-path", "demo-tools").engine.model_paths == ("demo-tools",)


def test_the_echo_engine_needs_no_model_and_is_served_under_its_own_name() -> None:
    assert given("--engine", "echo").engine.model_names == (("echo",),)
    assert given("--engine", "echo", "--model-name", "m,n").engine.model_names == (("m", "n"),)


@pytest.mark.parametrize("engine", ["vllm", "mlx", "llamacpp", "sglang"])
def test_engines_over_other_libraries_need_a_model(engine: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine {engine} needs --model-path"):
        given("--engine", engine, "--model-name", "m")
    assert given("--engine", engine, "--model", "a/x").engine.model_paths == ("a/x",)


@pytest.mark.parametrize(
    "spelling", ["--limit-model-concurrency", "--limit-worker-concurrency", "--slots", "--limit"]
)
def test_all_spellings_of_slots_are_accepted(spelling: str) -> None:
    assert given(spelling, "5").engine.slots == 5


def test_old_spellings_of_model_and_controller_are_accepted() -> None:
    config = given("--model", "a/x,b/y", "--model-names", "one,two", "--controller", "tcp://h:1")
    assert config.engine.model_paths == ("a/x", "b/y")
    assert config.engine.model_names == (("one",), ("two",))
    assert config.brokers == ("tcp://h:1",)


def test_the_environment_sets_options_without_a_flag() -> None:
    config = given(
        "--device",
        "cpu",
        DEVICE="cuda",
        SLOTS="7",
        LOAD_8BIT="1",
        BROKER="tcp://a:1,ipc:///x",
        ENGINE_ARG="block=4,fast=yes",
        MODEL="a/x",
    )
    assert (config.engine.device, config.engine.slots, config.engine.load_8bit) == ("cpu", 7, True)
    assert config.brokers == ("tcp://a:1", "ipc:///x")
    assert config.engine.engine_args == {"block": "4", "fast": "yes"}
    assert config.engine.model_names == (("x",),)


def test_a_broker_named_twice_is_one_broker() -> None:
    assert given("--broker", "tcp://a:1", "--broker", "tcp://a:1,tcp://b:1").brokers == (
        "tcp://a:1",
        "tcp://b:1",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--broker", "http://localhost:21001"], "is a web address"),
        (["--broker", "localhost:5556"], "use tcp://HOST:PORT"),
        (["--broker", "tcp://localhost:0"], "use tcp://HOST:PORT"),
        (["--load-8bit", "--load-4bit"], "exclude each other"),
        (["--engine", "echo", "--draft-model", "x"], "only --engine transformers"),
        (["--engine-arg", "fast"], "KEY=VALUE"),
        (["--slots", "0"], "must be 1 or more"),
        (["--slots", "many"], "must be 1 or more, got 'many'"),
        (["--speed", "fast"], "fast is not a positive number"),
        (["--drain-s", "long"], "long is not a number of seconds"),
        (["--speed", "-1"], "positive"),
        (["--dtype", "int3"], "one of auto, float32"),
        (["--key", "k"], "go together"),
        (["--worker-id", "x" * 300], "256 bytes"),
        (["--worker-id", "\udcff"], "--worker-id: .* is not UTF-8"),
        (["--model-name", "\udcff"], "surrogates not allowed"),
        (["--slots", "65537"], "must be 65536 or less"),
        (["--speed", "1e10"], "1e10 is not a positive number up to 1000000000"),
        (["--drain-s", "1e300"], "1e300 is not a number of seconds"),
        (["--grace-s", "inf"], "inf is not a number of seconds"),
        (["--ends-in", "9" * 400], "not a duration"),
        (["--ends-in", "9" * 400 + ":00"], "not a duration"),
        (["--port", "40000"], "does not listen"),
        (["--worker", "http://localhost:40000"], "does not listen"),
        (["--nosuch"], "there is no option --nosuch"),
    ],
)
def test_the_error_for_a_wrong_option_says_what_is_wrong(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        given(*arguments)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="TOKENBUS_WORKER_SLOTS=many: must be 1 or more"):
        given(SLOTS="many")
    with pytest.raises(ConfigError, match="TOKENBUS_WORKER_LOAD_4BIT: 'perhaps' is neither"):
        given(LOAD_4BIT="perhaps")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--help")
    text = capsys.readouterr().out
    for option in ("--model-path", "--broker", "--no-register", "--engine-arg", "TOKENBUS_WORKER_"):
        assert option in text


def test_every_option_of_the_replaced_workers_is_known_by_name() -> None:
    parser = config.parser()
    known = {option for action in parser._actions for option in action.option_strings}
    replaced_workers = re.findall(
        r"--[a-z0-9-]+",
        """
        --host --port --worker-address --controller-address --model-path --model-base --model-name
        --model-names --device --limit-worker-concurrency --limit-model-concurrency
        --stream-interval --no-register --load-8bit --load-4bit --use-flash-attn --multi-modal
        --model-type --quant-path --precision --revision --dtype --gpus --num-gpus
        --max-gpu-memory --cpu-offloading --gptq-ckpt --gptq-wbits --gptq-groupsize
        --gptq-act-order --awq-ckpt --awq-wbits --awq-groupsize --enable-exllama
        --exllama-max-seq-len --exllama-gpu-split --exllama-cache-8bit --enable-xft
        --xft-max-seq-len --xft-dtype --embed-in-truncate --seed --debug --ssl
        """,
    )
    assert [name for name in replaced_workers if name not in known | REPLACED.keys()] == []


def test_several_wrong_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        given("--num-gpus", "2", "--awq-ckpt=x", "--modle-path", "y")
    gpus, awq, misspelt = str(caught.value).splitlines()
    assert "--gpus" in gpus and "config.json" in awq and "did you mean --model-path" in misspelt


def test_gpus_are_what_the_engine_sees() -> None:
    assert given("--gpus", "0,2").gpus == "0,2"


def test_a_misspelled_variable_is_named() -> None:
    (line,) = given(MODEL_PAHT="x").misspelt
    assert "did you mean TOKENBUS_WORKER_MODEL_PATH?" in line


def test_a_loading_worker_announces_its_adapters_too_so_that_requests_wait_for_them() -> None:
    options = EngineOptions(
        model_names=(("base", "also"), ("second",)),
        engine_args={"adapters": "tuned=/a,french=/b=c"},
    )
    assert announced(options) == ("base", "also", "second", "tuned", "french")
    assert announced(replace(options, engine="echo")) == ("base", "also", "second")
    broken = replace(options, engine_args={"adapters": "tuned"})
    assert announced(broken) == ("base", "also", "second"), "the engine says what is wrong"
