"""The delay for wrong keys grows, separately for each source, and is forgotten over time."""

from __future__ import annotations

import pytest

from broker.protocol import refusals
from broker.protocol.refusals import WrongKeys


def test_each_further_wrong_key_from_an_address_doubles_the_delay_up_to_a_limit() -> None:
    wrong = WrongKeys(8.0)
    assert [wrong.wait_s("1.2.3.4", 0.0) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert wrong.wait_s("1.2.3.5", 0.0) == 1.0, "another address"


def test_a_quiet_minute_halves_the_delay_and_several_remove_it() -> None:
    wrong = WrongKeys(8.0)
    for _ in range(4):
        wrong.wait_s("1.2.3.4", 0.0)
    assert wrong.wait_s("1.2.3.4", 60.0) == 8.0
    assert wrong.wait_s("1.2.3.4", 180.0) == 4.0
    assert wrong.wait_s("1.2.3.4", 1e6) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:1.2.3.4", "1.2.3.4", True),
        ("::ffff:1.2.3.4", "1.2.3.5", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),  # a socket file
    ],
)
def test_all_ipv6_addresses_of_a_network_count_as_one_source(
    first: str, second: str, same: bool
) -> None:
    wrong = WrongKeys(8.0)
    wrong.wait_s(first, 0.0)
    assert wrong.wait_s(second, 0.0) == (2.0 if same else 1.0)


def test_addresses_beyond_the_limit_replace_the_one_seen_longest_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "MAX_SOURCES", 3)
    wrong = WrongKeys(8.0)
    for address in ("a", "b", "c", "a", "d"):
        wrong.wait_s(address, 0.0)
        assert len(wrong) <= 3
    assert wrong.wait_s("a", 0.0) == 4.0
    assert wrong.wait_s("b", 0.0) == 1.0
