"""Quantization-aware training in a loop of one's own, to be stopped and resumed at any epoch.

    python examples/train_loop.py digits                               (some seconds on a CPU)
    python examples/train_loop.py digits --resume digits/epoch_2.pt    (in a new process, the same bit by bit)

A network with 4-bit weights, whose ranges are learned, and 8-bit activations, on scikit-learn's digits.
Accumulated and clipped gradients, bfloat16 autocast, an average of the weights (EMA) and the checkpoints are
what they are for a float network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fakequant as fq
from fakequant.demo.quickstart import DigitNet, accuracy, load_digits, train

FLOAT_EPOCHS, EPOCHS, MICRO_BATCH, ACCUMULATE = 4, 3, 32, 2
STEPS = EPOCHS * 19  # 1257 digits make 19 steps of 2 x 32 an epoch
WEIGHTS = fq.QuantDescriptor(4, axis=0, narrow_range=True, learn_amax="lsq")


class Training:
    """A quantized model and all that its training has to remember."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        groups = fq.qat.parameter_groups(model, lr=0.02, weight_decay=1e-4)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.schedule = fq.qat.FineTuning(lr=0.02, steps=STEPS).scheduler(self.optimizer)
        self.phases = fq.qat.Phases(model, {STEPS // 2: fq.freeze_batchnorm})
        self.epoch = 0

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Whatever has a state."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}

    def save(self, path: Path) -> None:
        """Write a checkpoint; with the manifest, the float network is all that one needs besides."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        rest = {"manifest": fq.manifest_of(self.model), "epoch": self.epoch, "random": torch.get_rng_state()}
        torch.save({**state, **rest}, path)

    @classmethod
    def load(cls, path: Path) -> "Training":
        """Return the training as it was when it wrote a checkpoint."""
        checkpoint = torch.load(path, weights_only=True)
        training = cls(fq.quantize_like(DigitNet(), checkpoint["manifest"]))
        for name, part in training.parts.items():
            part.load_state_dict(checkpoint[name])
        training.epoch = checkpoint["epoch"]
        torch.set_rng_state(checkpoint["random"])
        return training

    def run_epoch(self, images: Tensor, labels: Tensor) -> None:
        """Train for one epoch."""
        self.model.train()
        for batch in torch.randperm(len(labels)).split(MICRO_BATCH * ACCUMULATE)[: STEPS // EPOCHS]:
            self.phases.step()
            for part in batch.split(MICRO_BATCH):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(self.model(images[part]), labels[part], label_smoothing=0.1)
                (loss / ACCUMULATE).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.average.update_parameters(self.model)
        self.model.eval()
        self.epoch += 1


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, write checkpoints and the result, print the table, and return it: accuracy in percent by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoints and the result")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    training, test = load_digits()
    table = {}

    if args.resume is not None:
        run = Training.load(args.resume)
    else:
        model = DigitNet()
        train(model, training, epochs=FLOAT_EPOCHS, learning_rate=0.1)
        table["float"] = accuracy(model, test)
        recipe = fq.preset("int8") + fq.Rule(weight=WEIGHTS)
        fq.quantize(model, recipe, example_inputs=training[0][:64], target="onnxruntime")
        fq.calibrate(model, training[0][:512].split(64), progress=False)
        table["4-bit weights, calibrated"] = accuracy(model, test)
        run = Training(model)
        print(fq.qat.check(model, [training[0][:64]], optimizer=run.optimizer))
    while run.epoch < EPOCHS:
        run.run_epoch(*training)
        run.save(args.output / f"epoch_{run.epoch}.pt")
    trained = run.average.module.eval()
    table["4-bit weights, trained"] = accuracy(run.model, test)
    table["4-bit weights, trained, average"] = accuracy(trained, test)

    torch.save(trained, args.output / "model.pt")  # the whole model: its classes are those of the modules
    fq.save_quantized(trained, args.output / "model.safetensors")  # for fq.load_quantized(DigitNet(), path)
    file, batch = args.output / "model.onnx", torch.export.Dim("batch")
    fq.export_onnx(trained, (training[0][:2],), file, target="onnxruntime", dynamic_shapes=({0: batch},))
    print(fq.validate_onnx(file, trained, [test]))
    for name, percent in table.items():
        print(f"{name:<34}{percent:>7.2f} %")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # for layers this small, more threads mostly wait for each other
    main()
