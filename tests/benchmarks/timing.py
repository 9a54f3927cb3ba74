"""Ratios of times measured side by side: on a shared machine only these mean anything."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def print_ratios(
    title: str,
    work: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
    settle: float = 0.0,
) -> dict[str, float]:
    """Run every piece of work in turn, round after round; print and return each one's median ratio to the first.

    Each ratio is taken within one round, so that a slow phase of the machine hits both sides. ``time.process_time``
    leaves out what other processes take, which matters where a few percent are asked for. ``settle`` is how many
    seconds the threads of the piece before may go on waiting for work; one run that is not timed follows them.
    """
    for run in work.values():  # warm up: caches, allocators, compilation
        run()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            gc.collect()
            if settle:
                time.sleep(settle)
                run()
            start = clock()
            run()
            times[name].append(clock() - start)
    base = next(iter(times))
    print(f"\n{title} ({rounds} rounds)")
    ratios = {}
    for name, seconds in times.items():
        ratios[name] = statistics.median(t / b for t, b in zip(seconds, times[base], strict=True))
        best = min(seconds) / min(times[base])
        middle = statistics.median(seconds) * 1e3
        print(f"  {name:<44} {ratios[name]:7.3f}   by minima {best:7.3f}   median {middle:9.2f} ms")
    return ratios
