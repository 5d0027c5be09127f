"""One of the processes that test_two_processes.py launches: runs the command line, and writes down what it saw.

Usage: worker.py RECIPE FOLDER. Leaves FOLDER/rank-N.json, FOLDER/rank-N.safetensors, and of the run with
add-ons FOLDER/added-N.safetensors and FOLDER/average-N.safetensors.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from robustkd.cli.app import run
from robustkd.methods.pgd_at import PgdAt
from robustkd.models._files import portable
from robustkd.training.batches import Batches
from robustkd.training.loop import Loop
from robustkd.training.team import join

RANK = int(os.environ["RANK"])


def main(recipe: str, folder: Path) -> None:
    seen: list[int] = []
    record(seen, folder)
    whole = command(recipe, folder / "run")
    images = list(seen)
    again = command(recipe, folder / "run")
    added = command(str(folder / "added.yaml"), folder / "added")
    smallest = float(join("cpu").smallest(torch.tensor(3.0 - RANK)))
    diverge()
    broken = command(recipe, folder / "broken")
    facts = {"images": images, "whole": whole, "again": again, "added": added, "smallest": smallest, "broken": broken}
    (folder / f"rank-{RANK}.json").write_text(json.dumps(facts))


def command(recipe: str, output: Path) -> dict[str, object]:
    """Exit code, stdout and stderr of one `robustkd distill`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["distill", "--recipe", recipe, "--output", str(output)])
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


def record(seen: list[int], folder: Path) -> None:
    """Keep the sums of the images that were trained on, and the student at the end."""
    epoch, train = Batches.epoch, Loop.run

    def shown(self, *args, **named):
        for step, x, y in epoch(self, *args, **named):
            seen.extend(round(255 * float(image.double().sum())) for image in x)
            yield step, x, y

    def trained(self, listen):
        train(self, listen)
        name = "rank" if self.addons.average is None else "added"
        save_file(portable(self.student), folder / f"{name}-{RANK}.safetensors")
        if self.addons.average is not None:
            save_file(portable(self.addons.outcome), folder / f"average-{RANK}.safetensors")

    Batches.epoch, Loop.run = shown, trained


def diverge() -> None:
    """From now on the last process, and no other, gets a loss that is not a number in its third step."""
    loss = PgdAt.loss

    def broken(self, nets, batch, state, clock):
        value, found = loss(self, nets, batch, state, clock)
        return (value * float("nan"), found) if RANK == 1 and clock.step == 2 else (value, found)

    PgdAt.loss = broken


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
