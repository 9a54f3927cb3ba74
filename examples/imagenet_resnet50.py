"""The whole int8 recipe on ImageNet: calibrate, compare methods, fine-tune one epoch, export, validate.

    python examples/imagenet_resnet50.py /data/imagenet

The folder holds train/ and val/ with one folder a class, as torchvision.datasets.ImageFolder
reads them. The recipe is that of Wu et al. 2020 (arXiv:2004.09602): histograms of 1024
training images, the best of several calibration methods, then quantization-aware
fine-tuning at 1 % of the original learning rate with a cosine schedule and frozen BatchNorm.
"""

import argparse
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, models, transforms
from tqdm import tqdm

import fakequant as fq
from fakequant.export import ValidationReport

METHODS = [
    ("max", {}),
    ("percentile 99.9", {"percentile": 99.9}),
    ("percentile 99.99", {"percentile": 99.99}),
    ("mse", {}),
    ("entropy", {}),
]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="resnet50", help="any torchvision classifier")
    parser.add_argument("--weights", default="IMAGENET1K_V2", help="name in torchvision, path of a checkpoint, or none")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the ONNX files and the checkpoint")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--resize", type=int, default=232, help="length of the shorter side before the crop")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--calibration-images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning; 0 for none")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="1 %% of what the model was trained with")
    parser.add_argument("--validation-batches", type=int, default=4, help="to compare with ONNX Runtime")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def load_data(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return batches for fine-tuning (augmented), calibration (training images) and evaluation."""
    end = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    plain = transforms.Compose([transforms.Resize(args.resize), transforms.CenterCrop(args.image_size), *end])
    flip = transforms.RandomHorizontalFlip()
    augmented = transforms.Compose([transforms.RandomResizedCrop(args.image_size), flip, *end])
    train = datasets.ImageFolder(args.data / "train", augmented)
    unaugmented = datasets.ImageFolder(args.data / "train", plain)
    chosen = torch.randperm(len(train))[: args.calibration_images].tolist()
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": args.device == "cuda"}
    return (
        DataLoader(train, shuffle=True, drop_last=len(train) > args.batch_size, **options),
        DataLoader(Subset(unaugmented, chosen), **options),
        DataLoader(datasets.ImageFolder(args.data / "val", plain), **options),
    )


def load_model(name: str, weights: str, num_classes: int) -> nn.Module:
    """Return a float classifier: pretrained, from a checkpoint, or untrained."""
    path = Path(weights)
    if weights != "none" and not path.is_file():
        return models.get_model(name, weights=weights)
    model = models.get_model(name, weights=None, num_classes=num_classes)
    if path.is_file():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint.get("state_dict", checkpoint))
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str) -> float:
    """Return the share of right answers, in percent."""
    model.eval()
    right = total = 0
    for images, labels in tqdm(batches, desc="evaluate", leave=False):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100 * right / total


def fine_tune(model: nn.Module, batches: DataLoader, epochs: int, learning_rate: float, device: str) -> None:
    """Train the quantized model; ranges and BatchNorm statistics stay fixed."""
    fq.freeze_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        for images, labels in tqdm(batches, desc=f"fine-tune, epoch {epoch + 1}"):
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def export(model: nn.Module, path: Path, batches: DataLoader, num_batches: int) -> ValidationReport:
    """Write an int8 file that takes any batch size, and compare it with torch."""
    model = copy.deepcopy(model).cpu()
    images, _ = next(iter(batches))
    batch = ({0: torch.export.Dim("batch")},)
    # Two examples at least: torch.export takes a dimension of size 1 for a constant.
    print(fq.export_onnx(model, (images[:1].repeat(2, 1, 1, 1),), path, dynamic_shapes=batch))
    report = fq.validate_onnx(path, model, batches, num_batches=num_batches)
    print(report)
    return report


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run everything, print one table, and return its accuracies in percent."""
    args = parse(arguments)
    torch.manual_seed(0)
    train, calibration_data, val = load_data(args)
    model = load_model(args.model, args.weights, len(val.dataset.classes)).to(args.device)
    table = {"float": accuracy(model, val, args.device)}

    example, _ = next(iter(calibration_data))
    print(fq.quantize(model, "int8", example_inputs=example.to(args.device)))
    # One pass over the data collects what every method needs.
    calibration = fq.calibrate(
        model, calibration_data, method="entropy", forward=lambda model, batch: model(batch[0].to(args.device))
    )
    for name, options in METHODS:
        calibration.apply(name.split()[0], **options)
        table[f"int8 PTQ, {name}"] = accuracy(model, val, args.device)
    best, options = max(METHODS, key=lambda method: table[f"int8 PTQ, {method[0]}"])
    calibration.apply(best.split()[0], **options)
    print(f"best method: {best}")

    args.output.mkdir(parents=True, exist_ok=True)
    reports = {"int8 PTQ": export(model, args.output / f"{args.model}_ptq.onnx", val, args.validation_batches)}
    if args.epochs:
        fine_tune(model, train, args.epochs, args.learning_rate, args.device)
        table[f"int8 QAT from {best}"] = accuracy(model, val, args.device)
        torch.save(model.state_dict(), args.output / f"{args.model}_qat.pth")
        reports["int8 QAT"] = export(model, args.output / f"{args.model}_qat.onnx", val, args.validation_batches)

    print(f"\n{args.model}, {len(val.dataset)} images{'top-1':>34}")
    for name, percent in table.items():
        print(f"{name:<50}{percent:>8.2f} %")
    for name, report in reports.items():
        print(f"{name}, the file against torch: {report.simulated}")
    return table


if __name__ == "__main__":
    main()
