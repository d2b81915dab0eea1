"""What is missing is installed by a command that works where it is read."""

from __future__ import annotations

from pathlib import Path

from broker.protocol.install import install_hint


def test_a_clone_is_installed_from_where_it_is(tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert install_hint("worker", "lora", root=clone) == f"pip install -e '{clone}[worker,lora]'"


def test_an_installed_package_goes_by_its_name(tmp_path: Path) -> None:
    assert install_hint("gateway", root=tmp_path) == "pip install 'tokenbus[gateway]'"
