"""Quantization-aware training with the pieces of timm's train loop: optimizer, scheduler, scaler, EMA, saver.

    python examples/train_timm.py digits

One of timm's smallest EfficientNets, in channels_last, on scikit-learn's digits; it is trained for TensorRT.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3, NativeScaler
from torch import Tensor, nn

import fakequant as fq
from fakequant.demo.quickstart import Split, accuracy, load_digits, train

EPOCHS, BATCH = 2, 64
AVERAGES = {"v2": ModelEmaV2, "v3": ModelEmaV3}


def build() -> nn.Module:
    """Return the float network."""
    return timm.create_model("test_efficientnet", in_chans=1, num_classes=10).to(memory_format=torch.channels_last)


def enlarged(split: Split) -> Split:
    """Return images of 32x32 pixels, which is what the network halves four times."""
    images = F.interpolate(split[0], scale_factor=4, mode="bilinear")
    return images.to(memory_format=torch.channels_last), split[1]


def quantized(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the model with quantizers."""
    fq.quantize(model, "int8", example_inputs=example, target="tensorrt")
    return model


def fine_tune(
    model: nn.Module, training: Split, test: Split, folder: Path, average_of: str = "v3"
) -> tuple[nn.Module, Path]:
    """Train as timm's train.py does; return the average of the weights and the path of the best checkpoint."""
    images, labels = training
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.005, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS)
    scaler, loss_function = NativeScaler(device="cpu"), LabelSmoothingCrossEntropy(0.1)
    average = AVERAGES[average_of](model, decay=0.9)
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=average, amp_scaler=scaler, checkpoint_dir=str(folder))
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_function(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model)
        model.eval()
        percent = accuracy(average.module, test)
        scheduler.step(epoch + 1, percent)
        saver.save_checkpoint(epoch, percent)
    return average.module, folder / "model_best.pth.tar"


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, export, print the table, and return it: accuracy in percent by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoints and the ONNX file")
    parser.add_argument("--ema", choices=AVERAGES, default="v3", help="timm's class that averages the weights")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    training, test = (enlarged(split) for split in load_digits())
    model = build()
    train(model, training, epochs=3, learning_rate=0.05)
    table = {"float": accuracy(model, test)}

    quantized(model, training[0][:64])
    fq.calibrate(model, training[0][:512].split(64), method="mse", progress=False)
    table["int8, calibrated"] = accuracy(model, test)
    average, checkpoint = fine_tune(model, training, test, args.output, args.ema)
    table["int8, trained"] = accuracy(model, test)
    table["int8, trained, average"] = accuracy(average, test)

    loaded = quantized(build(), training[0][:64]).eval()
    load_checkpoint(loaded, str(checkpoint), use_ema=True)
    table["int8, trained, average of the best epoch"] = accuracy(loaded, test)

    file, batch = args.output / "digits.onnx", torch.export.Dim("batch")
    fq.export_onnx(average, (training[0][:2],), file, target="tensorrt", dynamic_shapes=({0: batch},))
    print(fq.validate_onnx(file, average, [test]))
    for name, percent in table.items():
        print(f"{name:<42}{percent:>7.2f} %")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # for layers this small, more threads mostly wait for each other
    main()
