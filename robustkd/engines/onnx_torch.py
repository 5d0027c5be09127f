"""An ONNX file through the differentiable importer: slower than a runtime, but with a gradient and on any torch device."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from robustkd.engines._onnx_file import precision_of, read_model
from robustkd.engines.importer.load import import_onnx
from robustkd.engines.importer.module import OnnxModule
from robustkd.engines.importer.node import Rounding
from robustkd.engines.pytorch import PytorchEngine


class OnnxTorchEngine(PytorchEngine):
    """Runs an `.onnx` file of fp32, fp16 or QDQ int8 as a torch module.

    Args:
        path: the file; its batch dimension may be free or fixed.
        rounding: how a gradient passes a rounding; does not change the logits.
        device: where to run.

    Raises:
        ArtifactError: the file is missing, damaged, not an image classifier, or holds an operator that is not covered.
        RequirementError: the onnx package is missing.
    """

    summary: ClassVar[str] = ".onnx files as a torch module with gradients: the twin an audit attacks through"
    differentiable: ClassVar[bool] = True

    def __init__(self, path: Path, *, rounding: Rounding = "masked", device: torch.device | str = "cpu") -> None:
        module: OnnxModule = import_onnx(path, rounding=rounding).to(device)
        super().__init__(
            module, input_shape=module.input_shape, classes=module.classes, precision=precision_of(read_model(path))
        )
        settings = {**self.info.settings, "opset": module.opset, "rounding": rounding}
        self.info = self.info.model_copy(update={"runtime": "onnx-torch", "settings": settings})


ENTRY = OnnxTorchEngine
