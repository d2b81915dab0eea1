"""Images of a request as bytes: data URLs, and remote addresses where the operator allows them.

A remote image is fetched by the gateway (`remote_images`), never by a worker. Bytes are not
decoded here; the worker looks at them under its own bounds.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.protocol.limits import MAX_ATTACHMENT_BYTES
from client.gateway.addresses import Network
from client.gateway.bodies import aside, from_base64
from client.gateway.errors import invalid, too_large

__all__ = ["ImagePolicy", "load_image"]


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """Which images the operator allows. The default fetches nothing."""

    allow_remote: bool = False
    max_bytes: int = MAX_ATTACHMENT_BYTES
    #: Time limit for the whole fetch, including look-ups and redirects.
    timeout_s: float = 10.0
    #: Private networks that may be fetched from nevertheless, such as an operator's
    #: own image store.
    allowed_networks: Sequence[Network] = field(default_factory=tuple)


async def load_image(url: str, policy: ImagePolicy, param: str) -> bytes:
    """The bytes of an `image_url`. Raises GatewayError naming `param`."""
    if url[:5].lower() == "data:":
        return await aside(len(url), _from_data_url, url, policy, param)
    if url[:7].lower() == "http://" or url[:8].lower() == "https://":
        if not policy.allow_remote:
            raise invalid(
                param,
                f"`{param}` is a remote address, and this gateway fetches none. Send the image "
                "as "
                "a data URL (data:image/png;base64,...), or start the gateway with "
                "--allow-remote-images.",
            )
        # Imported late: only the gateway fetches, and only its extra installs what this needs.
        from client.gateway.remote_images import fetch

        return await fetch(url, policy, param)
    raise invalid(param, f"`{param}` must be a data URL (data:image/png;base64,...).")


def _from_data_url(url: str, policy: ImagePolicy, param: str) -> bytes:
    head, comma, payload = url.partition(",")
    media_type, *options = head[5:].split(";")
    if not comma or "base64" not in [option.strip().lower() for option in options]:
        raise invalid(param, f"`{param}` is a data URL without ';base64,'.")
    if not media_type.strip().lower().startswith("image/"):
        raise invalid(param, f"`{param}` has media type {media_type!r}; an image is image/....")
    # Four characters encode three bytes.
    if len(payload) * 3 // 4 > policy.max_bytes + 3:
        raise too_large(param, f"`{param}` is beyond the {policy.max_bytes} bytes of one image.")
    try:
        data = from_base64(payload)
    except (binascii.Error, ValueError) as error:
        raise invalid(param, f"`{param}` is not valid base64: {error}.") from None
    if not data:
        raise invalid(param, f"`{param}` is an empty image.")
    if len(data) > policy.max_bytes:
        raise too_large(param, f"`{param}` is beyond the {policy.max_bytes} bytes of one image.")
    return data
