"""Messages between processes, in the store through which torch.distributed made them meet.

A message stays in the store, so a process that fails leaves its reason and goes; nobody has to
receive it. Waiting is polling: a process that waits sees at once that another one failed, and sees
which ones show no sign of life.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from torch import distributed

from fakequant.errors import CalibrationError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PAUSE = 0.05
"""Seconds between two looks into the store, at most."""


class Peers:
    """The processes of a group, seen from one of them.

    Args:
        store: of the group.
        ranks: of all of them, in torch's default group: the numbers that users know.
        rank: of this one.
        time_limit: seconds after which a process without a sign of life is given up.
    """

    def __init__(self, store: "distributed.Store", ranks: Sequence[int], rank: int, time_limit: float) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self._place = self.ranks.index(rank)
        self._time_limit = time_limit
        self._last_look = 0.0
        self._read_by_all = ""
        with _reaching_the_store():
            self._store = self._meeting(store)
        self._sign()

    def connect(self) -> "ProcessGroup":
        """Return a new gloo group of these processes: for CPU tensors, whatever their own group is for."""
        store, limit = distributed.PrefixStore("sums", self._store), timedelta(seconds=self._time_limit)
        # It has the collectives of a ProcessGroup; torch's stubs leave them out.
        return cast("ProcessGroup", distributed.ProcessGroupGloo(store, self._place, len(self.ranks), limit))

    def exchange(self, step: str, message: Any) -> list[Any]:
        """Give all a message (JSON), and return the messages of all, as ``ranks``, when the last one is there.

        Raises:
            CalibrationError: another process failed, or showed no sign of life for the time limit.
        """
        keys = [f"{step}/{rank}" for rank in self.ranks]
        with _reaching_the_store():
            self._store.set(keys[self._place], json.dumps(message))
            self._wait_for(keys)
            found = self._store.multi_get(keys)
            if self._read_by_all:  # who is at this step has read the one before
                self._store.delete_key(self._read_by_all)
        self._read_by_all = keys[self._place]
        return [json.loads(text) for text in found]

    def go_on(self) -> None:
        """Show a sign of life, and raise CalibrationError if another process failed; cheap, for every batch."""
        if time.monotonic() - self._last_look > min(1.0, self._time_limit / 10):
            with _reaching_the_store():
                self._sign()
                if self._store.check(["failed"]):
                    raise stopped(self._failures())

    def leave(self, reason: str) -> dict[int, str]:
        """Tell the others that this process failed, unless others did so before: then return their reasons."""
        failures: dict[int, str] = {}
        with contextlib.suppress(CalibrationError), _reaching_the_store():
            failures = self._failures()
            if not failures:
                self._record({self.rank: reason})
        return failures

    def _meeting(self, store: "distributed.Store") -> "distributed.Store":
        """Return the part of a store in which the processes meet this time: the next one for each of them.

        Where the others gave this process up before it came, as one that had called alone does, they are ahead.
        """
        while True:
            number = store.add(f"fakequant/{self._place}", 1)  # how many times this process came here
            meeting = distributed.PrefixStore(f"fakequant/{number}", store)
            if not meeting.check([f"failed/{self.rank}"]):
                return meeting

    def _sign(self) -> None:
        self._last_look = time.monotonic()
        self._store.add(f"signs/{self.rank}", 1)

    def _record(self, reasons: dict[int, str]) -> None:
        for rank, reason in reasons.items():
            self._store.set(f"failed/{rank}", reason)
        self._store.set("failed", "")

    def _failures(self) -> dict[int, str]:
        keys = {rank: f"failed/{rank}" for rank in self.ranks}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def _wait_for(self, keys: Sequence[str]) -> None:
        signs: dict[int, tuple[bytes, float]] = {}
        next_look, pause = 0.0, _PAUSE / 100
        while not self._store.check(list(keys)):
            # Who failed over the messages has left them all: this process finds the same in them.
            if self._store.check(["failed"]) and not self._store.check(list(keys)):
                raise stopped(self._failures())
            if time.monotonic() >= next_look:
                silent = self._silent(keys, signs)
                if silent:
                    self._record(silent)
                next_look = time.monotonic() + min(1.0, self._time_limit / 10)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)

    def _silent(self, keys: Sequence[str], signs: dict[int, tuple[bytes, float]]) -> dict[int, str]:
        """Return who is missing and did not move within the time limit; keeps in ``signs`` what was seen when."""
        now = time.monotonic()
        for rank, key in zip(self.ranks, keys, strict=True):
            counter = f"signs/{rank}"
            sign = b"" if not self._store.check([counter]) else self._store.get(counter)
            if self._store.check([key]):
                signs.pop(rank, None)
            elif rank not in signs or signs[rank][0] != sign:
                signs[rank] = sign, now
        return {
            rank: f"{'no sign of life' if sign else 'did not call calibrate()'} for {self._time_limit:g} s (time_limit)"
            for rank, (sign, since) in signs.items()
            if now - since > self._time_limit
        }


def stopped(failures: dict[int, str]) -> CalibrationError:
    """Return the error of a process that stops because others failed."""
    reasons = "".join(f"\n  process {rank}: {reason}" for rank, reason in failures.items())
    return CalibrationError(f"calibration stopped; no range was changed:{reasons}")


@contextlib.contextmanager
def _reaching_the_store() -> Iterator[None]:
    try:
        yield
    except distributed.DistError as error:
        raise CalibrationError(
            f"the store of torch.distributed is gone; the process that keeps it (process 0 or torchrun) ended: {error}"
        ) from error
