"""One of two processes that train with B-MTARD; writes down the method's state after each step, and its own losses.

Usage: state_worker.py RECIPE FOLDER. Leaves FOLDER/state-N.json.
"""

import json
import os
import sys
from pathlib import Path

from robustkd.cli.app import run
from robustkd.methods.b_mtard import BMtard

RANK = int(os.environ["RANK"])


def main(recipe: str, folder: Path) -> None:
    states: list[dict] = []
    own: list[dict] = []
    loss, advance = BMtard.loss, BMtard.advance

    def found(self, nets, batch, state, clock):
        parts, terms = loss(self, nets, batch, state, clock)
        own.append({name: float(value) for name, value in terms.items()})
        return parts, terms

    def advanced(self, state, terms, clock):
        after = advance(self, state, terms, clock)
        states.append({"terms": {name: float(terms[name]) for name in own[-1]}, "state": self.save(after)})
        return after

    BMtard.loss, BMtard.advance = found, advanced
    code = run(["distill", "--recipe", recipe, "--output", str(folder / "run")])
    (folder / f"state-{RANK}.json").write_text(json.dumps({"code": code, "own": own, "steps": states}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
