"""The client library under the name of the distribution: `from tokenbus import Client`.

The same objects as `from client import ...`, whose `__all__` says which; `AsyncClient` and
`__version__` are loaded when they are used.
"""

from typing import TYPE_CHECKING, Any

import client as _client

if TYPE_CHECKING:
    from client import *  # noqa: F403

if not hasattr(_client, "BusError"):
    raise ImportError(
        f"tokenbus needs its own package `client`, and {_client.__file__} stands before it on "
        "sys.path: rename that file, or run the program from another folder"
    )

__all__ = list(_client.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tokenbus' has no attribute {name!r}")
    return getattr(_client, name)
