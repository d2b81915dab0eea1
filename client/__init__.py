"""The client library of tokenbus: stream tokens from models behind a broker.

```
from client import Client

with Client("tcp://127.0.0.1:5555") as client:
    for piece in client.chat("demo", "Hello!", stream=True).text:
        print(piece, end="", flush=True)
```

Public names are those of `__all__`; everything else may change.
"""

from broker.protocol.messages import FinishReason, Message, ModelInfo, Timings, Usage
from client.aio import AsyncClient
from client.calls import Embeddings
from client.errors import *  # noqa: F403  # its `__all__` is the list, kept once
from client.errors import __all__ as _errors
from client.events import End, Prompt, Queued, Recovering, Started, StreamEvent, Tokens
from client.options import Limits, Retry, Timeout
from client.stream import AsyncStream, Completion, Stream
from client.sync import Client
from client.version import VERSION as __version__

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Embeddings",
    "End",
    "FinishReason",
    "Limits",
    "Message",
    "ModelInfo",
    "Prompt",
    "Queued",
    "Recovering",
    "Retry",
    "Started",
    "Stream",
    "StreamEvent",
    "Timeout",
    "Timings",
    "Tokens",
    "Usage",
    "__version__",
    *_errors,
]
