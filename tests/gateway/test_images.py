"""Pictures: data URLs, and remote addresses that never lead into a private network."""

from __future__ import annotations

import asyncio
import base64
import http.server
import ipaddress
import threading
from collections.abc import Iterator

import pytest

from client.gateway.errors import GatewayError
from client.gateway.images import ImagePolicy, load_image, public_address

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


def load(url: str, **policy: object) -> bytes:
    return asyncio.run(load_image(url, ImagePolicy(**policy), "url"))


def refusal(url: str, **policy: object) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        load(url, **policy)
    assert caught.value.param == "url"
    return caught.value


def test_a_data_url_is_its_octets() -> None:
    assert load("data:image/png;base64," + base64.b64encode(b"abc").decode()) == b"abc"
    assert load("data:image/jpeg;name=x;BASE64,YW\nJj") == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:text/html;base64,YWJj",
        "data:image/png;base64,@@@",
        "data:image/png;base64,",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a.png",
        "http://example.com/a.png",
    ],
)
def test_anything_else_is_refused_by_name(url: str) -> None:
    assert refusal(url).info.code == "invalid_request"


def test_a_picture_beyond_the_limit_is_refused() -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(101)).decode()
    assert refusal(url, max_bytes=100).info.code == "too_large"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_are_known_as_such(address: str) -> None:
    assert not public_address(ipaddress.ip_address(address))


def test_public_addresses_are_known_as_such() -> None:
    assert public_address(ipaddress.ip_address("8.8.8.8"))
    assert public_address(ipaddress.ip_address("2606:4700:4700::1111"))


class _Pictures(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("location", "/picture")
            self.end_headers()
        elif self.path == "/inward":
            self.send_response(302)
            self.send_header("location", "http://[::1]/picture")
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("location", "/loop")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(65536))
            except OSError:
                pass
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"octets")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[str]:
    """A web server on this machine; its address."""
    _Pictures.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_remote_picture_is_fetched_through_redirects(pictures: str) -> None:
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK}
    assert load(f"{pictures}/picture", **allowed) == b"octets"
    assert load(f"{pictures}/redirect", **allowed) == b"octets"


def test_a_private_address_is_never_asked(pictures: str) -> None:
    assert "public internet" in str(refusal(f"{pictures}/picture", allow_remote=True))
    port = pictures.rpartition(":")[2]
    assert "public internet" in str(refusal(f"http://localhost:{port}/x", allow_remote=True))
    assert _Pictures.asked == []


def test_a_redirect_into_another_network_is_checked_again(pictures: str) -> None:
    error = refusal(f"{pictures}/inward", allow_remote=True, allowed_networks=LOOPBACK)
    assert "public internet" in str(error)
    assert _Pictures.asked == ["/inward"]


def test_loops_misses_and_endless_pictures_are_told_apart(pictures: str) -> None:
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK}
    assert "redirects" in str(refusal(f"{pictures}/loop", **allowed))
    assert "404" in str(refusal(f"{pictures}/missing", **allowed))
    assert refusal(f"{pictures}/endless", **allowed, max_bytes=200_000).info.code == "too_large"
