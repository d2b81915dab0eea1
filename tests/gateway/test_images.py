"""Images: data URLs, and remote addresses that never lead into a private network."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import ipaddress
import socket
import threading
from collections.abc import Iterator

import pytest

from client.gateway.addresses import public_address
from client.gateway.errors import GatewayError
from client.gateway.images import ImagePolicy, load_image
from tests.harness import PATIENCE_S

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


def load(url: str, **policy: object) -> bytes:
    return asyncio.run(load_image(url, ImagePolicy(**policy), "url"))


def refusal(url: str, **policy: object) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        load(url, **policy)
    assert caught.value.param == "url"
    return caught.value


def test_a_data_url_is_its_bytes() -> None:
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


def test_an_image_beyond_the_limit_is_refused() -> None:
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
        # One of every block in IANA's special registries.
        "192.0.0.8",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "64:ff9b:1::1",
        "100::1",
        "100:0:0:1::1",
        "2001::1",
        "2001:1::1",
        "2001:2::1",
        "2001:3::1",
        "2001:4:112::1",
        "2001:10::1",
        "2001:20::1",
        "2001:30::1",
        "2001:db8::1",
        "2620:4f:8000::1",
        "3fff::1",
        "5f00::1",
        "fec0::1",
        "ff02::1",
        # An IPv4 address within an IPv6 one: a translator decides where it leads.
        "::8.8.8.8",
        "::ffff:8.8.8.8",
        "::ffff:10.0.0.1",
        "64:ff9b::808:808",
        "64:ff9b::a00:1",
        "2002:808:808::1",
    ],
)
def test_private_addresses_are_recognised(address: str) -> None:
    assert not public_address(ipaddress.ip_address(address))


def test_public_addresses_are_recognised() -> None:
    for address in ("8.8.8.8", "192.0.1.1", "198.17.255.255", "223.255.255.255"):
        assert public_address(ipaddress.ip_address(address)), address
    for address in ("2606:4700:4700::1111", "2001:200::1", "2a00::1", "2003::1"):
        assert public_address(ipaddress.ip_address(address)), address


#: Where a host begins to trickle.
TRICKLES = {
    "/status": b"HTTP/1.1 20",
    "/header": b"HTTP/1.1 200 OK\r\nx: ",
    "/chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "/body": b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n",
}


class _Images(http.server.BaseHTTPRequestHandler):
    asked: list[str]
    #: Slow answers wait until this is set.
    released: threading.Event

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
        elif self.path.startswith("/silent"):
            self.released.wait(PATIENCE_S)
        elif self.path in TRICKLES:
            self.trickle(TRICKLES[self.path])
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
            self.wfile.write(b"bytes")

    def trickle(self, begun: bytes) -> None:
        """Send one byte at a time, each well within the time for a whole image."""
        with contextlib.suppress(OSError):
            self.wfile.write(begun)
            while not self.released.wait(0.02):
                self.wfile.write(b"0")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def images() -> Iterator[str]:
    """The address of a web server on this machine."""
    _Images.asked, _Images.released = [], threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Images) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        _Images.released.set()
        server.shutdown()
        thread.join()


def test_a_remote_image_is_fetched_through_redirects(images: str) -> None:
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK}
    assert load(f"{images}/picture", **allowed) == b"bytes"
    assert load(f"{images}/redirect", **allowed) == b"bytes"


def test_a_private_address_is_never_contacted(images: str) -> None:
    assert "public internet" in str(refusal(f"{images}/picture", allow_remote=True))
    port = images.rpartition(":")[2]
    assert "public internet" in str(refusal(f"http://localhost:{port}/x", allow_remote=True))
    assert _Images.asked == []


def test_a_redirect_into_another_network_is_checked_again(images: str) -> None:
    error = refusal(f"{images}/inward", allow_remote=True, allowed_networks=LOOPBACK)
    assert "public internet" in str(error)
    assert _Images.asked == ["/inward"]


def test_redirect_loops_missing_and_endless_images_have_different_errors(images: str) -> None:
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK}
    assert "redirects" in str(refusal(f"{images}/loop", **allowed))
    assert "404" in str(refusal(f"{images}/missing", **allowed))
    assert refusal(f"{images}/endless", **allowed, max_bytes=200_000).info.code == "too_large"


@pytest.mark.parametrize("path", TRICKLES)
def test_a_trickling_host_times_out(images: str, path: str) -> None:
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK, "timeout_s": 0.2}
    assert "within 0.2 s" in str(refusal(images + path, **allowed))


def test_slow_hosts_do_not_delay_other_images(images: str) -> None:
    policy = ImagePolicy(allow_remote=True, allowed_networks=LOOPBACK)

    async def first() -> bytes:
        slow = [
            asyncio.ensure_future(load_image(f"{images}/silent{i}", policy, "url"))
            for i in range(40)
        ]
        quick = asyncio.ensure_future(load_image(f"{images}/picture", policy, "url"))
        done, _ = await asyncio.wait({quick, *slow}, return_when=asyncio.FIRST_COMPLETED)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        [one] = done
        assert one is quick
        return one.result()

    assert asyncio.run(first()) == b"bytes"


def test_names_that_do_not_resolve_time_out_and_delay_no_one_else(
    images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def slowly(host: str, *arguments: object, **named: object) -> object:
        if host == "stuck.example":
            _Images.released.wait(PATIENCE_S)
        return resolve("127.0.0.1", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    allowed = {"allow_remote": True, "allowed_networks": LOOPBACK, "timeout_s": 0.2}
    for _ in range(20):
        assert "within" in str(refusal("http://stuck.example/x", **allowed))
    port = images.rpartition(":")[2]
    allowed["timeout_s"] = PATIENCE_S
    assert load(f"http://known.example:{port}/x", **allowed) == b"bytes"
