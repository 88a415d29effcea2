"""Prints tests/fixtures/bench/schedule.txt: the instants at which the real client of vLLM releases its requests, to the last bit.

    venv/bin/python tests/real/bench_vectors.py > tests/fixtures/bench/schedule.txt

The instants come from the real `get_request` with a stopped clock and sleeps that return at once: the requested sleep is the
instant itself.
"""

import asyncio
import struct
import types

import numpy
from vllm.benchmarks import serve

# seed, burstiness, rate, count, then strategy, first and last rate of a ramp.
RUNS = [
    (1, 100.0, 1.0, 30),
    (9, 0.5, 3.0, 8),
    (0, 100.0, 1.0, 30),
    (7, 1.0, 2.5, 20),
    (1763800000, 0.5, 10.0, 20),
    (3, 3.3, 4.0, 1),
    (5, float("inf"), 3.0, 7),
    (0, 1.0, float("inf"), 3),
    (0, 1.0, float("inf"), 12, "linear", 2, 9),
    (7, 100.0, float("inf"), 12, "exponential", 1, 50),
    (42, 0.7, float("inf"), 5, "exponential", 3, 3),
    (9, float("inf"), float("inf"), 6, "linear", 1, 4),
    (1, 2.0, float("inf"), 1, "linear", 5, 6),
]


def released(seed, burstiness, rate, count, strategy=None, first=None, last=None):
    """Returns the instants in seconds since the start."""
    numpy.random.seed(seed)
    asked = []

    async def sleep(seconds):
        asked.append(float(seconds))

    serve.time = types.SimpleNamespace(time=lambda: 0.0)
    serve.asyncio = types.SimpleNamespace(sleep=sleep)

    async def instants():
        found = []
        async for _ in serve.get_request([None] * count, rate, burstiness, strategy, first, last):
            found.append(asked.pop() if asked else 0.0)
        return found

    return asyncio.run(instants())


print("# Release instants of `vllm bench serve` 0.32, in seconds since the start: the bits of what its own `get_request`")
print(f"# sleeps for; written by tests/real/bench_vectors.py with numpy {numpy.__version__}.")
print("# seed burstiness rate count [strategy first last] | bits of every instant")
for run in RUNS:
    bits = " ".join(struct.pack(">d", instant).hex() for instant in released(*run))
    print(f"{' '.join(str(part) for part in run)} | {bits}")
