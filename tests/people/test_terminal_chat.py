"""A person at a terminal: one conversation from its start to its end, mistakes and all."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.harness import Bus, wait_until
from tests.wire.test_client_cli import ENDLESS, Person


def test_a_conversation_at_a_terminal(bus: Bus, tmp_path: Path) -> None:
    image = tmp_path / "my picture.png"
    Image.new("RGB", (5, 4), "red").save(image)
    talk = Person("chat", "--broker", bus.front)
    prompts = 0

    def says(text: str) -> None:
        nonlocal prompts
        prompts += 1
        talk.sees("you> ", times=prompts)
        talk.types(text)

    talk.sees("talking to echo")

    # A file that is no image is refused at once, and costs nothing.
    says("/image README.md\n")
    talk.sees("README.md is not an image")
    says("first\n")
    talk.sees("first", times=2)  # typed, and answered

    # An image as a terminal drops it; taken back; added again, and asked about.
    says(f"/image '{image}'\n")
    talk.sees("image 1 of the next question")
    says("/undo\n")
    says("without\n")
    talk.sees("without", times=2)
    says(f"/image {str(image).replace(' ', chr(92) + ' ')}\n")
    talk.sees("image 1 of the next question", times=2)
    says("look\n")
    talk.sees("1 image: 5x4. look")

    # Parameters and models are checked where they are set.
    says("/set temprature 0\n")
    talk.sees("did you mean temperature")
    says("/set stop X\n")
    says("abXcd\n")
    talk.sees("1 image: 5x4. ab\r")  # the image is part of the conversation
    says("/model ecko\n")
    talk.sees("no worker serves 'ecko'; models served: echo")
    says("/model echo\n")

    # Ctrl-C stops an answer, and the conversation goes on.
    says(ENDLESS + "\n")
    wait_until(lambda: bus.running() == 1, "the answer runs", story=lambda: talk.screen)
    talk.types("\x03")
    talk.sees("(stopped)")
    bus.wait_idle()

    # Nothing is left of it after /reset; Ctrl-D leaves.
    says("/reset\n")
    says("/regen\n")
    talk.sees("no question")
    says("\x04")
    assert talk.leaves() == 0
    assert "Traceback" not in talk.screen
