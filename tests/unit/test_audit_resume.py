"""A killed audit continues to the same result; another identity is refused; two audits never share a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robustkd.auditing.run import ArtifactFacts, SourceModel, run_audit
from robustkd.auditing.store import Store, locked, partial_folder
from robustkd.auditing.write import write_audit
from robustkd.bundle import Bundle
from robustkd.errors import ArtifactError, Interrupted
from robustkd.recipe.policy import AuditConfig, Policy
from robustkd.result import AuditResult
from robustkd.threat import ThreatModel
from tests.audit_nets import Quadrants, TorchEngine, images

POLICY = Policy(name="test", noise_draws=3, pgd_steps=5, apgd_steps=6, targets=2, square_queries=40)
NO_ATTACKS_IN_CHECKS = {"ladder_images": 0, "scale_images": 0, "memory_images": 0}
ROOT = Path(__file__).parents[2]


def go(folder, engine=None, **changes):
    net = Quadrants()
    values = {
        "artifact": ArtifactFacts("x.onnx", "sha256:0"),
        "images": images(48),
        "threat": ThreatModel(eps=0.04),
        "policy": POLICY,
        "audit": AuditConfig(tolerance=8, batch_size=16),
        "source": SourceModel(net, "s", "sha256:1"),
        "folder": folder,
        **changes,
    }
    return run_audit(engine or TorchEngine(net), **values)


def plain(value):
    """A result, or a JSON of one, without its times."""
    if isinstance(value, AuditResult):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("seconds", "latency")}
    return [plain(v) for v in value] if isinstance(value, list) else value


class Dying(TorchEngine):
    """Stops the audit after so many calls, as a signal would."""

    def __init__(self, net, calls):
        super().__init__(net)
        self.left = calls

    def logits(self, x):
        self.left -= 1
        if self.left < 0:
            raise Interrupted(signal.SIGTERM)
        return super().logits(x)


@pytest.fixture(scope="module")
def whole():
    return go(None)


@pytest.mark.parametrize("calls", [100, 130, 170])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, whole, calls):
    folder = tmp_path / "audit"
    with pytest.raises(Interrupted):
        go(folder, Dying(Quadrants(), calls))
    kept = sorted(f.name for f in partial_folder(folder).glob("*.npz"))
    assert any(name.startswith("noise") for name in kept) and not folder.exists()
    result, arrays = go(folder, resume=True)
    assert plain(result) == plain(whole[0])
    assert np.array_equal(arrays.ledger.worst, whole[1].ledger.worst)
    assert arrays.ledger.worst_attack == whole[1].ledger.worst_attack


def test_finished_pieces_are_not_computed_again(tmp_path):
    folder, attacks_only = tmp_path / "audit", {"policy": POLICY.model_copy(update=NO_ATTACKS_IN_CHECKS)}
    first = TorchEngine(Quadrants())
    go(folder, first, **attacks_only)
    again = TorchEngine(Quadrants())
    go(folder, again, resume=True, **attacks_only)
    attacks = sum(a.forward_calls for a in go(None, **attacks_only)[0].engine.attacks.values())
    assert first.images - again.images == attacks


CHANGES = {
    "artifact": {"artifact": ArtifactFacts("x.onnx", "sha256:other")},
    "eps": {"threat": ThreatModel(eps=0.05)},
    "norm": {"threat": ThreatModel(norm="l2", eps=0.04)},
    "seed": {"seed": 1},
    "data": {"images": images(48, seed=5)},
    "policy": {"policy": POLICY.model_copy(update={"apgd_steps": 7})},
    "source": {"source": SourceModel(Quadrants(), "s", "sha256:other")},
    "batch_size": {"audit": AuditConfig(tolerance=8, batch_size=17)},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_identity_is_refused(tmp_path, changed):
    folder = tmp_path / "audit"
    with pytest.raises(Interrupted):
        go(folder, Dying(Quadrants(), 100))
    with pytest.raises(ArtifactError, match=changed):
        go(folder, resume=True, **CHANGES[changed])


def test_an_unfinished_audit_is_not_overwritten(tmp_path):
    folder = tmp_path / "audit"
    with pytest.raises(Interrupted):
        go(folder, Dying(Quadrants(), 100))
    with pytest.raises(ArtifactError, match="unfinished") as caught:
        go(folder)
    assert "--resume" in caught.value.fix


def test_an_audit_that_never_began_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted):
        go(tmp_path / "audit", Dying(Quadrants(), 10))
    assert not list(tmp_path.iterdir())


def test_a_damaged_piece_is_named(tmp_path):
    folder = tmp_path / "audit"
    with pytest.raises(Interrupted):
        go(folder, Dying(Quadrants(), 100))
    piece = next(partial_folder(folder).glob("noise-*.npz"))
    piece.write_bytes(piece.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="damaged") as caught:
        go(folder, resume=True)
    assert caught.value.where == str(piece)
    (partial_folder(folder) / "identity.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        go(folder, resume=True)


CHILD = """
from tests.unit.test_audit_resume import go
from pathlib import Path
import sys
go(Path(sys.argv[1]))
"""


def test_killed_without_warning(tmp_path, whole):
    """SIGKILL between two writes: what is there is whole, and the rest is done again."""
    folder = tmp_path / "audit"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], env=env, cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None and not list(partial_folder(folder).glob("pgd-*.npz")):
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert list(partial_folder(folder).glob("noise-*.npz"))
    result, _ = go(folder, resume=True)
    assert plain(result) == plain(whole[0])


def test_the_written_bundle(tmp_path, whole):
    import pyarrow.parquet as pq

    folder = tmp_path / "audit"
    result, arrays = go(folder)
    bundle = write_audit(result, arrays, folder, None)
    assert set(bundle.manifest.files) == {"result.json", "records.parquet", "adversarial.npz"}
    assert not partial_folder(folder).exists()
    Bundle.open(folder, kind="audit").verify()
    text = json.loads((folder / "result.json").read_text())
    assert text["schema"] == "robustkd.audit/1" and text["verdict"]["status"] == result.verdict.status
    assert AuditResult.model_validate_json((folder / "result.json").read_bytes()) == result
    rows = pq.read_table(folder / "records.parquet").to_pylist()
    with np.load(folder / "adversarial.npz", allow_pickle=False) as kept:
        assert kept["x_adv"].dtype == np.float32 and kept["x"].shape == kept["x_adv"].shape
        assert np.array_equal(kept["y"], [row["label"] for row in rows])
        assert np.array_equal(kept["index"], [row["index"] for row in rows])
        assert np.abs(kept["x_adv"].astype(float) - kept["x"]).max() <= 0.04 + 1e-6
    n = len(rows)
    assert sum(r["robust"] for r in rows) / n == result.engine.robust_accuracy.estimate
    assert sum(r["source:robust"] for r in rows) / n == result.source_model.robust_accuracy.estimate
    assert sum(r["source:robust"] and not r["robust"] for r in rows) == result.difference.b
    for row in rows:
        flags = [row[f"{name}:robust"] for name in result.engine.attacks]
        assert row["robust"] == (row["clean_robust"] and all(f is not False for f in flags))
        assert row["robust"] == (row["margin"] > 0)
    with pytest.raises(ArtifactError):
        write_audit(result, arrays, folder, None)


def test_one_audit_at_a_time(tmp_path):
    with locked(tmp_path / "audit"), pytest.raises(ArtifactError, match="another audit"), locked(tmp_path / "audit"):
        pass
    with locked(tmp_path / "audit"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        Store.open(tmp_path / "file" / ".audit.partial", {}, resume=False).put("noise", {})
    with pytest.raises(ArtifactError, match="cannot write"), locked(tmp_path / "file" / "audit"):
        pass
