"""Brings a public suite here, in the release that is named: from PyPI or from a repository."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.judges.stage import Absent, environment


def sdist(folder: Path, requirement: str, inside: str) -> Path:
    """The folder `inside` of a source distribution (`name==release`), unpacked on the first call.

    Unlike `pip download` it builds nothing: of most suites' projects the build needs a compiler.
    """
    name = requirement.replace("==", "-")
    place = folder / name
    if not place.exists():
        python = environment("unearth", ("unearth",), within=folder / "environments")
        archives = folder / "archives"
        shutil.rmtree(archives, ignore_errors=True)
        archives.mkdir(parents=True)
        command = ("-m", "unearth", "--no-binary", "--download", str(archives), requirement)
        subprocess.run([str(python), *command], check=True, stdout=subprocess.DEVNULL)
        [archive] = archives.iterdir()
        beside = folder / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        with tarfile.open(archive) as packed:
            wanted = [m for m in packed if m.name.partition("/")[2].startswith(f"{inside}/")]
            packed.extractall(beside, wanted, filter="data")
        beside.rename(place)
    [root] = place.iterdir()
    return root / inside


def checkout(folder: Path, name: str, commit: str, *inside: str, brought: Path | None) -> Path:
    """These paths of a repository at a commit, unpacked on the first call.

    `brought`: a clone of it, bare or not, which is only read. Raises Absent without one.
    """
    place = folder / f"{name}-{commit[:12]}"
    if not place.exists():
        if brought is None:
            raise Absent(f"it is in no registry: --checkout names a clone of {name} with {commit}")
        packed = folder / f"{name}.tar"
        folder.mkdir(parents=True, exist_ok=True)
        command = ("archive", "--output", str(packed), commit, *inside)
        subprocess.run(["git", "-C", str(brought), *command], check=True)
        beside = folder / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        with tarfile.open(packed) as archive:
            archive.extractall(beside, filter="data")
        packed.unlink()
        beside.rename(place)
    return place
