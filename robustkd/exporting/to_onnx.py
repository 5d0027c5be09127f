"""Write a network as one self-contained ONNX file: images in [0, 1] in, raw logits out, any batch size."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustkd import __version__
from robustkd.bundle import write_atomic
from robustkd.engines._onnx_file import PREFIX
from robustkd.engines.pytorch import evaluating
from robustkd.errors import NumericsError, RequirementError

INPUT, OUTPUT = "images", "logits"

_log = logging.getLogger(__name__)


def to_onnx(
    net: nn.Module,
    file: Path,
    *,
    input_shape: tuple[int, int, int],
    classes: Sequence[str],
    opset: int = 20,
    max_batch: int = 1024,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Export a network that maps (N, C, H, W) in [0, 1] to logits (N, K); its training flags are left as they were.

    Args:
        net: the network, with its normalisation inside.
        file: where to write; replaced whole.
        input_shape: C, H, W.
        classes: the class names, K of them.
        opset: of the ONNX standard operators.
        max_batch: the largest N promised; 1 fixes the batch.
        metadata: more entries of the graph's metadata, without the prefix `robustkd.`.

    Raises:
        RequirementError: the exporter is not installed, or cannot write this network.
        NumericsError: the graph written is not valid ONNX.
    """
    facts = {
        "version": __version__,
        "input_shape": json.dumps(input_shape),
        "input_range": "[0.0, 1.0]",
        "classes": json.dumps(list(classes)),
        "max_batch": str(max_batch),
        **(metadata or {}),
    }
    with evaluating(net), _quiet():
        model = _trace(net, input_shape, opset, max_batch)
    _clean(model)
    for key, value in sorted(facts.items()):
        model.metadata_props.add(key=PREFIX + key, value=value)
    _validate(model)
    write_atomic(file, model.SerializeToString(deterministic=True))
    return file


def _trace(net: nn.Module, input_shape: tuple[int, int, int], opset: int, max_batch: int) -> Any:
    """The ModelProto with all weights inside."""
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so only deep inside
    except ImportError as error:
        raise RequirementError(
            "exporting to ONNX needs onnxscript", where=str(error), fix="pip install 'robustkd[train]'"
        ) from error
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    # an example of two images: torch.export specialises on sizes 0 and 1
    example = torch.zeros(min(2, max_batch), *input_shape, device=device)
    shapes = None if max_batch == 1 else ({0: torch.export.Dim("batch", min=1, max=max_batch)},)
    try:
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            external_data=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise RequirementError(
            f"torch {torch.__version__} cannot export {type(net).__name__} at opset {opset}",
            where=str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__,
            fix="use a network of `robustkd list students`, or another torch or opset",
        ) from error
    if program is None:
        raise RequirementError("torch's exporter returned nothing", where=f"torch {torch.__version__}", fix="use torch >= 2.6")
    return program.model_proto


def _clean(model: Any) -> None:
    """Drop the exporter's debugging notes: they hold source code and paths of this machine."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.ClearField("doc_string")


def _validate(model: Any) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise NumericsError(
            f"the exporter wrote a graph that is not valid ONNX: {error}",
            where=f"torch {torch.__version__}, onnx {onnx.__version__}",
            fix="try another opset or torch version",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what the exporter prints and warns to the log: stdout is for the product, stderr for progress."""
    said = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("always")
            yield
    finally:
        for warning in caught:
            _log.debug("exporter warned: %s", warning.message)
        for line in said.getvalue().splitlines():
            _log.debug("exporter: %s", line)
