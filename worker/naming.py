"""Model names from paths, and which name belongs to which model.

The rule is that of the replaced systems: the last component of the path; `checkpoint-N` is prefixed
with the parent's name, because the parent folder names the model. Must never look at the disk.
"""

from __future__ import annotations

from collections.abc import Sequence


def name_from_path(path: str) -> str:
    """The name under which a model is served if none is given.

    >>> name_from_path("liuhaotian/llava-v1.5-7b/")
    'llava-v1.5-7b'
    >>> name_from_path("/data/tuned/checkpoint-400")
    'tuned_checkpoint-400'
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if not parts:
        raise ValueError(f"no model name can be made from the path {path!r}")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def _items(values: Sequence[str]) -> list[str]:
    return [item.strip() for value in values for item in value.split(",") if item.strip()]


def pair_names(
    paths: Sequence[str], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Paths with their names, from repeated options that may be comma-separated lists.

    One model: it gets all names. Several: one `--model-name` for each model (a comma-separated
    list of that model's names), or one comma-separated list with one name for each. Raises
    ValueError otherwise.
    """
    models = _items(paths)
    groups: list[tuple[str, ...]]
    if not names:
        groups = [(name_from_path(path),) for path in models]
    elif len(models) == 1:
        groups = [tuple(_items(names))]
    elif len(names) == len(models):
        groups = [tuple(_items([value])) for value in names]
    elif len(names) == 1 and len(_items(names)) == len(models):
        groups = [(name,) for name in _items(names)]
    else:
        raise ValueError(
            f"{len(models)} models and {len(names)} --model-name: give one for each model"
        )
    served = [name for group in groups for name in group]
    for name in served:
        if len(name.encode()) > 256:
            raise ValueError(f"the model name {name[:40]!r}... is longer than 256 bytes")
        if served.count(name) > 1:
            raise ValueError(f"two models would be served as {name!r}: use --model-name")
    return tuple(models), tuple(groups)
