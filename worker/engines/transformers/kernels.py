"""What a decoder layer computes between its matrix products, in C compiled on this machine.

In a decode step of many rows, torch's attention reads each row up to the length of the longest, and
takes three times as long as reading the keys and values; norms and rotary embeddings consist of
many small operators. `kernels.c` implements them in plain C, which the system's compiler turns into
a library when a model is loaded (this takes a second; the library is kept for later starts).
Without a compiler, or if the results differ from torch's, layers use torch's operators. Must never
load a library that other users can write.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from worker.engines.common.failures import one_line

__all__ = ["Kernels", "compiled"]

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
DTYPES = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative difference from torch. Observed: 4e-7 and 4e-3."""

FLAGS = (
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=fast"),
    # Sums in any order. Not -ffast-math, which assumes that there is no NaN and makes the whole
    # process flush denormal numbers to zero.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""Further flags: the first set that the compiler accepts is used."""
COMPILE_S = 60.0

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class Kernels:
    """The compiled functions for one dtype, `head_dim` and number of query heads per key head."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, dim: int) -> None:
        self.dtype = dtype
        self._dim = dim
        self._norm = library.norm
        self._norm.argtypes = [*[_POINTER] * 3, _COUNT, _COUNT, _FLOAT, _COUNT]
        self._store = library.store
        self._store.argtypes = [*[_POINTER] * 6, *[_COUNT] * 3, _POINTER, _POINTER, _FLOAT, _COUNT]
        self._attend = library.attend
        self._attend.argtypes = [*[_POINTER] * 6, *[_COUNT] * 3, _FLOAT, _COUNT]
        self._together = library.attend_together
        self._together.argtypes = [*[_POINTER] * 4, _COUNT, _COUNT, _POINTER, _POINTER]
        self._together.argtypes += [*[_COUNT] * 3, _FLOAT, _COUNT]
        for function in (self._norm, self._store, self._attend, self._together):
            function.restype = None

    def norm(self, states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm of contiguous `states` [..., size]."""
        out = torch.empty_like(states)
        size = weight.shape[0]
        self._norm(
            *(out.data_ptr(), states.data_ptr(), weight.data_ptr()),
            *(states.numel() // size, size, epsilon, torch.get_num_threads()),
        )
        return out

    def store(
        self,
        heads: torch.Tensor,
        turns: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        epsilon: float = 0.0,
    ) -> None:
        """Rotate queries and keys of `heads` [tokens, queries + 2 * keys, head_dim] in place, and
        store the keys and values of each token in caches [rows, capacity, heads, head_dim].

        All must be contiguous. `turns`: rotary factors, complex64 [tokens, head_dim / 2]; `rows`
        and `places`: int64 [tokens], which must lie within the caches; `norms`: weights [head_dim]
        of the norms that are applied to queries and keys before the rotation. Raises `ValueError`
        if the numbers of tokens differ.
        """
        tokens = len(heads)
        if len(rows) != tokens or len(places) != tokens or 2 * turns.numel() != tokens * self._dim:
            raise ValueError(
                f"{tokens} tokens with {len(rows)} rows, {len(places)} places and turns "
                f"{tuple(turns.shape)}"
            )
        self._store(
            *(heads.data_ptr(), turns.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(rows.data_ptr(), places.data_ptr(), tokens, keys.shape[1], keys.shape[2]),
            *((None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())),
            *(epsilon, torch.get_num_threads()),
        )

    def attend(
        self,
        heads: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor,
        out: torch.Tensor,
        tokens: int,
        scale: float,
    ) -> None:
        """Attention of the first `tokens` tokens, after `store`, each to its row up to itself.
        Writes to `out` [at least `tokens`, queries * head_dim]."""
        self._attend(
            *(out.data_ptr(), heads.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(rows.data_ptr(), places.data_ptr(), tokens, keys.shape[1], keys.shape[2]),
            *(scale, torch.get_num_threads()),
        )

    def attend_together(
        self,
        heads: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        row: int,
        end: int,
        out: torch.Tensor,
        scale: float,
        own: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attention of all tokens of `heads`, after `store`, computed in blocks. Writes to `out`
        [tokens, queries * head_dim].

        The tokens are consecutive in `row`, and the last attends to the row's first `end` tokens.
        Or, with their `own` rows and places (int64 [tokens] each), all attend to the first `end`
        tokens of `row`, and then to their own rows from there up to themselves.
        """
        own_rows, own_places = (None, None) if own is None else (one.data_ptr() for one in own)
        self._together(
            *(out.data_ptr(), heads.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(row, end, own_rows, own_places, len(heads), keys.shape[1], keys.shape[2]),
            *(scale, torch.get_num_threads()),
        )


@functools.cache
def compiled(dtype: torch.dtype, dim: int, group: int) -> Kernels | None:
    """The functions for this dtype, a `head_dim` of `dim` and `group` query heads per key head;
    None if they cannot be used here. The log says why, except for other dtypes and an odd `dim`."""
    if dtype not in DTYPES or dim % 2:
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info(
            "there is no C compiler (cc): attention uses torch's operators, which take more CPU "
            "time"
        )
        return None
    constants = (*DTYPES[dtype], f"-DHEAD_DIM={dim}", f"-DGROUP={group}")
    try:
        kernels = Kernels(_library(compiler, constants), dtype, dim)
        error = _difference(kernels, dim, group)
    except (OSError, subprocess.SubprocessError, AttributeError) as failure:
        log.warning("attention uses torch's operators: its C code failed: %s", one_line(failure))
        return None
    if not error <= ERRORS[dtype]:
        log.warning("attention uses torch's operators: its C code differs by %.2g from them", error)
        return None
    return kernels


def _library(compiler: str, constants: tuple[str, ...]) -> ctypes.CDLL:
    """The library, compiled now unless it is in the cache. Raises `OSError` or
    `SubprocessError`."""
    source = SOURCE.read_bytes()
    made_of = repr((compiler, _version(compiler), FLAGS, TRIED, constants, _processor()))
    name = hashlib.sha256(source + made_of.encode()).hexdigest()[:32]
    with _folder() as folder:
        path = folder / f"kernels-{name}.so"
        if not path.exists():
            _compile(compiler, constants, path)
        return ctypes.CDLL(str(path))


def _compile(compiler: str, constants: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        made = Path(place) / path.name
        message = ""
        for further in TRIED:
            command = [compiler, *FLAGS, *further, *constants, "-o", str(made), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
            if done.returncode == 0:
                # Another worker may have been faster; its library is the same.
                made.replace(path)
                return
            message = message or done.stderr
        raise OSError(f"{compiler} failed: {message.strip()[-300:] or 'without a message'}")


def _version(compiler: str) -> str:
    asked = [compiler, "--version"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=COMPILE_S).stdout


def _processor() -> str:
    """A description of this processor, for which the library is compiled: machines with other ones
    may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


@contextmanager
def _folder() -> Iterator[Path]:
    """The folder for libraries: in this user's cache or, if that cannot be written or others could
    write to it, a temporary one for this start alone."""
    try:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenbus"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = own.stat()
        usable = seen.st_uid == os.getuid() and not seen.st_mode & 0o022
        usable = usable and os.access(own, os.W_OK)
    except (OSError, RuntimeError):
        usable = False
    if usable:
        yield own
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


@torch.inference_mode()
def _difference(kernels: Kernels, dim: int, group: int) -> float:
    """The largest relative difference from torch, for three tokens of two rows of a small cache."""
    key_heads, capacity, dtype, epsilon = 2, 160, kernels.dtype, 1e-6
    queries = group * key_heads
    shape = (2, capacity, key_heads, dim)
    keys, values = _waves(shape, 0.3).to(dtype), _waves(shape, 0.7).to(dtype)
    rows, places = torch.tensor([0, 0, 1]), torch.tensor([3, 4, 140])
    heads = _waves((3, queries + 2 * key_heads, dim), 1.1).to(dtype)
    norms = (_waves((dim,), 0.9).to(dtype), _waves((dim,), 0.5).to(dtype))
    turns = torch.polar(torch.ones(3, dim // 2), _waves((3, dim // 2), 0.11))

    asked, own = (
        _turned(_normed(part, norm, epsilon), turns).to(dtype)
        for part, norm in (
            (heads[:, :queries], norms[0]),
            (heads[:, queries:-key_heads], norms[1]),
        )
    )
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[rows, places], wanted_values[rows, places] = own, heads[:, -key_heads:]
    wanted_seen = [
        torch.nn.functional.scaled_dot_product_attention(
            asked[token].float().view(key_heads, group, dim),
            wanted_keys[row, : place + 1].float().transpose(0, 1),
            wanted_values[row, : place + 1].float().transpose(0, 1),
        )
        for token, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True))
    ]

    seen, together, behind = torch.empty(3, 3, queries * dim, dtype=dtype)
    kernels.store(heads, turns, keys, values, rows, places, norms, epsilon)
    kernels.attend(heads, keys, values, rows, places, seen, 3, dim**-0.5)
    kernels.attend_together(heads[:2], keys, values, 0, 5, together[:2], dim**-0.5)
    kernels.attend_together(heads[2:], keys, values, 1, 141, together[2:], dim**-0.5)
    # Here the common row and the token's own row are the same.
    kernels.attend_together(
        *(heads[2:], keys, values, 1, 130, behind[2:], dim**-0.5, (rows[2:], places[2:]))
    )
    return max(
        _apart(keys, wanted_keys),
        _apart(values, wanted_values),
        _apart(seen, torch.stack(wanted_seen).flatten(1)),
        _apart(together, seen),
        _apart(behind[2:], seen[2:]),
        _apart(kernels.norm(values, norms[0], epsilon), _normed(values, norms[0], epsilon)),
    )


def _waves(shape: tuple[int, ...], step: float) -> torch.Tensor:
    return torch.sin(torch.arange(math.prod(shape)) * step).view(shape)


def _normed(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(states.float(), weight.shape, weight.float(), epsilon)


def _turned(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def _apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = (got.float() - wanted.float()).norm()
    return float(difference / wanted.float().norm().clamp_min(1e-12))
