"""Bundles exist whole or not at all, and one changed byte anywhere is noticed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustkd.bundle import MANIFEST, Bundle, Manifest, ModelInfo, create, sha256, write_atomic, write_json
from robustkd.errors import ArtifactError
from robustkd.threat import ThreatModel

MODEL = ModelInfo(architecture="resnet18", classes=("cat", "dog"), input_shape=(3, 32, 32))


def make(path: Path, **fields: Any) -> Bundle:
    with create(path, "checkpoint", model=MODEL, threat=ThreatModel(), recipe={"seed": 3}, **fields) as (folder, _):
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "logs").mkdir()
        (folder / "logs" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    return Bundle.open(path)


def rewrite(bundle: Bundle, **changes: Any) -> None:
    """A forged manifest: any value, with the digest beside it made to fit."""
    values = json.loads((bundle.path / MANIFEST).read_text()) | changes
    text = json.dumps(values).encode()
    (bundle.path / MANIFEST).write_bytes(text)
    (bundle.path / "manifest.sha256").write_text(f"{sha256(bundle.path / MANIFEST).removeprefix('sha256:')}  {MANIFEST}\n")


def everything(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*")}


# --- made and opened


def test_a_bundle_holds_what_was_put_in(tmp_path: Path) -> None:
    bundle = make(tmp_path / "runs" / "a" / "checkpoint", extra={"note": 1})
    manifest = bundle.manifest
    assert manifest.kind == "checkpoint" and manifest.model == MODEL and manifest.threat == ThreatModel()
    assert set(manifest.files) == {"model.safetensors", "logs/metrics.jsonl"}
    assert manifest.files["model.safetensors"] == sha256(bundle.path / "model.safetensors")
    assert manifest.parent is None and manifest.created.endswith("+00:00") and manifest.versions["robustkd"]
    assert json.loads((bundle.path / MANIFEST).read_text())["schema"] == "robustkd.bundle/1"
    assert manifest.model_extra == {"extra": {"note": 1}}
    assert bundle.file(".safetensors").read_bytes() == bytes(range(256))
    with pytest.raises(ArtifactError, match=r"holds no \.onnx file"):
        bundle.file(".onnx")


def test_the_digest_file_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    bundle = make(tmp_path / "a")
    digest, name = (bundle.path / "manifest.sha256").read_text().split()
    assert (f"sha256:{digest}", name) == (bundle.digest, MANIFEST)


def test_a_child_names_and_inherits_from_its_parent(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent")
    with create(tmp_path / "child", "onnx", parent=parent, precision="fp16") as (folder, fields):
        (folder / "model.onnx").write_bytes(b"graph")
        fields["hardware"] = {"gpu": "none"}
    child = Bundle.open(tmp_path / "child", kind="onnx").manifest
    assert child.parent == parent.digest and child.model == MODEL and child.recipe == {"seed": 3}
    assert (child.precision, child.hardware["gpu"]) == ("fp16", "none") and child.hardware["cores"]
    assert child.versions["python"]


# --- whole or not at all


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), create(tmp_path / "runs" / "a", "onnx") as (folder, _):
        (folder / "half").write_bytes(b"written")
        assert not (tmp_path / "runs" / "a").exists(), "nothing is at its place before it is whole"
        raise error
    assert everything(tmp_path) == {"runs"}


def test_a_wrong_manifest_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"), create(tmp_path / "a", "onnx", precision=3):
        pass
    assert everything(tmp_path) == set()


def test_an_empty_folder_may_be_filled_and_a_full_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = make(tmp_path / "a")
    before = first.digest
    with pytest.raises(ArtifactError, match="something here already"), create(first.path, "onnx"):
        pass
    assert Bundle.open(first.path).digest == before and everything(tmp_path) == {f"a/{f}" for f in everything(first.path)} | {
        "a"
    }


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    for place in (tmp_path / "a", tmp_path / "a" / "below"):
        with pytest.raises(ArtifactError) as caught, create(place, "onnx"):
            pass
        assert caught.value.fix
    assert (tmp_path / "a").read_text() == "precious"


def test_the_slower_of_two_writers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError), create(tmp_path / "a", "onnx") as (folder, _):
        (folder / "slow").write_bytes(b"1")
        fast = make(tmp_path / "a")
    assert Bundle.open(fast.path).digest == fast.digest
    assert {f.name for f in tmp_path.iterdir()} == {"a"}


def test_atomic_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustkd.bundle.os.fsync", full)
    with pytest.raises(ArtifactError, match="No space left") as caught:
        write_atomic(file, b"new")
    assert caught.value.exit_code == 5
    assert json.loads(file.read_text()) == {"a": 1} and everything(tmp_path) == {"value.json"}


# --- damage


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_one_changed_byte_anywhere_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a"
    bundle = Bundle.open(path) if path.exists() else make(path)
    name = data.draw(st.sampled_from(sorted(f for f in everything(path) if (path / f).is_file())))
    whole = (path / name).read_bytes()
    index = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    (path / name).write_bytes(whole[:index] + bytes([whole[index] ^ change]) + whole[index + 1 :])
    try:
        with pytest.raises(ArtifactError):
            Bundle.open(path)
        if name != MANIFEST and name != "manifest.sha256":
            with pytest.raises(ArtifactError, match="digest differs"):
                bundle.verify()
    finally:
        (path / name).write_bytes(whole)
    Bundle.open(path)


@pytest.mark.parametrize("name", ["model.safetensors", "logs/metrics.jsonl", MANIFEST, "manifest.sha256"])
@pytest.mark.parametrize("damage", ["missing", "empty", "longer", "folder"])
def test_files_lost_or_cut(tmp_path: Path, name: str, damage: str) -> None:
    file = make(tmp_path / "a").path / name
    data = file.read_bytes()
    file.unlink()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(data + b"\n")
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(ArtifactError) as caught:
        Bundle.open(tmp_path / "a")
    assert str(tmp_path / "a") in caught.value.where


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ArtifactError, match="not a bundle"):
            Bundle.open(place)


def test_the_wrong_kind(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="of kind checkpoint, not onnx"):
        Bundle.open(tmp_path / "a", kind="onnx")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "robustkd.bundle/2"},
        {"kind": "pickle"},
        {"files": ["model.safetensors"]},
        {"threat": {"norm": "linf", "eps": "far"}},
        {"model": {"architecture": "x"}},
    ],
)
def test_a_manifest_that_fits_its_digest_but_not_the_schema(tmp_path: Path, changes: dict[str, Any]) -> None:
    bundle = make(tmp_path / "a")
    rewrite(bundle, **changes)
    with pytest.raises(ArtifactError, match="manifest") as caught:
        Bundle.open(bundle.path)
    assert next(iter(changes)) in caught.value.what


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{" * 5000, b'{"kind": "onnx"'])
def test_a_manifest_that_is_no_manifest(tmp_path: Path, text: bytes) -> None:
    bundle = make(tmp_path / "a")
    (bundle.path / MANIFEST).write_bytes(text)
    for check in (True, False):
        with pytest.raises(ArtifactError):
            Bundle.open(bundle.path, check=check)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "name", ["../secret.onnx", "/etc/secret.onnx", "a/../../secret.onnx", "..", "", "a\x00b.onnx", "x" * 5000]
)
def test_a_forged_manifest_reaches_no_file_outside(tmp_path: Path, name: str, check: bool) -> None:
    (tmp_path / "secret.onnx").write_bytes(b"secret")
    bundle = make(tmp_path / "a")
    rewrite(bundle, files={name: sha256(tmp_path / "secret.onnx")})
    with pytest.raises(ArtifactError):
        Bundle.open(bundle.path, check=check).file(".onnx").read_bytes()


def test_several_threads_may_write_one_file(tmp_path: Path) -> None:
    file, contents = tmp_path / "x", [bytes([i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda data: write_atomic(file, data), contents))
            assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_manifest_round_trip() -> None:
    manifest = Manifest(kind="engine", model=MODEL, threat=ThreatModel(norm="l2", eps=0.5), precision="int8")
    assert Manifest.model_validate_json(manifest.model_dump_json(by_alias=True)) == manifest
