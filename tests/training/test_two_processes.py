"""A quantized model in two processes of torch.distributed, started once by torchrun: DDP and FSDP2.

Every network runs with DDP and FSDP2 in float32 and learned ranges, one precision each besides; one
is compiled. The oracle is one process with the whole batch, of which the two have a half each.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fakequant as fq
from fakequant.nn.walk import named_quantizers
from fakequant.qat import freeze_batchnorm

pytestmark = pytest.mark.slow

NETWORKS = ["cnn", "residual", "transformer", "lstm", "cell"]
PRECISIONS = {
    ("cnn", "autocast float16"),
    ("residual", "bfloat16"),
    ("transformer", "autocast bfloat16"),
    ("lstm", "bfloat16"),
}
LIKE_ONE = {
    **{f"parallel {name} float32": name for name in NETWORKS},
    **{f"fully sharded {name}": name for name in NETWORKS},
    "compiled": "transformer",
    "static graph": "residual",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found, by case."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).with_name("two_processes.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def alone(networks, name, learned=True):
    """The model that one process trains with the whole batch."""
    return freeze_batchnorm(networks.quantized(name, learned=learned))


@pytest.fixture(scope="module")
def trained(networks):
    """{network: the model that one process has trained with the whole batch}."""
    models = {name: alone(networks, name) for name in NETWORKS}
    for name, model in models.items():
        networks.train(model, networks.data(name))
    return models


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("case", LIKE_ONE)
def test_two_halves_train_like_the_whole(trained, found, case):
    for process in found if not case.startswith("fully sharded") else found[:1]:
        assert_close(process[case]["state"], trained[LIKE_ONE[case]].state_dict())


@pytest.mark.parametrize(("name", "precision"), sorted(PRECISIONS))
def test_processes_stay_alike_in_every_precision(found, name, precision):
    states = [process[f"parallel {name} {precision}"]["state"] for process in found]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(value.isfinite().all() for value in states[0].values())
    assert all(value.dtype == torch.float32 for key, value in states[0].items() if key.endswith("_amax"))


@pytest.mark.parametrize(("name", "precision"), sorted(PRECISIONS))
def test_loss_falls_in_every_precision(found, name, precision):
    losses = torch.tensor([process[f"parallel {name} {precision}"]["losses"] for process in found]).mean(0)
    assert losses[-1] < losses[0]


def test_a_model_without_ranges_trains_with_those_of_each_batch(found):
    for losses in (process["uncalibrated"] for process in found):
        assert losses[-1] < losses[0]


def test_learned_ranges_of_another_target_are_not_waited_for(found):
    for losses in (process["standing by"] for process in found):
        assert losses[-1] < losses[0]


def test_gradients_accumulate_without_synchronization(networks, found):
    model = alone(networks, "residual")
    x, y = networks.data("residual")
    for part in (slice(0, 4), slice(4, 8)):  # the same samples: each process has every second one
        F.cross_entropy(model(x[part]), y[part]).backward()
    for process in found:
        assert_close(process["accumulated"], networks.gradients(model))


def test_ranges_that_follow_the_data_begin_each_forward_as_those_of_rank_0(found):
    first, second = (process["following"] for process in found)
    assert any(value.numel() for value in first.values())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_broadcast_ranges_reaches_a_process_that_has_none(networks, found):
    expected = {key: v for key, v in alone(networks, "residual").state_dict().items() if "quantizer" in key}
    for process in found:
        assert_close(process["broadcast known"], expected, tolerance=0)


def test_broadcast_ranges_forgets_what_the_first_process_does_not_know(found):
    for process in found:
        assert {value.numel() for value in process["broadcast unknown"].values()} == {0}


def test_broadcast_ranges_refuses_other_quantizers_in_every_process(found):
    words = (
        "InvalidValueError: 1._input_quantizer: expected the same quantizers in all processes, got it in 1, not in 0"
    )
    assert [process["other model"] for process in found] == [words] * 2


@pytest.mark.parametrize("key", ["0._input_quantizer._amax", "0._input_quantizer._amin", "1._input_quantizer._amax"])
def test_average_ranges_gives_every_process_the_mean_of_all(found, key):
    (first, after_first), (second, after_second) = (process["averaged"] for process in found)
    assert first[key] != second[key]
    assert after_first[key] == after_second[key] == (first[key] + second[key]) / 2


def test_average_ranges_leaves_parameters_and_other_ranges_alone(found):
    for before, after in (process["averaged"] for process in found):
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert changed == {"0._input_quantizer._amax", "0._input_quantizer._amin", "1._input_quantizer._amax"}


def test_average_ranges_names_a_process_that_saw_nothing_in_every_process(found):
    words = "model: expected known ranges that follow the data, got none for _input_quantizer in process 1"
    assert {process["averaged where one saw nothing"] for process in found} == {f"InvalidValueError: {words}"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_full_state_dict_of_shards_loads_into_a_model_of_one_process(networks, trained, found, name):
    state = found[0][f"fully sharded {name}"]["state"]
    model = freeze_batchnorm(networks.quantized(name, learned=True, calibrated=False))
    model.load_state_dict(state, strict=True)
    x, _ = networks.data(name)
    torch.testing.assert_close(model(x), trained[name](x), rtol=1e-4, atol=1e-4)


def test_a_state_of_one_process_loads_into_shards(networks, found):
    model = alone(networks, "residual")
    networks.train(model, networks.data("residual"), steps=1)
    halves = [process["sharded and loaded"][0] for process in found]
    assert sum(halves) / 2 == pytest.approx(networks.train(model, networks.data("residual"), steps=1)[0], rel=1e-5)


def test_a_sharded_model_is_printed_without_its_ranges(found):
    assert "amax=sharded learned" in found[0]["fully sharded cnn"]["repr"]


def test_mixed_precision_of_shards_leaves_fixed_ranges_in_float32(networks, found):
    state, expected = found[0]["mixed fixed"]["state"], alone(networks, "transformer", learned=False).state_dict()
    ranges = [key for key in expected if key.endswith("_amax")]
    assert all(torch.equal(state[key], expected[key]) for key in ranges)
    losses = torch.tensor([process["mixed fixed"]["losses"] for process in found]).mean(0)
    assert losses[-1] < losses[0]


def test_mixed_precision_of_shards_refuses_to_round_learned_ranges(found):
    for process in found:
        assert process["mixed learned"].startswith("InvalidValueError: amax: expected a learned range in float32")


def test_a_group_of_their_own_keeps_learned_ranges_in_float32(networks, found):
    model = alone(networks, "transformer").to(torch.bfloat16)  # ranges stay float32
    before = copy.deepcopy(model.state_dict())
    networks.train(model, networks.data("transformer"), "bfloat16", steps=1)
    state = found[0]["mixed learned in a group"]["state"]
    moved = [key for key in before if key.endswith("_amax") and not torch.equal(before[key], model.state_dict()[key])]
    assert len(moved) == sum(bool(q.descriptor.learn_amax) and not q.stands_by for _, q in named_quantizers(model))
    for key in moved:
        step, expected = state[key] - before[key], model.state_dict()[key] - before[key]
        torch.testing.assert_close(step, expected, rtol=0.05, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_frozen_ranges_may_be_groups_of_their_own(networks, found):
    model = alone(networks, "residual")
    for _, quantizer in named_quantizers(model):
        quantizer.requires_grad_(False)
    networks.train(model, networks.data("residual"))
    assert_close(found[0]["frozen in groups"], model.state_dict())


def test_a_share_of_a_range_that_runs_away_is_named_by_its_process(found):
    first, second = (process["watched"] for process in found)
    assert first.startswith("TrainingError: step 2:\n  0._weight_quantizer: expected amax within a factor 1024")
    assert second is None


@pytest.mark.parametrize("case", ["quantize sharded", "dequantize sharded"])
def test_what_changes_modules_refuses_a_sharded_model(found, case):
    for process in found:
        assert process[case].startswith("InvalidValueError: 0.weight: expected a parameter as a whole")


def test_a_sharded_range_is_set_in_every_process(found):
    assert [process["set a sharded range"] for process in found] == [1, 1]


def test_shards_are_calibrated_like_the_whole(networks, found):
    model = alone(networks, "residual")
    fq.calibrate(model, [3 * networks.data("residual")[0]], progress=False)
    expected = {key: value for key, value in model.state_dict().items() if "quantizer" in key}
    for process in found[:1]:
        assert_close(process["calibrate shards"], expected, tolerance=0)


def test_shards_are_checked(found):
    for process in found:
        assert "range" not in process["check shards"]


def test_broadcast_ranges_refuses_a_process_outside_of_the_group(found):
    first, second = (process["not in the group"] for process in found)
    assert first is None
    assert second == "InvalidValueError: group: expected one that has this process, 1, got one of [0]"


def test_broadcast_ranges_refuses_another_grid_in_every_process(found):
    for process in found:
        assert process["other grid"].startswith("InvalidValueError: 1._input_quantizer: expected the same grid in all")
