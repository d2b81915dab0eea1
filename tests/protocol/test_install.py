"""The advice for a missing package is a command that works for this installation."""

from __future__ import annotations

from pathlib import Path

from broker.protocol.install import install_hint


def test_for_a_clone_the_command_installs_from_its_folder(tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert install_hint("worker", "lora", root=clone) == f"pip install -e '{clone}[worker,lora]'"


def test_for_an_installed_package_the_command_uses_its_name(tmp_path: Path) -> None:
    assert install_hint("gateway", root=tmp_path) == "pip install 'tokenbus[gateway]'"
