"""Messages through a store, here between threads."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed

from fakequant.distributed.peers import Peers
from fakequant.errors import CalibrationError


@pytest.fixture
def store():
    return distributed.HashStore()


def meet(store, *work, limit=30.0):
    """Run one function a process on its Peers, at the same time; return results or errors."""

    def run(rank):
        try:
            return work[rank](Peers(store, range(len(work)), rank, limit))
        except CalibrationError as error:
            return str(error)

    with ThreadPoolExecutor(len(work)) as threads:
        return list(threads.map(run, range(len(work))))


def test_messages_come_in_the_order_of_the_processes(store):
    assert meet(store, *[lambda p: p.exchange("a", {"from": p.rank})] * 3) == [[{"from": i} for i in range(3)]] * 3


def test_the_same_step_of_another_calibration_is_another_exchange(store):
    meet(store, *[lambda p: p.exchange("a", 1)] * 2)
    assert meet(store, *[lambda p: p.exchange("a", 2)] * 2) == [[2, 2]] * 2


def test_ranks_are_those_of_the_default_group(store):
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda rank: Peers(store, (3, 7), rank, 30.0).exchange("a", rank), (3, 7)))
    assert found == [[3, 7], [3, 7]]


def test_who_leaves_need_not_wait_and_is_heard_by_who_comes_later(store):
    first = Peers(store, (0, 1), 0, 30.0)
    assert first.leave("ValueError: bad") == {}
    with pytest.raises(CalibrationError, match=r"stopped; no range was changed:\n  process 0: ValueError: bad"):
        Peers(store, (0, 1), 1, 30.0).exchange("a", 1)


def test_who_came_alone_is_met_when_it_comes_again(store):
    with pytest.raises(CalibrationError, match="process 1: did not call"):
        Peers(store, (0, 1), 0, 0.2).exchange("a", 1)
    for _ in range(2):
        assert meet(store, *[lambda p: p.exchange("a", p.rank)] * 2) == [[0, 1]] * 2


def test_between_batches_a_failure_is_heard_of(store, monkeypatch):
    first, second = (Peers(store, (0, 1), rank, 30.0) for rank in (0, 1))
    first.leave("ValueError: bad")
    second.go_on()  # the last look was just now
    monkeypatch.setattr("time.monotonic", lambda: second._last_look + 2)
    with pytest.raises(CalibrationError, match="process 0: ValueError: bad"):
        second.go_on()


def test_the_first_reason_is_kept(store):
    first, second = (Peers(store, (0, 1), rank, 30.0) for rank in (0, 1))
    first.leave("cause")
    assert second.leave("effect") == {0: "cause"}
    assert first.leave("again") == {0: "cause"}


def test_who_is_silent_is_named(store):
    Peers(store, (0, 1), 1, 0.2)
    with pytest.raises(CalibrationError, match=r"process 1: no sign of life for 0.2 s \(time_limit\)"):
        Peers(store, (0, 1), 0, 0.2).exchange("a", 1)


def test_who_never_came_is_named(store):
    with pytest.raises(CalibrationError, match=r"process 1: did not call calibrate\(\) for 0.2 s"):
        Peers(store, (0, 1), 0, 0.2).exchange("a", 1)


def test_who_is_slow_but_goes_on_is_waited_for(store):
    def slow(peers):
        for _ in range(20):  # five times the limit
            with pytest.raises(distributed.DistError):
                store.wait(["never"], timedelta(seconds=0.1))
            peers.go_on()
        return peers.exchange("a", "late")

    assert meet(store, lambda p: p.exchange("a", "early"), slow, limit=0.4) == [["early", "late"]] * 2


def test_messages_that_all_have_read_are_deleted(store):
    def steps(peers):
        for number in range(50):
            peers.exchange(f"step {number}", number)

    meet(store, steps, steps)
    assert store.num_keys() < 10


class Gone(distributed.HashStore):
    """A store whose process ended."""

    def add(self, key, value):
        raise distributed.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone_is_an_error():
    with pytest.raises(CalibrationError, match="the store of torch.distributed is gone; .*Connection reset"):
        Peers(Gone(), (0, 1), 0, 30.0)


class Late:
    """A store in which messages that are there already are seen at the second look."""

    def __init__(self, store):
        self._store = store
        self._is_first = True

    def check(self, keys):
        was_first, self._is_first = self._is_first, False
        return not was_first and self._store.check(keys)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_who_failed_over_the_messages_does_not_keep_others_from_reading_them(store):
    first, second = (Peers(store, (0, 1), rank, 30.0) for rank in (0, 1))
    first._store.set("a/0", "1")
    first.leave("CalibrationError: the messages differ")
    second._store = Late(second._store)
    assert second.exchange("a", 2) == [1, 2]
