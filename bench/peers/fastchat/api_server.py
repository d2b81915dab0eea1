"""FastChat's OpenAI API server, as shipped or with one line repaired.

`generate_completion_stream` opens an `httpx.AsyncClient()` for every request, and each of them
loads the machine's certificates into a new TLS context, although the worker speaks plain HTTP. With
`--repaired`, that client is made with `verify=False`; that is the only difference.

Runs in FastChat's environment (install.sh beside this file), never in the project's.
"""

from __future__ import annotations

import functools
import sys

import httpx
import uvicorn
from fastchat.serve import openai_api_server


def main() -> None:
    """Serve until killed; further options are FastChat's own."""
    if "--repaired" in sys.argv:
        sys.argv.remove("--repaired")
        openai_api_server.httpx.AsyncClient = functools.partial(httpx.AsyncClient, verify=False)
    arguments = openai_api_server.create_openai_api_server()
    uvicorn.run(
        openai_api_server.app, host=arguments.host, port=arguments.port, log_level="warning"
    )


if __name__ == "__main__":
    main()
