"""All architectures by name, in the order of the table."""

import detection
import timm_models
import torchvision_models
import transformers_models
import yolo
from architecture import Architecture

_FAMILIES = (torchvision_models, timm_models, detection, yolo, transformers_models)

ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for family in _FAMILIES for entry in family.ARCHITECTURES}
