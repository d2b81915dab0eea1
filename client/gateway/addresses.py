"""Tells public internet addresses: those outside every block that IANA lists as special.

The registries are those of RFC 6890 (iana-ipv4-special-registry, iana-ipv6-special-registry), as of
2026. A block counts as special whatever the registry's column "globally reachable" says, since
relays and anycast services host no images. So do addresses that contain an IPv4 address (mapped,
NAT64, 6to4, Teredo), because a translator decides where they lead. The tables of `ipaddress` are
not used, since they differ between releases of Python.
"""

from __future__ import annotations

import ipaddress
from typing import Final

__all__ = ["Address", "Network", "public_address"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SPECIAL_IPV4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private use
            "100.64.0.0/10",  # shared address space of carriers
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link local, the metadata services of clouds among them
            "172.16.0.0/12",  # private use
            "192.0.0.0/24",  # IETF protocol assignments
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private use
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and the broadcast address
        ),
    )
)

#: Everything that IANA has allocated as global unicast. This excludes loopback, the unspecified
#: address, IPv4-compatible and IPv4-mapped addresses (::/96, ::ffff:0:0/96), NAT64 (64:ff9b::/96,
#: 64:ff9b:1::/48), discard and dummy prefixes (100::/32), segment routing (5f00::/16), unique local
#: (fc00::/7), link local (fe80::/10), site local (fec0::/10) and multicast (ff00::/8) addresses.
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments, Teredo, ORCHID and AMT among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)


def public_address(address: Address) -> bool:
    """Whether the address belongs to the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_IPV4)
    return address in _GLOBAL_UNICAST and not any(address in network for network in _SPECIAL_IPV6)
