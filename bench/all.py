"""Run the benchmarks beside peers and write one results file: `python -m bench.all --quick`.

Each script runs in its own process, so that no run affects the next. The file holds the JSON lines
of all scripts, each with the name of its script; tables go to standard output and to
bench/FIGURES.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import figures
from bench.common import ROOT, python

SCRIPTS = ("hop", "stream", "scale", "images", "start", "engine", "decide")
RESULTS = ROOT / "bench" / "results.json"
LIMIT_S = {True: 180.0, False: 1800.0}
"""Time limits for one script, with and without --quick; generous, for a busy machine."""


def run(script: str, arguments: argparse.Namespace, lines: Path) -> list[str] | None:
    """Run one script and return its JSON lines; None if it failed, which is printed."""
    command = python("-m", f"bench.{script}", "--json", str(lines))
    if arguments.quick:
        command.append("--quick")
    if arguments.plots:
        command += ["--plot", str(arguments.plots / f"{script}.svg")]
    began = time.monotonic()
    try:
        subprocess.run(command, cwd=ROOT, check=True, timeout=LIMIT_S[arguments.quick])
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"bench.{script} failed: {error}", file=sys.stderr)
        return None
    print(f"({script}: {time.monotonic() - began:.0f} s)\n", flush=True)
    return lines.read_text().splitlines()


def kept(results: Path, chosen: Sequence[str]) -> list[str]:
    """Lines of the earlier results, for the scripts that do not run now."""
    if not results.exists():
        return []
    lines = filter(str.strip, results.read_text().splitlines())
    return [line for line in lines if json.loads(line)["script"] not in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scripts; return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Benchmarks beside peers, with one results file.")
    parser.add_argument("--quick", action="store_true", help="a minute or less for each")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results [bench/results.json]")
    parser.add_argument("--plots", type=Path, help="folder for plots; needs matplotlib")
    parser.add_argument(
        "--only", default=",".join(SCRIPTS), help="scripts to run; the others keep their lines"
    )
    arguments = parser.parse_args(argv)
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    chosen = list(filter(None, arguments.only.split(",")))
    written = kept(arguments.json, chosen)
    failed = []
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        for script in chosen:
            lines = run(script, arguments, Path(folder) / f"{script}.json")
            if lines is None:
                failed.append(script)
                continue
            for line in lines:
                row = json.loads(line)
                if row["name"] == "machine":
                    row["quick"] = arguments.quick
                written.append(json.dumps({"name": row.pop("name"), "script": script, **row}))
    arguments.json.write_text("\n".join(written) + "\n")
    print(f"{len(written)} lines in {arguments.json}")
    if arguments.json == RESULTS:
        figures.main([])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
