"""The examples of trainers, run as they are: what they print, and that their checkpoints hold everything."""

import contextlib
import importlib.util
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fakequant as fq
from fakequant.demo.quickstart import DigitNet, load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the tests run against an installed wheel, not a checkout"),
]


class Run(NamedTuple):
    """What an example gave: its table, its folder, and what it printed."""

    table: dict[str, float]
    folder: Path
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], Run]:
    """Run an example in this process."""

    def run(name: str) -> Run:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums, and so the accuracies, do not depend on the machine's cores
        folder = tmp_path_factory.mktemp(name)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                table = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"]([str(folder)])
            return Run(table, folder, output.getvalue())
        finally:
            torch.set_num_threads(threads)

    return run


def package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def check_validation(output: str) -> None:
    """Check what ``validate_onnx`` printed: the file computes what torch does, but for single steps."""
    (found,) = re.findall(r"optimizations off: .* agreement ([\d.]+)%, (\d+) steps", output)
    agreement, steps = float(found[0]), int(found[1])
    assert agreement > 99.5
    assert steps <= 1


def integer_weights(file: Path) -> int:
    tensors = onnx.load(file).graph.initializer
    return sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 for tensor in tensors)


def same(first: object, second: object) -> bool:
    """Whether two checkpoints are one, bit by bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two processes: one trains from beginning to end, one goes on from the first's first epoch."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "resumed")}
    for folder, resume in zip(folders.values(), ([], ["--resume", folders["whole"] / "epoch_1.pt"]), strict=True):
        command = [sys.executable, "-W", "error", EXAMPLES / "train_loop.py", folder, *resume]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "output.txt").write_text(done.stdout)
    return folders


class TestLoop:
    """examples/train_loop.py."""

    @pytest.mark.parametrize("epoch", [2, 3])
    def test_a_resumed_training_is_the_uninterrupted_one(self, folders, epoch):
        whole, resumed = (torch.load(folder / f"epoch_{epoch}.pt", weights_only=True) for folder in folders.values())
        assert whole["epoch"] == epoch
        assert same(whole, resumed)

    def test_its_result_is_the_same_file(self, folders):
        whole, resumed = ((folder / "model.onnx").read_bytes() for folder in folders.values())
        assert whole == resumed

    def test_training_recovers_what_4_bits_lost(self, folders):
        rows = [line.split() for line in (folders["whole"] / "output.txt").read_text().splitlines() if line[-1:] == "%"]
        percent = {" ".join(row[:-2]): float(row[-2]) for row in rows}
        assert percent["float"] > 98
        assert percent["4-bit weights, trained, average"] >= percent["4-bit weights, calibrated"]
        assert percent["4-bit weights, trained, average"] > percent["float"] - 0.5

    def test_the_check_before_training_finds_no_problem(self, folders):
        assert "no problem" in (folders["whole"] / "output.txt").read_text()

    def test_learned_ranges_are_averaged_too(self, folders):
        checkpoint = torch.load(folders["whole"] / "epoch_1.pt", weights_only=True)
        name = "block1.conv1._weight_quantizer._amax"
        model, average = checkpoint["model"][name], checkpoint["average"][f"module.{name}"]
        assert not torch.equal(model, average)
        assert (model / average - 1).abs().max() < 0.2

    def test_the_whole_model_and_the_file_with_a_manifest_are_the_exported_one(self, folders):
        folder, (_, test) = folders["whole"], load_digits()
        whole = torch.load(folder / "model.pt", weights_only=False)
        rebuilt = fq.load_quantized(DigitNet(), folder / "model.safetensors").eval()
        torch.testing.assert_close(rebuilt(test[0]), whole(test[0]), rtol=0, atol=0)
        check_validation((folder / "output.txt").read_text())
        assert integer_weights(folder / "model.onnx") == 7


@pytest.fixture(scope="module")
def lightning(run, torchvision_models) -> Run:
    package("pytorch_lightning")  # its torchmetrics imports torchvision
    return run("train_lightning")


class TestLightning:
    """examples/train_lightning.py."""

    def test_int8_is_as_accurate_as_float(self, lightning):
        table = lightning.table
        assert table["float"] > 98
        assert table["int8, trained, average"] > table["float"] - 1

    def test_the_checkpoint_has_both_the_model_and_its_average_with_their_ranges(self, lightning):
        checkpoint = torch.load(lightning.folder / "last.ckpt", weights_only=True)
        model, average = checkpoint["current_model_state"], checkpoint["state_dict"]
        ranges = [name for name in model if name.endswith("_amax")]
        assert len(ranges) >= 14  # input and weight of 7 layers
        assert all(torch.equal(model[name], average[name]) and model[name].numel() for name in ranges)
        assert checkpoint["epoch"] == 4  # all of them, in two parts

    def test_the_file_is_what_was_trained(self, lightning):
        check_validation(lightning.output)
        assert integer_weights(lightning.folder / "digits.onnx") == 7


@pytest.fixture(scope="module")
def transformers(run, torchvision_models) -> Run:
    for name in ("transformers", "accelerate"):
        package(name)
    import transformers

    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        pytest.skip("transformers is too old: it calls activation checkpointing by another name")
    return run("train_transformers")


class TestTransformers:
    """examples/train_transformers.py."""

    def test_int8_is_as_accurate_as_float(self, transformers):
        table = transformers.table
        assert table["float"] > 88
        assert table["int8, trained"] > table["float"] - 2

    def test_a_resumed_training_is_the_uninterrupted_one(self, transformers):
        table, folder, _ = transformers
        whole, resumed = (folder / name / "checkpoint-40" for name in ("int8", "resumed"))
        assert same(load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors"))
        assert same(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (whole, resumed)))
        assert table["int8, trained, resumed"] == table["int8, trained"]

    def test_a_checkpoint_has_each_shared_range_once(self, transformers):
        state = load_file(transformers.folder / "int8" / "checkpoint-40" / "model.safetensors")
        shared = [
            name for name in state if name.endswith(("q_proj._input_quantizer._amax", "k_proj._input_quantizer._amax"))
        ]
        assert len(shared) == 2  # one a layer

    def test_the_file_is_what_was_trained(self, transformers):
        check_validation(transformers.output)
        assert integer_weights(transformers.folder / "digits.onnx") == 14  # patches, 6 in each of 2 layers, head


@pytest.fixture(scope="module")
def timm(run, torchvision_models) -> Run:
    package("timm")
    return run("train_timm")


class TestTimm:
    """examples/train_timm.py."""

    def test_int8_is_as_accurate_as_float(self, timm):
        table = timm.table
        assert table["float"] > 90
        assert table["int8, trained, average"] > table["float"] - 1.5

    def test_the_best_checkpoint_is_the_average_of_its_epoch(self, timm):
        best = torch.load(timm.folder / "model_best.pth.tar", weights_only=True)
        last = torch.load(timm.folder / "last.pth.tar", weights_only=True)
        assert timm.table["int8, trained, average of the best epoch"] == best["metric"]
        assert best["metric"] == max(best["metric"], last["metric"])

    def test_a_checkpoint_resumes(self, timm):
        from timm.models import resume_checkpoint

        example = runpy.run_path(str(EXAMPLES / "train_timm.py"))
        images = example["enlarged"](load_digits()[0])[0][:64]
        model, saved = example["quantized"](example["build"](), images), timm.folder / "last.pth.tar"
        resume_checkpoint(model, str(saved))
        assert same(dict(model.state_dict()), dict(torch.load(saved, weights_only=True)["state_dict"]))

    def test_the_older_average_does_it_too(self, timm, tmp_path):
        example = runpy.run_path(str(EXAMPLES / "train_timm.py"))
        training, test = ((images[:128], labels[:128]) for images, labels in map(example["enlarged"], load_digits()))
        model = example["quantized"](example["build"](), training[0][:64])
        fq.calibrate(model, [training[0][:64]], progress=False)
        average, _ = example["fine_tune"](model, training, test, tmp_path, "v2")
        checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
        assert same(dict(average.state_dict()), dict(checkpoint["state_dict_ema"]))
        weight = "conv_stem.weight"
        assert not torch.equal(average.state_dict()[weight], model.state_dict()[weight])
        for name, value in model.state_dict().items():
            if name.endswith("_amax"):
                torch.testing.assert_close(average.state_dict()[name], value)

    def test_the_average_has_the_ranges_of_the_model(self, timm):
        checkpoint = torch.load(timm.folder / "last.pth.tar", weights_only=True)
        model, average = checkpoint["state_dict"], checkpoint["state_dict_ema"]
        ranges = [name for name in model if name.endswith("_amax")]
        assert len(ranges) > 20
        assert all(torch.equal(model[name], average[name]) and model[name].numel() for name in ranges)

    def test_the_file_is_what_was_trained(self, timm):
        check_validation(timm.output)
        assert integer_weights(timm.folder / "digits.onnx") > 10
