"""Two models that do not fit into memory together, one worker, sixteen clients: swaps and waits.

    python -m bench.swap [--seconds 60] [--load-ms 2000] [--factor 5]
    python -m bench.swap --engine transformers --models A,B

Half of the clients ask for each model, and ask again as soon as they are answered. So both models
are always in demand, and the bound holds: a model stays for at least `--factor` times the time of a
load. With `--roam`, each client draws its next model: then the loaded one soon has nothing to do,
since all clients wait for the other, and it is swapped out earlier.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from client import Client
from client.cli.local_bus import LocalBus


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--load-ms", type=int, default=2000, help="load time of the echo engine")
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--models", default="a,b")
    parser.add_argument("--engine", default="echo")
    parser.add_argument(
        "--roam", action="store_true", help="each client draws its next model [each stays with one]"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-swap-"))
    with LocalBus(folder, start_s=300) as bus:
        bus.start_broker("--swap-factor", str(arguments.factor))
        options = ["--models", arguments.models, "--slots", "8"]
        if arguments.engine == "echo":
            options += ["--engine-arg", f"load_ms={arguments.load_ms}"]
        bus.start_worker("w1", *options, engine=arguments.engine)
        bus.wait_ready(1)
        client = Client(bus.front)
        models = [row["name"] for row in client.query("bus.models")]
        waits: dict[str, list[float]] = {model: [] for model in models}
        until_s = time.monotonic() + arguments.seconds

        def ask(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < until_s:
                model = draw.choice(models) if arguments.roam else models[number % len(models)]
                how = {"echo": {"step_delay_ms": 10}} if arguments.engine == "echo" else {}
                stream = client.generate(
                    "a story, please", model=model, max_tokens=32, stream=True, template_args=how
                )
                for _ in stream:
                    pass
                waits[model].append(stream.end.total_s)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(arguments.clients)]
        began_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.monotonic() - began_s
        swaps = int(client.query("bus.stats").get("swaps_total", 0))
        moves = int(client.query("bus.stats").get("swap_moves_total", 0))
        log = (folder / "broker-1.log").read_text().splitlines()
        loads = [
            float(line.split('"took_s": ')[1].split("}")[0]) for line in log if "took_s" in line
        ]
        client.close()
    load_s = sum(loads) / max(1, len(loads))
    bound = took_s / (load_s * (1 + arguments.factor)) + len(models)
    print("| model | answers | mean s | longest s |")
    print("|---|---|---|---|")
    for model, taken in waits.items():
        mean_s = sum(taken) / max(1, len(taken))
        print(f"| {model} | {len(taken)} | {mean_s:.1f} | {max(taken, default=0):.1f} |")
    share = sum(loads) / took_s
    print(
        f"{took_s:.0f} s, {swaps} swaps of {load_s:.1f} s (drain included), {share:.0%} of the "
        f"time; the bound allows {bound:.0f} swaps; {moves} streams moved"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
