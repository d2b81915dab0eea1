"""The client library of tokenbus: stream tokens from models behind a broker.

```
from client import Client

with Client("tcp://127.0.0.1:5555") as client:
    for piece in client.chat("demo", "Hello!", stream=True).text:
        print(piece, end="", flush=True)
```

Public names are those of `__all__`; everything else may change. `AsyncClient` and `__version__` are
loaded on first use: asyncio and the package's metadata take as long to load as everything else.
"""

from broker.protocol import early  # noqa: F401  # first: `python -m client.gateway` passes through here

# isort: split
from typing import TYPE_CHECKING, Any

from broker.protocol.messages import (
    FinishReason,
    Message,
    ModelInfo,
    Piece,
    PieceKind,
    Timings,
    Usage,
)
from client.calls import Embeddings
from client.choices import AsyncChoiceStream, ChoiceStream
from client.classification import Classification, Classifications, RankedDocument, Reranked
from client.completion import Completion
from client.core.events import End, Prompt, Queued, Recovering, Started, StreamEvent, Tokens
from client.core.tools import ToolCall
from client.decisions import ChoiceAnswer, Decisions, NoulAnswer, ScoreAnswer
from client.errors import *  # noqa: F403  # its `__all__` is the only list
from client.errors import __all__ as _errors
from client.options import Limits, Retry, Timeout
from client.stream import AsyncStream, Stream
from client.sync import Client

if TYPE_CHECKING:
    from client.aio import AsyncClient

    __version__: str

__all__ = [
    "AsyncChoiceStream",
    "AsyncClient",
    "AsyncStream",
    "ChoiceStream",
    "ChoiceAnswer",
    "Classification",
    "Classifications",
    "Client",
    "Completion",
    "Decisions",
    "Embeddings",
    "End",
    "FinishReason",
    "Limits",
    "Message",
    "ModelInfo",
    "NoulAnswer",
    "Piece",
    "PieceKind",
    "Prompt",
    "Queued",
    "RankedDocument",
    "Recovering",
    "Reranked",
    "Retry",
    "ScoreAnswer",
    "Started",
    "Stream",
    "StreamEvent",
    "Timeout",
    "Timings",
    "Tokens",
    "ToolCall",
    "Usage",
    "__version__",
    *_errors,
]


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from client.aio import AsyncClient

        globals()[name] = AsyncClient
        return AsyncClient
    if name == "__version__":
        from client.version import version

        return version()
    raise AttributeError(f"module 'client' has no attribute {name!r}")
