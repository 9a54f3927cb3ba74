"""Quantization-aware training with the Trainer of Hugging Face: checkpoints, resume, the best model at the end.

    python examples/train_transformers.py digits

A small vision transformer on scikit-learn's digits, from its configuration (nothing is downloaded), with
activation checkpointing, accumulated gradients and bfloat16. The Trainer saves safetensors, and resumes from them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fakequant as fq
from fakequant.demo.quickstart import Splits, load_digits

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1, "vision_use_head": False}
CONFIG = SiglipConfig(vision_config={**LAYERS, **IMAGES}, num_labels=10)


class Digits(Dataset):
    """What a Trainer wants: dicts of keyword arguments."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right answers, in percent."""
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(model: PreTrainedModel, splits: Splits, folder: Path, **options: Any) -> Trainer:
    """Return a Trainer that writes a checkpoint each epoch and ends with the best."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=180,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    train, test = (Digits(*split) for split in splits)
    return Trainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=score)


def quantized(model: PreTrainedModel, example: Tensor) -> PreTrainedModel:
    """Return the model with quantizers."""
    fq.quantize(model, "int8", example_inputs={"pixel_values": example}, target="onnxruntime")
    return model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, export, print the table, and return it: accuracy in percent by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoints and the ONNX file")
    args = parser.parse_args(arguments)
    set_seed(0)
    splits = training, test = load_digits()
    model: PreTrainedModel = SiglipForImageClassification(CONFIG)
    run = trainer(model, splits, args.output / "float", num_train_epochs=6, learning_rate=5e-3)
    run.train()
    run.save_model()
    table = {"float": run.evaluate()["eval_accuracy"]}

    model = quantized(SiglipForImageClassification.from_pretrained(args.output / "float"), training[0][:64])
    fq.calibrate(model, training[0][:512].split(64), progress=False)
    options = {"num_train_epochs": 2, "learning_rate": 3e-4, "bf16": True, "activation_checkpointing": True}
    run = trainer(model, splits, args.output / "int8", **options)
    run.train()
    table["int8, trained"] = run.evaluate()["eval_accuracy"]

    # A new process would have no more than this: the float network and the folder of checkpoints.
    resumed = quantized(SiglipForImageClassification(CONFIG), training[0][:64])
    first = min((args.output / "int8").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    run = trainer(resumed, splits, args.output / "resumed", **options)
    run.train(resume_from_checkpoint=str(first))
    table["int8, trained, resumed"] = run.evaluate()["eval_accuracy"]

    resumed = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)  # without the autocast of bf16=True
    file, batch = args.output / "digits.onnx", torch.export.Dim("batch")
    fq.export_onnx(resumed, (training[0][:2],), file, target="onnxruntime", dynamic_shapes=({0: batch},))
    print(fq.validate_onnx(file, resumed, [test]))
    for name, percent in table.items():
        print(f"{name:<34}{percent:>7.2f} %")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)  # for layers this small, more threads mostly wait for each other
    main()
