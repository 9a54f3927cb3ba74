"""Quantization-aware training with PyTorch Lightning: mixed precision, an average of the weights, resume.

    python examples/train_lightning.py digits

A LightningModule holds a quantized network as it would hold a float one. Training stops after half of the
epochs and goes on from the checkpoint in a new Trainer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import fakequant as fq
from fakequant.demo.quickstart import DigitNet, accuracy, load_digits, train

EPOCHS = 4


class Classifier(pl.LightningModule):
    """Trains any classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def on_train_start(self) -> None:
        fq.freeze_batchnorm(self.net)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels, label_smoothing=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("accuracy", accuracy(self.net, batch), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(model: Classifier, loaders: list[DataLoader], folder: Path, epochs: int, resume: str | None = None) -> str:
    """Train up to an epoch and return the path of the last checkpoint."""
    checkpoints = ModelCheckpoint(folder, save_top_k=0, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[checkpoints, WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.95))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.train()  # Lightning trains in the mode that it finds
    trainer.fit(model, *loaders, ckpt_path=resume)
    return checkpoints.last_model_path


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, export, print the table, and return it: accuracy in percent by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoints and the ONNX file")
    args = parser.parse_args(arguments)
    pl.seed_everything(0)
    training, test = load_digits()
    loaders = [
        DataLoader(TensorDataset(*training), batch_size=32, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(*test), batch_size=len(test[1])),
    ]
    model = DigitNet()
    train(model, training, epochs=4, learning_rate=0.1)
    table = {"float": accuracy(model, test)}
    fq.quantize(model, "int8", example_inputs=training[0][:64], target="onnxruntime")
    fq.calibrate(model, loaders[0], method="max", num_batches=16, progress=False)
    table["int8, calibrated"] = accuracy(model, test)

    checkpoint = fit(Classifier(model), loaders, args.output, EPOCHS // 2)
    # A new process would have no more than this: the float network and the checkpoint.
    resumed = DigitNet()
    fq.quantize(resumed, "int8", example_inputs=training[0][:64], target="onnxruntime")
    fit(Classifier(resumed), loaders, args.output, EPOCHS, resume=checkpoint)
    table["int8, trained, average"] = accuracy(resumed.eval(), test)

    file, batch = args.output / "digits.onnx", torch.export.Dim("batch")
    fq.export_onnx(resumed, (training[0][:2],), file, target="onnxruntime", dynamic_shapes=({0: batch},))
    print(fq.validate_onnx(file, resumed, [test]))
    for name, percent in table.items():
        print(f"{name:<34}{percent:>7.2f} %")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # for layers this small, more threads mostly wait for each other
    main()
