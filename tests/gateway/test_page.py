"""The web page in a real browser, headless: what a person does, and what the bus sees of it."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client import BusError
from tests.gateway.conftest import GatewayProcess
from tests.harness import PATIENCE_S, Bus, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


OpenPage = Callable[..., "sync_api.Page"]


@pytest.fixture
def open_page(browser: sync_api.Browser, gateway: GatewayProcess) -> Iterator[OpenPage]:
    """Opens the page; fails the test on any error that the page threw."""
    contexts, errors = [], []

    def make(url: str = gateway.url, wait: bool = True, **options: object) -> sync_api.Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        context.set_default_timeout(PATIENCE_S * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        if wait:
            page.locator("body[data-ready]").wait_for()
        return page

    yield make
    for context in contexts:
        context.close()
    assert errors == []


def ask(page: sync_api.Page, text: str) -> sync_api.Locator:
    """Send a message; returns the last answer."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    return page.locator(".message.assistant").last


def done(page: sync_api.Page, answers: int = 1) -> None:
    page.locator(".message.assistant .facts").nth(answers - 1).wait_for()


def test_a_person_chats_about_an_image(open_page: OpenPage, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    Image.new("RGB", (320, 200), "green").save(image)
    page = open_page()
    page.locator("#file").set_input_files(image)
    page.locator("#pictures img").wait_for()
    answer = ask(page, "What is this?")
    done(page)
    assert answer.locator(".body").inner_text() == "1 image: 320x200. What is this?"
    assert "tokens" in answer.locator(".facts").inner_text()
    # The conversation is still there after a reload, image included.
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.locator(".message").count() == 2
    assert page.locator(".sent-pictures img").count() == 1
    assert page.locator(".talk").inner_text() == "What is this?"


def test_a_newcomer_asks_about_the_image_that_is_there(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="What is in this image?").click()
    done(page)
    answer = page.locator(".message.assistant .body").last
    assert answer.inner_text() == "1 image: 240x240. What is in this image?"
    # Asking again is offered without a mouse over the answer, further questions below it or not.
    page.mouse.move(0, 0)
    again = page.get_by_role("button", name="Answer again")
    page.wait_for_function(
        "node => getComputedStyle(node).opacity === '1'", arg=again.element_handle()
    )
    # Further questions are at hand, each once, and the keyboard is back in the field.
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.locator(".further").get_by_role("button").first.click()
    done(page, 2)
    assert page.locator(".sent-pictures img").count() == 1
    assert page.locator(".further").count() == 0
    # A new conversation offers it anew, by key as well.
    page.locator("#new-talk").click()
    page.locator(".sample .idea").first.focus()
    page.keyboard.press("Enter")
    done(page)
    assert page.locator(".message").count() == 2


def test_a_link_to_a_new_conversation_is_that_once(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    page = open_page()
    ask(page, "hello")
    done(page)
    page.goto(f"{gateway.url}/page/icon.svg")
    page.goto(f"{gateway.url}/#new")
    page.locator("body[data-ready]").wait_for()
    assert page.locator(".message").count() == 0
    ask(page, "again")
    done(page)
    page.reload()
    page.locator(".message .bubble", has_text="again").wait_for()


def test_a_dropped_image_is_taken(open_page: OpenPage) -> None:
    page = open_page()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(buffer, "PNG")
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "a.png", { type: "image/png" });
            transfer.items.add(file);
            return transfer;
        }""",
        list(buffer.getvalue()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.locator("#pictures img").wait_for()


def test_stop_frees_the_slot_and_keeps_what_was_said(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    page = open_page()
    answer = ask(page, "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]go on and on")
    answer.locator(".body p:not(.waiting)").wait_for()
    assert gateway.bus.running() == 1
    page.locator("#stop").click()
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
    assert "stopped" in answer.locator(".facts").inner_text()
    assert answer.locator(".body").inner_text()
    assert page.locator("#send").is_visible()


def test_escape_stops_as_well_and_leaving_the_page_cancels(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    page = open_page()
    slow = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
    ask(page, slow).locator(".body p:not(.waiting)").wait_for()
    page.keyboard.press("Escape")
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
    done(page)
    ask(page, slow).locator(".body p:not(.waiting)").wait_for()
    page.goto("about:blank")
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_an_answer_goes_on_after_the_gateway_was_away(
    open_page: OpenPage, make_gateway: Callable[..., GatewayProcess]
) -> None:
    gateway = make_gateway()
    page = open_page(gateway.url)
    slow = "[[echo mode=sampled answer_tokens=200 step_delay_ms=25]]x"
    page.locator("#open-settings").click()
    page.locator("#settings summary").click()
    page.locator("#s-seed").fill("7")
    page.locator("#settings .primary").click()
    answer = ask(page, slow)
    answer.locator(".body p:not(.waiting)").wait_for()
    gateway.process.kill()
    answer.locator(".waiting", has_text="Connection lost").wait_for()
    make_gateway("--port", gateway.url.rpartition(":")[2])
    done(page)
    quick = slow.replace(" step_delay_ms=25", "")
    whole = gateway.bus.client().chat("echo", quick, seed=7)
    assert answer.locator(".body").inner_text().strip() == whole.text.strip()


def test_editing_and_asking_again_cut_the_conversation(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "first")
    done(page)
    ask(page, "second")
    done(page, 2)
    first = page.locator(".message.user").first
    first.hover()
    first.get_by_label("Edit and ask again").click()
    first.locator("textarea").fill("changed")
    first.get_by_text("Ask again").click()
    page.locator(".message.assistant .body", has_text="changed").wait_for()
    done(page)
    assert page.locator(".message").count() == 2
    page.get_by_label("Answer again").click()
    done(page)
    assert page.locator(".message").count() == 2


def test_what_a_model_writes_never_runs(open_page: OpenPage) -> None:
    page = open_page()
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> "
        "[click](javascript:document.title='owned') **bold** `code`\n\n"
        "| a | b |\n|---|---|\n| <b>1</b> | 2 |\n\n```html\n<script>1</script>\n```\n- one\n- two"
    )
    answer = ask(page, "x")
    done(page)
    page.locator("#prompt").fill(hostile)
    page.locator("#send").click()
    done(page, 2)
    answer = page.locator(".message.assistant").last
    assert page.title() == "tokenbus"
    assert answer.locator("img, script, b, a").count() == 0
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("td").first.inner_text() == "<b>1</b>"
    assert answer.locator("pre").inner_text() == "<script>1</script>"
    assert answer.locator("li").count() == 2


def test_a_thought_is_folded_with_its_time_and_comes_back_in_the_history(
    open_page: OpenPage,
) -> None:
    page = open_page()
    posted: list[dict[str, Any]] = []
    page.on("request", lambda sent: posted.append(sent.post_data_json) if sent.post_data else None)
    answer = ask(page, "<think>hm, <b>two</b></think>three")
    done(page)
    assert answer.locator(".body").inner_text() == "three"
    thought = answer.locator(".thought")
    assert re.fullmatch(
        r"Thought for \d+\.\d s · \d+ tokens", thought.locator("summary").inner_text()
    )
    assert not thought.locator(".thought-text").is_visible()
    thought.locator("summary").click()
    assert thought.locator(".thought-text").inner_text() == "hm, <b>two</b>"
    ask(page, "sure?")
    done(page, 2)
    assert posted[-1]["messages"][1] == {
        "role": "assistant",
        "content": "three",
        "reasoning_content": "hm, <b>two</b>",
    }
    page.reload()
    page.locator("body[data-ready]").wait_for()
    summary = page.locator(".thought summary")
    assert summary.count() == 1 and summary.inner_text().startswith("Thought for ")


def test_a_thought_that_is_read_stays_open_while_it_goes_on(open_page: OpenPage) -> None:
    page = open_page()
    slow = "[[echo mode=sampled think_tokens=3000 answer_tokens=3 step_delay_ms=20]]x"
    answer = ask(page, slow)
    summary = answer.locator(".thought summary", has_text="Thinking, ")
    summary.focus()
    page.keyboard.press("Enter")
    read = answer.locator(".thought-text")
    shown = read.inner_text()
    page.wait_for_function(
        "([node, shown]) => node.textContent.length > shown.length + 20",
        arg=[read.element_handle(), shown],
    )
    assert read.is_visible()
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert answer.locator(".waiting").count() == 0
    page.keyboard.press("Escape")
    done(page)
    assert answer.locator(".thought summary").inner_text().startswith("Thought for ")
    assert read.is_visible() and answer.locator(".body").inner_text() == ""


def test_settings_travel_with_the_request(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#open-settings").click()
    page.locator("#s-max_tokens").fill("3")
    page.locator("#settings .primary").click()
    answer = ask(page, "a much longer sentence than three tokens")
    done(page)
    assert "3 tokens" in answer.locator(".facts").inner_text()
    assert "longest answer" in answer.locator(".facts").inner_text()


def test_an_error_is_shown_in_words(open_page: OpenPage) -> None:
    page = open_page()
    answer = ask(page, "[[echo error_at=0]]x")
    answer.locator(".problem").wait_for()
    assert "as requested" in answer.locator(".problem").inner_text()


def test_the_operator_sees_a_request_and_its_freed_slot(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    page = open_page(f"{gateway.url}/#bus")
    page.locator("#workers tbody tr").nth(1).wait_for()
    used = page.locator(".card .figure").first
    page.locator(".figure", has_text="0 of 16").wait_for()
    client = gateway.bus.client()
    stream = client.chat(
        "echo", "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x", stream=True
    )
    events = iter(stream)
    next(events)
    page.locator(".figure", has_text="1 of 16").wait_for()
    page.locator(".lanes .bar-run").wait_for()
    stream.close()
    page.locator(".figure", has_text="0 of 16").wait_for()
    assert used.inner_text().startswith("0")
    client.close()


def test_a_stop_in_the_browser_is_a_freed_slot_in_the_operators_view(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    chat, bus = open_page(), open_page(f"{gateway.url}/#bus")
    bus.locator(".figure", has_text="0 of 16").wait_for()
    answer = ask(chat, "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x")
    answer.locator(".body p:not(.waiting)").wait_for()
    bus.locator(".figure", has_text="1 of 16").wait_for()
    chat.locator("#stop").click()
    bus.locator(".figure", has_text="0 of 16").wait_for()
    assert "stopped" in answer.locator(".facts").inner_text()
    bus.locator("#timeline summary, details summary", has_text="As a table").click()
    latest = bus.locator("#requests tbody tr").first
    latest.locator(".chip", has_text="cancelled").wait_for()


def test_the_operator_sees_why_requests_failed_whoever_asked(
    open_page: OpenPage, gateway: GatewayProcess
) -> None:
    page = open_page()
    ask(page, "[[echo error_at=0]]x").locator(".problem").wait_for()
    with pytest.raises(BusError):
        gateway.bus.client().chat("echo", "[[echo oom_at=0]]x")
    page.locator("#tab-bus").click()
    listed = page.locator("#errors li")
    listed.filter(has_text="engine_error").filter(has_text="as requested").first.wait_for()
    listed.filter(has_text="out_of_memory").filter(has_text="as requested").first.wait_for()
    # Shown once, though both the gateway and the broker know of it.
    with gateway.http() as http:
        look = http.get("/bus/overview").json()
    answered = look["gateway"]["errors"][-1]["request"]
    assert listed.filter(has_text=answered).count() == 1


def test_an_operator_drains_a_worker(
    open_page: OpenPage, make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=2)
    gateway = make_gateway(bus=own)
    page = open_page(f"{gateway.url}/#bus")
    page.locator('button[data-worker="w1"]').click()
    page.locator("#confirm-yes").click()
    wait_until(lambda: not own.workers["w1"].running, "the drained worker's end")
    page.locator("#workers-note", has_text="1 on this broker").wait_for()


def test_a_worker_that_does_not_batch_says_why(
    open_page: OpenPage, make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    gateway = make_gateway(bus=make_bus(serial="layers of type recurrent"))
    page = open_page(f"{gateway.url}/#bus")
    why = "echo runs one request at a time: layers of type recurrent"
    page.locator("#workers", has_text=why).wait_for()


def test_a_key_is_asked_for_where_one_is_needed(
    open_page: OpenPage, make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    from client.gateway.keys import add_key

    file = tmp_path / "keys.toml"
    key = add_key(file, "alice")
    gateway = make_gateway("--keys", str(file))
    page = open_page(gateway.url, wait=False)
    page.locator("#key-dialog[open]").wait_for()
    page.locator("#key").fill(key)
    page.locator("#key-dialog .primary").click()
    page.locator("#model option", has_text="echo").wait_for(state="attached")
    ask(page, "hello")
    done(page)
    # Not an operator's key.
    assert page.locator("#tab-bus").is_hidden()


def test_the_page_shows_what_keys_have_used(
    open_page: OpenPage, make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    from client.gateway.keys import add_key

    file = tmp_path / "keys.toml"
    key = add_key(file, "alice", operator=True, tokens_per_day=5000)
    gateway = make_gateway("--keys", str(file), "--usage", str(tmp_path / "usage.db"))
    page = open_page(gateway.url, wait=False)
    page.locator("#key").fill(key)
    page.locator("#key-dialog .primary").click()
    page.locator("#model option", has_text="echo").wait_for(state="attached")
    ask(page, "hello")
    done(page)
    page.locator("#open-key").click()
    told = page.locator("#key-usage", has_text="of 5,000 tokens this day")
    told.wait_for()
    assert told.inner_text().startswith("alice has used 17 of 5,000")
    page.locator("#key-dialog .primary").click()
    page.locator("#tab-bus").click()
    page.locator("#usage td", has_text="alice").wait_for()
    assert "17" in page.locator("#usage tbody").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 800), (375, 667)])
def test_the_first_minute_at_any_size_and_in_the_dark(
    open_page: OpenPage, size: tuple[int, int], scheme: str
) -> None:
    """Open, press a question about the image, read; then ask in one's own words."""
    width, height = size
    page = open_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.get_by_role("button", name="What is in this image?").click()
    done(page)
    answer = page.locator(".message.assistant .body").last
    assert answer.inner_text() == "1 image: 240x240. What is in this image?"
    page.locator("#prompt").fill("And now?")
    page.get_by_role("button", name="Send").click()
    done(page, 2)
    assert answer.is_visible() and page.locator("#prompt").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shades = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
                 getComputedStyle(document.querySelector(".message.assistant .body")).color]
                 .map(colour => colour.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"""
    )
    ground, ink = shades
    assert abs(ground - ink) > 380  # of 765: text that can be read
    assert (ground < ink) == (scheme == "dark")


def test_a_phone_shows_everything_without_scrolling_sideways(open_page: OpenPage) -> None:
    page = open_page(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme="dark"
    )
    page.locator("#prompt").fill("`a` " * 60 + "\n\n```\n" + "x" * 300 + "\n```")
    page.locator("#send").tap()
    done(page)
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(wide)
    page.locator("#open-talks").tap()
    page.locator(".talk").tap()
    page.locator("#tab-bus").tap()
    page.locator("#workers tbody tr").nth(1).wait_for()
    assert not page.evaluate(wide)


def test_on_a_phone_enter_begins_a_line_and_the_button_sends(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    field = page.locator("#prompt")
    field.tap()
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    assert field.input_value() == "one\ntwo"
    assert field.evaluate("node => node.enterKeyHint") == "enter", "what the key says that it does"
    page.get_by_role("button", name="Send").tap()
    done(page)
    assert page.locator(".message.user .bubble").inner_text() == "one\ntwo"
    # A keyboard that is attached has another key for it.
    field.fill("by key")
    field.press("Control+Enter")
    done(page, 2)
    assert open_page().locator("#prompt").evaluate("node => node.enterKeyHint") == "send"


def test_everything_is_reached_by_the_keyboard_and_has_a_name(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-bus"
    page.keyboard.press("ArrowLeft")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")].filter((node) =>
            !(node.textContent.trim() || node.getAttribute("aria-label") || node.labels?.length)
        ).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    page.locator("#prompt").focus()
    page.keyboard.type("by key")
    page.keyboard.press("Enter")
    done(page)
