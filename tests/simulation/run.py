"""Long runs: `python -m tests.simulation.run --seeds 100000`. Shrinks each failure and prints its
story."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.simulation.plan import FAULTS, make, shrink
from tests.simulation.scenario import Run, fails


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many scenarios")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--kinds", nargs="*", default=list(FAULTS), help="faults to use")
    parser.add_argument("--faults", type=int, default=8, help="most faults in a scenario")
    parser.add_argument("--brokers", type=int, nargs="*", default=[1, 1, 2], help="counts to draw")
    parser.add_argument("--models", type=int, nargs="*", default=[1], help="counts to draw")
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first failure"
    )
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()

    logging.disable()  # what workers log of loads that fail, as planned
    began_s = time.monotonic()
    seen: Counter[str] = Counter()
    failed = 0
    for seed in range(args.start, args.start + args.seeds):
        plan = make(seed, tuple(args.kinds), args.faults, tuple(args.brokers), tuple(args.models))
        try:
            run = Run(plan).to_the_end()
        except Exception as error:  # any exception from a core is a finding
            failed += 1
            first_line = (str(error) or repr(error)).splitlines()[0]
            print(f"seed {seed} fails: {type(error).__name__}: {first_line}")
            if args.keep_going:
                continue
            small = plan if args.no_shrink else shrink(plan, fails)
            sys.exit(fails(small))
        seen["events"] += run.world.events
        seen["faults"] += len(plan.faults)
        for call in run.calls:
            seen["dropped" if call.dropped else "gone" if call.gone else call.outcome] += 1
            seen["resumes"] += call.resumed
            seen["gave way"] += call.gave_way
            seen["split"] += call.answer.split
        seen["failed loads"] += run.failed_loads
        seen["asked again"] += sum(call.asked_again for call in run.calls)
        for name in ("swaps", "swap_moves"):
            seen[name.replace("_", " ")] += sum(b.core.counters[name] for b in run.brokers)
        for worker in run.all_workers:
            for place, count in worker.resumed_in.items():
                seen[f"resumes in {place}"] += count
    took_s = time.monotonic() - began_s
    print(f"{args.seeds} scenarios, {failed} failed, {args.seeds / took_s * 60:.0f} a minute")
    print(", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
