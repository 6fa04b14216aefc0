"""``python -m chaos --seed 7 --faults 1000``: break a server while clients use it; exit 1 when anything was wrong."""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import time
from collections import Counter

from chaos.clients import Clients
from chaos.faults import WEIGHTS, Breaker
from chaos.model import Ledger
from chaos.supervisor import Pod

RANKS = 2
CALLERS = 6


async def run(seed: int, faults: int, callers: int) -> list[str]:
    """Run clients and faults side by side; return everything that was wrong."""
    dice = random.Random(seed)
    ledger, broken = Ledger(), Counter[str]()
    started = time.monotonic()
    settings = {
        "DRUMLINE_RESTART__MAX_RESTARTS": str(faults * 10 + 100),
        "DRUMLINE_RESTART__BACKOFF_SECONDS": "0",
        "DRUMLINE_HANG_TIMEOUT": "3",
        "DRUMLINE_CANCEL_GRACE": "3",
    }
    async with Pod(RANKS, **settings) as pod:
        breaker = Breaker(pod, dice, ledger.wrongs)
        clients = Clients(pod, ledger, seed)
        calling = asyncio.create_task(clients.run(callers))
        for number in range(faults):
            name = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            await breaker.one(name)
            broken[name] += 1
            if ledger.wrongs or calling.done():
                break
            if number % 50 == 49:
                print(f"{number + 1} faults, {clients.count} requests, {time.monotonic() - started:.0f} s", flush=True)
            # Some requests get through between two faults: how many is chance, too.
            goal = clients.count + dice.choice([0, 1, 3, 10])
            reached = asyncio.create_task(clients.until(goal))
            await asyncio.wait([reached, calling], timeout=60, return_when=asyncio.FIRST_COMPLETED)
            reached.cancel()
        clients.over = True
        await calling
        await pod.ready()
        if ledger.wrongs:
            print(pod.tail(), file=sys.stderr)
    wrongs = ledger.wrongs + pod.problems
    print(f"seed {seed}: {sum(broken.values())} faults {dict(broken)}")
    print(
        f"{clients.count} requests {ledger.ends}; {pod.lives} lives of the server; {time.monotonic() - started:.0f} s"
    )
    return wrongs


def main() -> int:
    """Parse, run, tell."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="repeats the choices of an earlier run")
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=CALLERS)
    parser.add_argument("--quick", action="store_true", help="40 faults")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    wrongs = asyncio.run(run(args.seed, 40 if args.quick else args.faults, args.callers))
    for wrong in wrongs:
        print(f"WRONG: {wrong}")
    print("clean" if not wrongs else f"{len(wrongs)} wrong; again with --seed {args.seed}")
    return bool(wrongs)


if __name__ == "__main__":
    sys.exit(main())
