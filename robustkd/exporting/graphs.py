"""Small questions about an ONNX graph that every pass asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from robustkd.errors import ConfigError, nearest


def producers(graph: Any) -> dict[str, Any]:
    """The node that writes each tensor."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: Any) -> dict[str, list[Any]]:
    """The nodes that read each tensor."""
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def weights(graph: Any) -> dict[str, Any]:
    """The constant tensors of a graph by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def title(node: Any) -> str:
    """A node in a sentence."""
    return node.name or f"the {node.op_type} that writes {node.output[0]}"


def layer_of(node: Any, constants: dict[str, Any]) -> str:
    """The layer of the network a node came from, by the name of its weight; empty where it has none."""
    named = next((name for name in node.input[1:2] if name in constants), "")
    return named.rpartition(".")[0]


def named(model: Any) -> Any:
    """The model, every node with a name of its own; passes tell nodes apart by it."""
    taken = {node.name for node in model.graph.node if node.name}
    seen: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            stem = f"{node.name or node.op_type}_{place}"
            node.name = next(name for name in (stem + "_" * more for more in range(len(taken) + 2)) if name not in taken)
            taken.add(node.name)
        seen.add(node.name)
    return model


def inferred(model: Any) -> Any:
    """The model with the type and shape of every tensor; what an earlier pass knew of them is forgotten."""
    import onnx

    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def without_orphans(model: Any) -> Any:
    """The model, its constants that nobody reads removed."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    left = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
    return model


def find_nodes(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """The names of the nodes meant: a node's own name, or the layer of the network it came from.

    Raises:
        ConfigError: no node is called so.
    """
    constants = weights(model.graph)
    known: dict[str, str] = {layer_of(node, constants): node.name for node in model.graph.node}
    known = {layer: node for layer, node in known.items() if layer} | {node.name: node.name for node in model.graph.node}
    wanted = tuple(names)
    for name in wanted:
        if name not in known:
            layers = [layer for layer in known if "." in layer or layer.startswith("node_")]
            raise ConfigError(
                f"the graph has no node {name}",
                where="--keep-fp32",
                fix=nearest(name, layers[:40] if len(layers) > 40 else layers),
            )
    return tuple(dict.fromkeys(known[name] for name in wanted))
