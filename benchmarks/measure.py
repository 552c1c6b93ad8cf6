"""Time and memory of several ways to do the same, side by side.

Rounds are interleaved (A B C A B C ...) and the median counts. While other processes hold the
cores, threads that meet after every operation show the scheduler and not the code: measurements
then fall back to one thread and CPU time. Peak memory is what torch's allocator handed out beyond
what was there before; scratch space inside oneDNN or MKL is not in it.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

OPERATIONS, BUSY_SECONDS = 300, 3e-4


def use_threads(wanted: int) -> int:
    """Sets and returns `wanted`, or 1 if the threads of a parallel operation wait for each other:
    tens of microseconds on an idle machine, milliseconds on a busy one."""
    torch.set_num_threads(wanted)
    values = torch.zeros(2**17)
    start = time.perf_counter()
    for _ in range(OPERATIONS):
        values.add_(1)
    if time.perf_counter() - start > OPERATIONS * BUSY_SECONDS:
        torch.set_num_threads(1)
    return torch.get_num_threads()


def _seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def median_seconds(
    runs: dict[str, Callable[[], object]], rounds: int, wanted_threads: int
) -> tuple[dict[str, float], str]:
    """Median of each after a warm-up of each, and what the times are: threads, wall or CPU."""
    threads = use_threads(wanted_threads)
    for run in runs.values():
        run()
    seconds = _seconds(runs, rounds)
    if threads > 1 and use_threads(threads) < threads:
        threads = 1
        seconds = _seconds(runs, rounds)
    busy = "" if threads == wanted_threads else " of CPU time: the machine is busy"
    return seconds, f"{threads} thread(s){busy}"


def peak_bytes(run: Callable[[], object]) -> int:
    """Most that was allocated at one time, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
