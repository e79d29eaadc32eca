"""How long do servers stand still before a weight update, with many requests in flight?

Null servers hold the replies of `--requests` completions of 128 tokens back until they are aborted,
as before an update. `interrupt_s` is until the update may begin, `all_read_s` until every reply is
read and its request has ended. Medians of five rounds after one.

    python -m benchmarks.interrupt --requests 1536 --servers 4 --out interrupt.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import urllib.request
from pathlib import Path

from benchmarks.load import NEW_TOKENS, cpu_name, null_servers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.pool import PoolLimits, ServerPool
from lightning_grpo.serving.server import ServerHandle
from lightning_grpo.types import Sampling

ROUNDS, WARM = 6, 1


def hold(url: str) -> None:
    """Have the servers keep their replies back."""
    request = urllib.request.Request(url + "/hold", data=b"true")
    urllib.request.urlopen(request, timeout=30).read()


async def one_round(pool: ServerPool, url: str, requests: int) -> tuple[float, float]:
    """Seconds until the update may begin, and until all is read."""
    await asyncio.to_thread(hold, url)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    asked = [
        asyncio.create_task(pool.generate([5, 6, 7 + i % 50] * 30, sampling))
        for i in range(requests)
    ]
    while pool.num_in_flight < requests:  # noqa: ASYNC110 - the pool tells nobody
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    await pool.interrupt()
    interrupted = time.perf_counter() - began
    await pool.resume()
    await asyncio.gather(*asked)
    return interrupted, time.perf_counter() - began


async def measure(urls: list[str], requests: int) -> dict[str, float]:
    """Medians."""
    handles = [ServerHandle(url) for url in urls]
    limits = PoolLimits(requests_per_server=requests)
    async with ServerPool(handles, Requirements("bench"), lambda ids: "", limits=limits) as pool:
        for member in pool.members:
            member.mark_clean(0, "default")
        await pool.resume()
        rounds = [await one_round(pool, urls[0], requests) for _ in range(ROUNDS)]
    interrupted, read = (statistics.median(each[WARM:]) for each in zip(*rounds, strict=True))
    return {"interrupt_s": round(interrupted, 4), "all_read_s": round(read, 4)}


def main() -> None:
    """One case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1536)
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with null_servers(args.servers) as urls:
        found = asyncio.run(measure(urls, args.requests))
    report = {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d")}
    report |= {"requests": args.requests, "servers": args.servers, "tokens": NEW_TOKENS, **found}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
