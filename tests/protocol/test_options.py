"""Every party reads options alike: no abbreviations, and misspellings are reported."""

from __future__ import annotations

import argparse

import pytest

from broker.protocol.options import OptionParser, count, misspelt, number, parse_bool


@pytest.mark.parametrize("text", ["1", "true", "Yes", " on "])
def test_a_switch_is_on(text: str) -> None:
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "false", "NO", "off", ""])
def test_a_switch_is_off(text: str) -> None:
    assert parse_bool(text) is False


def test_any_other_word_is_refused_as_a_switch() -> None:
    with pytest.raises(ValueError, match="'maybe' is neither true nor false"):
        parse_bool("maybe")


def test_a_count_is_an_integer_of_1_or_more() -> None:
    assert count("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be 1 or more, got "):
            count(text)


def test_a_word_instead_of_a_number_is_refused() -> None:
    assert number("1e3") == 1000
    assert not number("many") <= 1 and not number("many") > 1


def test_the_error_for_a_misspelled_variable_names_the_nearest_one() -> None:
    environment = {"TOKENBUS_BACKK": "x", "TOKENBUS_BACK": "x", "PATH": "/bin"}
    (line,) = misspelt(environment, ["TOKENBUS_BACK", "TOKENBUS_FRONT"])
    assert line == "TOKENBUS_BACKK is set but is not an option; did you mean TOKENBUS_BACK?"


def test_each_party_checks_only_its_own_variables() -> None:
    environment = {"TOKENBUS_WORKER_MODEL": "x", "TOKENBUS_GATEWAY_PORTT": "1", "TOKENBUS_X": "x"}
    (broker,) = misspelt(environment, ["TOKENBUS_FRONT"])
    assert broker.startswith("TOKENBUS_X ")
    assert misspelt(environment, ["TOKENBUS_WORKER_MODEL"], "TOKENBUS_WORKER_") == []
    (gateway,) = misspelt(environment, ["TOKENBUS_GATEWAY_PORT"], "TOKENBUS_GATEWAY_")
    assert "did you mean TOKENBUS_GATEWAY_PORT?" in gateway


def test_variables_that_kubernetes_sets_for_a_service_are_ignored() -> None:
    environment = {
        "TOKENBUS_SERVICE_HOST": "10.0.0.1",
        "TOKENBUS_SERVICE_PORT_FRONT": "5555",
        "TOKENBUS_PORT": "tcp://10.0.0.1:5555",
        "TOKENBUS_PORT_5555_TCP_ADDR": "10.0.0.1",
    }
    assert misspelt(environment, ["TOKENBUS_FRONT"]) == []


class Wrong(Exception):
    pass


def parser() -> OptionParser:
    made = OptionParser(raises=Wrong, replaced={"--num-gpus": "choose them with --gpus"})
    made.add_argument("--gpus")
    made.add_argument("--prompt-logprobs")
    return made


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(Wrong) as caught:
        parser().parse_args(["--num-gpus", "2", "--gpsu=1", "--colour", "red"])
    assert str(caught.value).splitlines() == [
        "--num-gpus: choose them with --gpus",
        "there is no option --gpsu; did you mean --gpus?",
        "there is no option --colour; --help lists all options",
    ]


def test_wrong_values_are_reported_together_with_wrong_names() -> None:
    made = parser()
    made.add_argument("--slots", type=int)
    made.add_argument("--device", choices=["cpu", "cuda"])
    words = ["--slots", "many", "--device=gpu", "--num-gpus", "2", "--slots=few"]
    with pytest.raises(Wrong) as caught:
        made.parse_args(words)
    gpus, slots, device, again = str(caught.value).splitlines()
    assert "choose them with --gpus" in gpus
    assert "'many'" in slots and "'gpu'" in device and "'few'" in again
    # Nothing remains for the next command line.
    assert made.parse_args(["--slots", "3"]).slots == 3


def test_a_wrong_value_of_a_subcommand_is_reported_too() -> None:
    made = parser()
    made.add_subparsers().add_parser("ask").add_argument("--seed", type=int)
    with pytest.raises(Wrong) as caught:
        made.parse_args(["ask", "--seed", "x", "--colour"])
    assert len(str(caught.value).splitlines()) == 2 and "'x'" in str(caught.value)


def test_the_nearest_command_is_named() -> None:
    made = parser()
    commands = made.add_subparsers()
    for name in ("generate", "embed"):
        commands.add_parser(name)
    with pytest.raises(Wrong, match=r"no command 'gnerate'; did you mean generate\?"):
        made.parse_args(["gnerate"])
    with pytest.raises(Wrong, match=r"no command 'xyz'; there are generate, embed"):
        made.parse_args(["xyz"])


def test_dashes_alone_do_not_make_options_similar() -> None:
    made = parser()
    made.add_argument("--stop")
    with pytest.raises(Wrong, match="no option --tmp; --help"):
        made.parse_args(["--tmp", "1"])


def test_an_abbreviation_is_not_an_option() -> None:
    with pytest.raises(Wrong, match="did you mean --prompt-logprobs"):
        parser().parse_args(["--prompt-logprob", "3"])


def test_a_commands_own_options_are_known() -> None:
    made = parser()
    made.add_subparsers().add_parser("ask").add_argument("--temperature")
    with pytest.raises(Wrong, match="did you mean --temperature"):
        made.parse_args(["ask", "--temprature", "1"])


def test_by_default_a_wrong_option_exits_with_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        OptionParser().parse_args(["--colour"])
    assert caught.value.code == 2
    assert isinstance(OptionParser(), argparse.ArgumentParser)


def test_only_options_of_the_given_command_are_suggested() -> None:
    parser = OptionParser(raises=ValueError)
    commands = parser.add_subparsers()
    commands.add_parser("embed").add_argument("--model")
    commands.add_parser("bench").add_argument("--prompt-words")
    with pytest.raises(ValueError, match="no option --prompt; --help lists"):
        parser.parse_args(["embed", "--prompt", "3"])
    with pytest.raises(ValueError, match="did you mean --prompt-words"):
        parser.parse_args(["bench", "--prompt", "3"])
