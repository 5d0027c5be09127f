"""The optional parts of an installation: what each enables and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Extra:
    """One extra of the package (`core` stands for what every installation has)."""

    name: str
    modules: tuple[str, ...]
    enables: str

    @property
    def install(self) -> str:
        """The line that installs it."""
        return "pip install robustkd" if self.name == "core" else f"pip install 'robustkd[{self.name}]'"

    def missing(self) -> list[str]:
        """Modules of the extra that are not installed; none is imported to find out."""
        return [module for module in self.modules if find_spec(module) is None]


EXTRAS = (
    Extra(
        "core",
        (
            "numpy",
            "pydantic",
            "yaml",
            "rich",
            "filelock",
            "safetensors",
            "scipy",
            "pyarrow",
            "onnx",
            "onnxruntime",
        ),
        "load recipes, verify bundles, run an exported ONNX file",
    ),
    Extra(
        "train",
        ("torch", "torchvision", "accelerate", "onnxscript", "pyautoattack", "tensorboard"),
        "distill students, export checkpoints, attack with gradients and AutoAttack",
    ),
    Extra("hub", ("huggingface_hub",), "fetch teachers from the Hugging Face Hub"),
    Extra("timm", ("timm",), "take clean teachers from timm"),
    Extra("rtx", ("tensorrt_rtx",), "build TensorRT-RTX engines, with or without a GPU, and run them on GeForce and RTX GPUs"),
    Extra("report", ("jinja2", "matplotlib"), "write report.html"),
    Extra(
        "dev",
        ("pytest", "pytest_timeout", "hypothesis", "mypy", "ruff", "importlinter", "build", "hatchling"),
        "run the tests and checks of robustkd itself",
    ),
    Extra("docs", ("mkdocs", "material", "mkdocstrings"), "build the documentation site"),
)


def extra_of(module: str) -> Extra | None:
    """The extra that brings a module, or None if the module is none of ours to install."""
    return next((extra for extra in EXTRAS if module in extra.modules), None)
