"""What a training step is timed on: the networks of the papers, and those of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Model = dict[str, Any]

STUDENTS: dict[str, tuple[Model, Model]] = {
    "mnv2": ({"name": "mobilenet-v2"}, {"name": "mobilenet-v2", "width": 0.125}),
    "rn18": ({"name": "resnet18"}, {"name": "resnet18", "width": 0.0625}),
}
"""Name in a case -> the network, and a narrow one of the same family."""
TEACHERS: dict[str, tuple[Model, Model]] = {
    "wrn-34-10": ({"name": "wide-resnet"}, {"name": "wide-resnet", "depth": 10, "widen_factor": 1}),
    "resnet-18": ({"name": "resnet18"}, {"name": "resnet18", "width": 0.125}),
}
CLEAN: tuple[Model, Model] = ({"name": "cifar-resnet", "depth": 56}, {"name": "cifar-resnet", "depth": 20})
"""The second teacher of the methods with two, as in MTARD."""

BATCH = {"wrn-34-10": 16, "resnet-18": 64}
"""On a CPU, so that a step takes seconds; on a GPU all have the papers' 128."""
GPU_BATCH = 128


@dataclass(frozen=True)
class Size:
    """Networks, images and the inner problem of one case; names are for the case, models for the recipe."""

    students: tuple[str, Model] = ("resnet18-w0.125", {"name": "resnet18", "width": 0.125, "stem_stride": 2})
    teachers: tuple[str, Model] = ("resnet18-w0.25", {"name": "resnet18", "width": 0.25, "stem_stride": 2})
    second: Model | None = None
    channels: int = 1
    pixels: int = 28
    batch: int = 64
    steps: int = 4
    step_size: str = "3/255"

    def name(self, method: str, *, teacher: bool) -> str:
        """Of a case, such as `dgad/mnv2/wrn-34-10`."""
        return "/".join([method, self.students[0], *([self.teachers[0]] if teacher else [])])

    def clean(self) -> Model:
        """The clean teacher of the methods with two."""
        return self.second or self.teachers[1]


QUICKSTART = Size()


def paper(student: str, teacher: str, *, device: str = "cpu", batch: int = 0) -> Size:
    """The papers' networks on colour images of 32 pixels, ten steps of 2/255; so many images, unless told."""
    return Size(
        students=(student, STUDENTS[student][0]),
        teachers=(teacher, TEACHERS[teacher][0]),
        second=CLEAN[0],
        channels=3,
        pixels=32,
        batch=batch or (BATCH[teacher] if device == "cpu" else GPU_BATCH),
        steps=10,
        step_size="2/255",
    )


def tiny(size: Size) -> Size:
    """Narrow networks of the same families on small images, for comparing what is computed."""
    small = replace(size, pixels=12, batch=16, steps=3)
    student, teacher = size.students[0], size.teachers[0]
    if student not in STUDENTS:
        return replace(
            small,
            students=(student, {"name": "resnet18", "width": 0.0625, "stem_stride": 2}),
            teachers=(teacher, {"name": "resnet18", "width": 0.125, "stem_stride": 2}),
        )
    return replace(small, students=(student, STUDENTS[student][1]), teachers=(teacher, TEACHERS[teacher][1]), second=CLEAN[1])
