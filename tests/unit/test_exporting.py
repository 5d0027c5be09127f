"""From a checkpoint bundle to an onnx bundle, and everything that is refused on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkd.bundle import Bundle, create, newest_checkpoint
from robustkd.engines._open import open_engine
from robustkd.errors import ArtifactError, ConfigError, NumericsError, RequirementError
from robustkd.exporting import run as exporting
from robustkd.exporting.verb import export, find_checkpoint, parity_images, resolve
from robustkd.recipe.target import Target, read_target
from robustkd.resources import shipped
from tests.checkpoints import CLASSES, write_checkpoint

FP32 = Target(name="cpu-fp32", max_batch=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "a" / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Bundle) -> Bundle:
    return export(checkpoint.path, targets=[FP32])[0]


class TestBundle:
    def test_it_lies_beside_the_checkpoint_and_names_it(self, checkpoint: Bundle, exported: Bundle) -> None:
        assert exported.path == checkpoint.path.parent / "cpu-fp32"
        assert exported.manifest.parent == checkpoint.digest
        assert (exported.manifest.kind, exported.manifest.precision) == ("onnx", "fp32")
        assert set(exported.manifest.files) == {"model.onnx", "parity.json"}
        assert exported.manifest.model == checkpoint.manifest.model
        assert exported.manifest.recipe == checkpoint.manifest.recipe
        assert exported.manifest.threat == checkpoint.manifest.threat

    def test_manifest_and_parity_file_agree(self, exported: Bundle) -> None:
        extra = exported.manifest.model_extra or {}
        told = json.loads((exported.path / "parity.json").read_text())
        assert told.pop("schema") == "robustkd.parity/1"
        gates = told.pop("gates")
        assert gates == extra["gates"]
        assert gates["source-export"] == told and gates["runtime-importer"]["ok"] is True
        assert extra["parity"] == told and told["ok"] is True
        assert (told["n"], told["batches"], told["agreement"]) == (256, [1, 7, 256], 1.0)
        assert Target.model_validate(extra["target"]) == FP32

    def test_the_file_says_what_it_is_and_runs(self, checkpoint: Bundle, exported: Bundle) -> None:
        images = parity_images(checkpoint, n=20).floats()
        with open_engine(exported.path) as engine, exporting.source_engine(checkpoint) as source:
            metadata = engine.metadata  # type: ignore[attr-defined]
            assert engine.info.max_batch == 16
            np.testing.assert_allclose(engine.logits(images), source.logits(images), atol=1e-5)
        assert metadata["robustkd.source"] == checkpoint.digest
        assert metadata["robustkd.architecture"] == "resnet18"
        assert json.loads(metadata["robustkd.classes"]) == list(CLASSES)
        assert json.loads(metadata["robustkd.threat"]) == {"norm": "linf", "eps": 8 / 255}

    def test_a_second_export_to_the_same_place_is_refused(self, checkpoint: Bundle, exported: Bundle) -> None:
        before = exported.digest
        with pytest.raises(ArtifactError, match="something here already"):
            export(checkpoint.path, targets=[FP32])
        assert Bundle.open(exported.path).digest == before


def test_broken_parity_leaves_nothing_behind(checkpoint: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter writes another network than the source: the gate must stop it, and no bundle may appear."""
    real = exporting.to_onnx

    def sabotage(net: Any, file: Path, **told: Any) -> Path:
        import copy

        import torch

        other = copy.deepcopy(net)
        with torch.no_grad():
            other.conv1.weight[0].zero_()
        return real(other, file, **told)

    monkeypatch.setattr(exporting, "to_onnx", sabotage)
    with pytest.raises(NumericsError, match="parity broken between source and export on 256 images"):
        export(checkpoint.path, targets=[FP32], output=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["trt", "rtx"])
def test_what_cannot_be_built_here_is_refused_before_any_work(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustkd.engines._driver import Driver
    from robustkd.exporting.trt import machine

    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine(Driver(None, (), "no driver"), False, False))
    monkeypatch.setattr(exporting, "to_onnx", lambda *_, **__: pytest.fail("work was done"))
    bundle = write_checkpoint(tmp_path / "run" / "checkpoint")
    target = Target(name="later", kind=kind, precision="fp16")
    images = np.zeros((1, 1, 28, 28), np.float32)
    for call in (
        lambda: export(bundle.path, targets=[FP32, target]),
        lambda: exporting.export_target(bundle, target, tmp_path / "run" / "x", images=images),
    ):
        with pytest.raises(RequirementError) as caught:
            call()
        assert caught.value.exit_code == 4 and caught.value.fix
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint"]


