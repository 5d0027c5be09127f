"""From an ONNX file to a torch module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustkd.engines._onnx_file import damaged, read_model
from robustkd.engines.importer.module import OnnxModule
from robustkd.engines.importer.node import Rounding, Settings
from robustkd.engines.importer.program import as_scores, read_program


def import_onnx(source: Path | Any, *, rounding: Rounding = "masked", log_probabilities: bool = False) -> OnnxModule:
    """An image classifier in ONNX as a module: images (N, C, H, W) in float32 to logits (N, K), differentiable.

    Args:
        source: a file, or a ModelProto with all weights inside.
        rounding: how a gradient passes a rounding.
        log_probabilities: where the graph ends in a softmax, return its logarithm, which keeps the scores and a gradient.

    Raises:
        ArtifactError: the file is missing or damaged, is no image classifier, or holds an operator, an attribute, a type or an
            opset that is not covered; the message names it.
        RequirementError: the onnx package is missing.
    """
    where = str(source) if isinstance(source, Path) else "the graph given"
    model = _complete(source) if isinstance(source, Path) else source
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    program = read_program(model, Settings(rounding), where)
    return OnnxModule(as_scores(program) if log_probabilities else program).eval()


def _complete(file: Path) -> Any:
    """The ModelProto of a file, with the weights that lie beside it."""
    model = read_model(file)
    from onnx import TensorProto, checker
    from onnx.external_data_helper import load_external_data_for_model

    if any(weight.data_location == TensorProto.EXTERNAL for weight in model.graph.initializer):
        try:
            load_external_data_for_model(model, str(file.parent))
        except (OSError, ValueError, checker.ValidationError) as error:
            raise damaged(file, f"its weights lie in another file, which cannot be read ({error})") from error
    return model
