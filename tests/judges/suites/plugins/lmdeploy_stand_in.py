"""A pytest plugin that lets LMDeploy's tests of its API run where LMDeploy is not installed, with
one model instead of each on each of its backends.

It imports nothing of tokenbus, which is not installed there.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from typing import Any

MODEL = os.environ["MODEL_NAME"]


def _stand_in() -> None:
    helpers = types.ModuleType("lmdeploy.utils")
    helpers.__dict__["get_logger"] = logging.getLogger
    helpers.__dict__["is_bf16_supported"] = lambda *_: True
    sys.modules["lmdeploy.utils"] = helpers
    # Its own, found by PYTHONPATH.
    constant: Any = importlib.import_module("utils.constant")
    constant.BACKEND_LIST = ["turbomind"]
    constant.RESTFUL_MODEL_LIST = constant.RESTFUL_BASE_MODEL_LIST = [MODEL]


_stand_in()
