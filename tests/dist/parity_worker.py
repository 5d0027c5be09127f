"""Trains some methods without batch statistics, alone or as one of several processes; keeps each student's weights.

Usage: parity_worker.py FOLDER METHOD... with FOLDER/METHOD.yaml. Leaves FOLDER/METHOD-of-N.safetensors of N processes.

Batch norms are of a process's own images, in every framework, so the student here has group norms. Everything is float64, for
a gradient near zero may change its sign when float32 adds in another order.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from robustkd.cli.app import run
from robustkd.models._files import portable
from robustkd.models.resnet18 import ENTRY as ResNet18
from robustkd.training.batches import Batches
from robustkd.training.loop import Loop

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def grouped(net: nn.Module) -> nn.Module:
    """Every batch norm replaced by a group norm of one group."""
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(net, name, nn.GroupNorm(1, child.num_features))
        else:
            grouped(child)
    return net


def patch() -> None:
    made, start, epoch = ResNet18._net, Loop.__init__, Batches.epoch

    def begun(self, *args, **named):
        start(self, *args, **named)
        self.student.double()
        for net in self.teachers.values():
            net.double()

    def doubled(self, *args, **named):
        for step, x, y in epoch(self, *args, **named):
            yield step, x.double(), y

    ResNet18._net = lambda self, channels, classes: grouped(made(self, channels, classes))
    Loop.__init__, Batches.epoch = begun, doubled


def main(folder: Path, methods: list[str]) -> int:
    patch()
    kept = Loop.run
    for name in methods:

        def trained(self, listen, name=name):
            kept(self, listen)
            if RANK == 0:
                save_file(portable(self.student), folder / f"{name}-of-{WORLD}.safetensors")

        Loop.run = trained
        if code := run(["distill", "--recipe", str(folder / f"{name}.yaml"), "--output", str(folder / f"{name}-{WORLD}")]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
