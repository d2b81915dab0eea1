"""Adapters in a folder of the operator's, which an engine loads and unloads while it runs.

A name from the bus is looked up among the names found in the folder; it is never used as a path.
Files are read and checked in a thread of their own; the engine's thread puts the result into the
model between two steps. An adapter that a job uses is never unloaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from broker.protocol.limits import MAX_NAME_BYTES
from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line

__all__ = ["AdapterFolder", "AdapterLoader", "KnownAdapter"]

CONFIGURATION: Final = "adapter_config.json"
LOOK_S: Final = 2.0
"""Interval between two scans of the folder."""
BYTES_PER_S: Final = 500e6
LEAST_LOAD_MS: Final = 500
"""These two estimate how long a load takes, until one has been measured."""


class AdapterLoader(Protocol):
    """Puts adapters into one model, and takes them out."""

    def read(self, name: str, path: str) -> Any:
        """Read and check an adapter, in a thread of its own, while the model keeps running. Raises
        EngineLoadError."""

    def put(self, name: str, found: Any) -> int:
        """Add to the model what was read, between two steps; returns the bytes that it occupies.
        Raises EngineLoadError, and then leaves the model unchanged."""

    def take(self, name: str) -> None:
        """Remove an adapter from the model, between two steps."""


@dataclass(slots=True)
class KnownAdapter:
    """A folder that holds an adapter."""

    path: Path
    #: Changes whenever its files do.
    state: tuple[Any, ...]
    size_bytes: int
    loaded: bool = False
    load_ms: int = 0
    #: When it was last used, or loaded.
    used_s: float = 0.0
    #: Why it could not be loaded with its present files; empty otherwise.
    broken: str = ""


_Found = tuple[Path, tuple[Any, ...], int]


class AdapterFolder:
    """The adapters of a folder, for one model. Called by the engine's thread only."""

    def __init__(
        self,
        folder: str,
        loader: AdapterLoader,
        in_use: Callable[[str], bool],
        *,
        most: int,
        taken_names: Collection[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`in_use`: whether a job uses the adapter of that name. `most`: how many may be loaded at
        once. `taken_names`: names of models, which no adapter may have. Raises EngineLoadError if
        there is no such folder."""
        self._folder = Path(folder).expanduser()
        if not self._folder.is_dir():
            raise EngineLoadError(f"adapters_folder={folder}: there is no such folder")
        self._loader = loader
        self._in_use = in_use
        self._most = most
        self._taken_names = frozenset(taken_names)
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "adapter")
        self._reading: tuple[str, float, Future[Any]] | None = None
        self._looked_s = clock()
        #: A scan of the folder whose result has not been applied yet.
        self._looking: Future[Any] | None = None
        self._changed = False
        #: Names and causes of what could not be loaded, since `refusals` was last called.
        self._refused: list[tuple[str, str]] = []
        self.known: dict[str, KnownAdapter] = {}
        self._learn(self._found())

    # --- orders -----------------------------------------------------------------------------------

    @property
    def reading(self) -> bool:
        """Whether an adapter is being read."""
        return self._reading is not None

    def load(self, name: str) -> None:
        """Begin to load an adapter. Does nothing if it is loaded or known to be broken, if another
        is being read, or if no room can be made because all are in use: the broker asks again."""
        if name not in self.known:
            self._learn(self._found())
        known = self.known.get(name)
        if known is None or known.loaded or known.broken or self._reading is not None:
            return
        if not self._make_room():
            return
        future = self._pool.submit(self._loader.read, name, str(known.path))
        self._reading = name, self._clock(), future

    def unload(self, names: Collection[str]) -> None:
        """Unload these adapters, or all if `names` is empty; those in use stay."""
        for name, known in self.known.items():
            if known.loaded and (not names or name in names) and not self._in_use(name):
                self._take(name, known)

    def used(self, name: str) -> None:
        """Note that a job asks for an adapter."""
        if name in self.known:
            self.known[name].used_s = self._clock()

    def poll(self) -> bool:
        """Finish what has been read, scan the folder from time to time, and return whether anything
        has changed since the last call."""
        if self._reading is not None and self._reading[2].done():
            self._finish(*self._reading)
        if self._looking is not None and self._looking.done():
            self._learn(self._looking.result())
            self._looking, self._looked_s = None, self._clock()
        elif self._looking is None and self._clock() >= self._looked_s + LOOK_S:
            self._looking = self._pool.submit(self._found)
        changed, self._changed = self._changed, False
        return changed

    def refusals(self) -> list[tuple[str, str]]:
        """Names and causes of what could not be loaded since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- inside -----------------------------------------------------------------------------------

    def _finish(self, name: str, began_s: float, future: Future[Any]) -> None:
        self._reading = None
        known = self.known.get(name)
        if known is None:
            return  # its folder has gone in the meantime
        try:
            size_bytes = self._loader.put(name, future.result())
        except Exception as error:  # the adapter's fault, never the model's
            cause = str(error) if isinstance(error, EngineLoadError) else one_line(error, 300)
            known.broken = cause
            self._refused.append((name, cause))
        else:
            known.loaded, known.size_bytes = True, size_bytes
            known.used_s = self._clock()
            known.load_ms = max(1, round((self._clock() - began_s) * 1000))
        self._changed = True

    def _make_room(self) -> bool:
        loaded = {name: known for name, known in self.known.items() if known.loaded}
        if len(loaded) < self._most:
            return True
        idle = [name for name in loaded if not self._in_use(name)]
        if not idle:
            return False
        oldest = min(idle, key=lambda name: loaded[name].used_s)
        self._take(oldest, loaded[oldest])
        return True

    def _take(self, name: str, known: KnownAdapter) -> None:
        self._loader.take(name)
        known.loaded = False
        self._changed = True

    def _learn(self, found: dict[str, _Found]) -> None:
        """Apply a scan: adapters that are new, changed or gone. A loaded one stays as loaded."""
        for name in [name for name in self.known if name not in found]:
            if not self.known[name].loaded:
                del self.known[name]
                self._changed = True
        for name, (path, state, size_bytes) in found.items():
            known = self.known.get(name)
            if known is None:
                load_ms = LEAST_LOAD_MS + round(size_bytes / BYTES_PER_S * 1000)
                self.known[name] = KnownAdapter(path, state, size_bytes, load_ms=load_ms)
                self._changed = True
            elif known.state != state:
                # If it could not be loaded before, its new files may be tried.
                self._changed |= bool(known.broken)
                known.state, known.broken = state, ""

    def _found(self) -> dict[str, _Found]:
        """Scan the folder. Called in the reading thread, since a file system may be slow."""
        found: dict[str, _Found] = {}
        try:
            with os.scandir(self._folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return found
        for name in names:
            path = self._folder / name
            if name in self._taken_names or name.startswith("."):
                continue
            if len(os.fsencode(name)) > MAX_NAME_BYTES or not name.isprintable():
                continue
            try:
                files = [f for f in path.iterdir() if f.is_file() and f.name.startswith("adapter_")]
                stats = {f.name: f.stat() for f in files}
            except OSError:
                continue
            if CONFIGURATION in stats:
                state = tuple((name, stats[name].st_mtime_ns) for name in sorted(stats))
                found[name] = path, state, sum(stat.st_size for stat in stats.values())
        return found
