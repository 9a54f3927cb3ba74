"""Real processes: the ranges of all the data, in each of them, or an error in each of them."""

import pytest
import torch

pytestmark = pytest.mark.slow

EQUAL = ["net-entropy", "net-max", "symmetric-entropy", "affine-percentile", "extremes-max"]


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("size", "rank"), [(size, rank) for size in (1, 2, 3, 4) for rank in range(size)])
@pytest.mark.parametrize("case", EQUAL)
def test_every_process_has_the_ranges_of_one_over_all_the_data(found, case, size, rank):
    alone, together = found(case, "alone"), found(f"{case}-{size}", rank)
    assert together["error"] == ""
    assert len(together["ranges"]) >= 3
    assert same(together["ranges"], alone["ranges"])
    assert together["text"] == alone["text"]


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.parametrize("rank", range(4))
def test_another_method_from_the_same_pass_is_that_of_one_process(found, case, rank):
    assert same(found(f"{case}-4", rank)["after"], found(case, "alone")["after"])


@pytest.mark.parametrize("rank", range(4))
def test_one_process_can_calibrate_alone(found, rank):
    assert same(found("alone", rank)["ranges"], found(f"alone-{rank}", "alone")["ranges"])


@pytest.mark.parametrize("rank", range(4))
def test_ddp_has_the_buffers_of_the_first_and_unequal_numbers_of_batches(found, rank):
    assert same(found("ddp", rank)["ranges"], found("net-entropy", "alone")["ranges"])


@pytest.mark.parametrize("rank", range(4))
def test_the_module_of_ddp_calibrates_alike(found, rank):
    assert same(found("ddp-module", rank)["ranges"], found("net-entropy", "alone")["ranges"])


def test_ddp_in_one_process_waits_for_no_other(found):
    assert same(found("ddp-alone", 0)["ranges"], found("net-entropy", "alone")["ranges"])


@pytest.mark.parametrize("rank", range(4))
def test_fsdp_has_the_ranges_of_one_process(found, rank):
    assert same(found("fsdp", rank)["ranges"], found("net-entropy", "alone")["ranges"])


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("case", ["met", "met-again"])
def test_a_process_that_came_alone_calibrates_with_the_others_afterwards(found, case, rank):
    assert "process 1: did not call calibrate() for 2 s (time_limit)" in found("came-alone", 0)["error"]
    assert same(found(case, rank)["ranges"], found("net-entropy", "alone")["ranges"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no-data", "process 1: data: expected at least one batch, got none"),
        ("other-names", "process 1: extra._input_quantizer: expected nothing of that name as in process 0"),
        ("other-grid", 'process 1: conv._input_quantizer: expected {"num_bits": 8, '),
        ("other-weights", "process 2: fc.weight: expected torch.float32 (4, 6) checksum"),
        ("other-method", "process 3: method: expected 'entropy' as in process 0, got 'mse'"),
        (
            "other-shapes",
            "quantizers.channel: amax shape: expected the same in all processes, got (1, 6) in process 0, (1, 5)",
        ),
        ("nan", "conv._input_quantizer: the data held 144 NaN and 0 Inf"),
        ("fsdp-unequal", "process 1 has 1, another one more"),
    ],
)
@pytest.mark.parametrize("rank", range(4))
def test_what_differs_is_the_same_error_in_each_process(found, case, message, rank):
    seen = found(case, rank)
    assert seen["error"].startswith("CalibrationError: ")
    assert message in seen["error"]
    assert seen["error"] == found(case, 0)["error"]
    assert not seen["changed"]


@pytest.mark.parametrize(
    ("case", "who", "own"),
    [
        ("forward-raises", 2, "ValueError: bad sample"),
        ("loader-raises", 0, "OSError: disk is gone"),
        ("argument", 3, "InvalidValueError: num_batches: expected at least 1, got -1"),
    ],
)
@pytest.mark.parametrize("rank", range(4))
def test_an_error_of_one_process_stops_all(found, case, who, own, rank):
    seen = found(case, rank)
    told = f"CalibrationError: calibration stopped; no range was changed:\n  process {who}: {own}"
    assert seen["error"] == (own if rank == who else told)
    assert not seen["changed"]


@pytest.mark.parametrize(
    ("case", "who", "ranks", "reason"),
    [
        ("silent", 3, (0, 1, 2, 3), "no sign of life"),
        ("killed", 3, (0, 1, 2), "no sign of life"),
        ("dies-summing", 2, (0, 1), "no sign of life"),
        ("dies-searching", 1, (0,), "no sign of life"),
        ("absent", 3, (1,), "did not call calibrate()"),
    ],
)
def test_a_process_that_is_gone_is_named_within_the_time_limit(found, case, who, ranks, reason):
    for rank in ranks:
        seen = found(case, rank)
        assert f"process {who}: {reason} for 2 s (time_limit)" in seen["error"]
        assert not seen["changed"]
        assert seen["seconds"] < 20


def test_a_failure_is_heard_of_at_once(found):
    assert all(found("forward-raises", rank)["seconds"] < 20 for rank in range(4))  # of a time limit of 60