class TestCheckpoint:
    def test_newest_by_the_time_in_the_manifest(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c"):
            with create(tmp_path / name / "checkpoint", "checkpoint"):
                pass
        self._date(tmp_path / "a", "2031-01-01T00:00:00+00:00")
        (tmp_path / "junk").mkdir()
        (tmp_path / "junk" / "manifest.json").write_text("{")
        with create(tmp_path / "c" / "cpu-fp32", "onnx"):
            pass
        self._date(tmp_path / "c", "2032-01-01T00:00:00+00:00", "cpu-fp32")
        assert newest_checkpoint(tmp_path) == tmp_path / "a" / "checkpoint"

    @staticmethod
    def _date(run: Path, created: str, inside: str = "checkpoint") -> None:
        file = run / inside / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "created": created}))

    def test_within_a_second_the_file_time_decides(self, tmp_path: Path) -> None:
        for age, name in enumerate(("new", "old")):
            with create(tmp_path / name / "checkpoint", "checkpoint"):
                pass
            self._date(tmp_path / name, "2031-01-01T00:00:00+00:00")
            os.utime(tmp_path / name / "checkpoint" / "manifest.json", (1e9 - age, 1e9 - age))
        assert newest_checkpoint(tmp_path).parent.name == "new"

    def test_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="no checkpoint here") as caught:
            newest_checkpoint(tmp_path / "gone")
        assert "robustkd distill" in caught.value.fix

    def test_a_run_or_a_file_inside_stands_for_its_checkpoint(self, checkpoint: Bundle) -> None:
        given = (checkpoint.path, checkpoint.path.parent, checkpoint.path / "model.safetensors")
        assert {find_checkpoint(path) for path in given} == {checkpoint.path}

    def test_left_out_it_is_the_newest_of_the_runs_folder(
        self, checkpoint: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("ROBUSTKD_RUNS", str(checkpoint.path.parent.parent))
        with caplog.at_level("INFO", "robustkd"):
            assert find_checkpoint(None) == checkpoint.path
        assert str(checkpoint.path) in caplog.text

    def test_another_kind_and_no_bundle(self, tmp_path: Path) -> None:
        with create(tmp_path / "x", "onnx"):
            pass
        with pytest.raises(ArtifactError, match="of kind onnx, not checkpoint"):
            export(tmp_path / "x")
        (tmp_path / "images.npz").write_bytes(b"")
        with pytest.raises(ArtifactError, match=r"images\.npz is no checkpoint"):
            find_checkpoint(tmp_path / "images.npz")
        with pytest.raises(ArtifactError, match="there is no such checkpoint"):
            export(tmp_path / "gone")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ArtifactError, match=r"not a bundle: manifest\.json cannot be read: No such file"):
            export(tmp_path / "empty")

    def test_source_engine_refuses_other_kinds(self, tmp_path: Path) -> None:
        with create(tmp_path / "x", "audit"):
            pass
        with pytest.raises(ArtifactError, match="is not a checkpoint"):
            exporting.source_engine(Bundle.open(tmp_path / "x"))


class TestImages:
    def test_they_are_balanced_real_and_always_the_same(self, checkpoint: Bundle) -> None:
        images = parity_images(checkpoint, n=50)
        assert (images.split, images.name, len(images)) == ("test", "fashion-mnist-10k", 50)
        assert set(np.bincount(images.labels, minlength=10)) == {5}
        assert images.sha256 == parity_images(checkpoint, n=50).sha256

    def test_a_manifest_without_data_set(self, tmp_path: Path) -> None:
        bundle = write_checkpoint(tmp_path / "c", recipe={})
        with pytest.raises(ArtifactError, match="does not say what the model was trained on"):
            parity_images(bundle)

    def test_data_that_is_not_here(self, tmp_path: Path) -> None:
        bundle = write_checkpoint(tmp_path / "c", recipe={"dataset": {"name": "cifar10"}})
        with pytest.raises(ArtifactError, match="CIFAR-10 is not here"):
            parity_images(bundle, tmp_path)

    def test_data_that_does_not_fit(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=np.zeros((4, 3, 32, 32), np.uint8), y=np.arange(4))
        spec = {"name": "npz", "test": [str(tmp_path / "d.npz")]}
        bundle = write_checkpoint(tmp_path / "c", recipe={"dataset": spec})
        with pytest.raises(ArtifactError, match="the model takes"):
            parity_images(bundle)


class TestTargets:
    @pytest.mark.parametrize("name", sorted(shipped("target")))
    def test_every_shipped_profile_is_valid_and_those_for_cpus_can_be_built(self, name: str) -> None:
        target = read_target(name)
        assert target.name == name
        assert (target.kind == "onnx") == name.startswith("cpu-")
        if target.kind == "onnx":
            assert resolve([name]) == [target]

    def test_a_users_file_is_named_after_itself(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("extends: cpu-fp32\nmax_batch: 8\n")
        target = read_target(str(tmp_path / "mine.yaml"))
        assert (target.name, target.kind, target.max_batch, target.opset) == ("mine", "onnx", 8, 20)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("max_bach: 8", "max_bach is not a field"),
            ("opset: 3", "opset: "),
            ("kind: coreml", "kind: "),
            ("name: ../../etc", "name: "),
        ],
    )
    def test_a_wrong_profile_names_file_and_line(self, text: str, says: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(f"precision: fp32\n{text}\n")
        with pytest.raises(ConfigError) as caught:
            read_target(str(file))
        assert caught.value.what.startswith(says) and "mine.yaml, line 2" in caught.value.where

    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigError, match="cpu-fp23 is not a shipped target") as caught:
            read_target("cpu-fp23")
        assert "did you mean cpu-fp32?" in caught.value.fix

    def test_a_target_named_twice_is_built_once(self) -> None:
        assert len(resolve(["cpu-fp32", "cpu-fp32", read_target("cpu-fp32")])) == 1
