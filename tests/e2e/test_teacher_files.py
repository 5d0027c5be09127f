"""Bad weight files through the real command line: the exit code and the three lines, word for word."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from robustkd.api import open_teacher
from robustkd.catalog import Shelf
from robustkd.training import fetch as fetching
from robustkd.training import teachers
from tests.conftest import Outcome
from tests.web import served

Command = Callable[..., Outcome]
MODEL = {"name": "resnet18", "width": 0.0625}
ARCHITECTURE = "name the architecture the weights were trained with (model, width, classes, channels)"
AGAIN = "fetch it again: it is damaged, cut off, or no checkpoint"


def net(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = Shelf("models").get("resnet18")(width=0.0625).build(channels=3, classes=classes)
    return built


@pytest.fixture
def distill(command: Command, tmp_path: Path) -> Callable[..., Outcome]:
    """`robustkd distill` of a run of one step, with a teacher from a file or source."""
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 32, 32, 3), np.uint8), y=np.arange(8) % 4)
    recipe = {
        "dataset": {"name": "npz", "train": ["x.npz"], "test": ["x.npz"], "holdout": 0},
        "student": MODEL,
        "method": "rslad",
        "inner": {"steps": 1},
        "train": {"epochs": 1, "batch_size": 8, "tensorboard": False, "device": "cpu"},
    }

    def call(path: object, *options: object, model: Any = MODEL, **teacher: Any) -> Outcome:
        told = {"path": str(path), "model": model, **teacher}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"teachers": [told]}))
        return command("distill", "--recipe", "r.yaml", "--output", "out", "--data", tmp_path / "data", *options)

    return call


def lines(what: str, where: object, fix: str) -> str:
    return f"writing to out\n{what}\n  at: {where}\n  fix: {fix}\n"


# --- damaged files


def test_an_absent_file(distill: Callable[..., Outcome]) -> None:
    assert distill("no.pt") == (5, "", lines("cannot read no.pt: No such file or directory", "no.pt", "check the path"))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
def test_a_truncated_checkpoint(distill: Callable[..., Outcome], old: bool) -> None:
    torch.save(net().state_dict(), "net.pt", _use_new_zipfile_serialization=not old)
    Path("net.pt").write_bytes(Path("net.pt").read_bytes()[:5000])
    code, out, err = distill("net.pt")
    assert (code, out) == (5, "")
    said = re.escape("net.pt cannot be read as weights: ") + "[^\n]+"
    assert re.fullmatch(f"writing to out\n{said}\n  at: net.pt\n  fix: {AGAIN}\n", err)


def test_a_truncated_safetensors_file(distill: Callable[..., Outcome]) -> None:
    Path("net.safetensors").write_bytes(save(net().state_dict())[:-1])
    code, out, err = distill("net.safetensors")
    assert (code, out) == (5, "") and "  at: net.safetensors\n" in err
    assert err.startswith("writing to out\nnet.safetensors is not a whole .safetensors file: ")
    assert err.endswith("  fix: copy it again; a pickled checkpoint keeps its own ending (.pt, .pth)\n")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_corrupted_file_that_has_a_digest(distill: Callable[..., Outcome], name: str) -> None:
    """One flipped bit in a tensor: no format notices it, the digest does."""
    torch.save(net().state_dict(), "net.pt", _use_new_zipfile_serialization=False)
    save_file(net().state_dict(), "net.safetensors")
    data = bytearray(Path(name).read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    data[-100] ^= 1
    Path(name).write_bytes(data)
    fix = "delete it and fetch it again; or state the digest of the file you mean"
    assert distill(name, sha256=digest) == (5, "", lines(f"{name} is not the file described: its digest differs", name, fix))


def test_noise_in_place_of_a_file(distill: Callable[..., Outcome]) -> None:
    Path("net.pt").write_bytes(np.random.default_rng(0).bytes(4000).replace(b"\x80", b"x"))
    code, out, err = distill("net.pt")
    assert (code, out) == (5, "") and err.startswith("writing to out\nnet.pt cannot be read as weights: ")
    assert err.endswith(f"\n  at: net.pt\n  fix: {AGAIN}\n") and err.count("\n") == 4


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_web_page(distill: Callable[..., Outcome], name: str) -> None:
    Path(name).write_text("<!DOCTYPE html>\n<html><title>Google Drive - Virus scan warning</title></html>")
    fix = "open its address in a browser, and save the file"
    assert distill(name) == (5, "", lines(f"{name} is a web page: the download failed", name, fix))


# --- files of something else


def test_another_architecture(distill: Callable[..., Outcome]) -> None:
    save_file({"stem.weight": torch.zeros(3), "head.weight": torch.zeros(3)}, "net.safetensors")
    code, out, err = distill("net.safetensors")
    assert (code, out) == (5, "")
    first = "conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var, layer1.0.conv1.weight"
    what = f"the file lacks {first}, layer1.0.bn1.weight, layer1.0.bn1.bias and 94 more"
    assert err == lines(f"{what}; has, unknown to the net, head.weight, stem.weight", "net.safetensors", ARCHITECTURE)


def test_another_width(distill: Callable[..., Outcome]) -> None:
    save_file(net().state_dict(), "net.safetensors")
    code, out, err = distill("net.safetensors", model={"name": "resnet18", "width": 0.125})
    assert (code, out) == (5, "") and err.endswith(f"  at: net.safetensors\n  fix: {ARCHITECTURE}\n")
    assert "the file has another shape for conv1.weight (4x3x3x3, not 8x3x3x3), bn1.weight (4, not 8), " in err


def test_another_number_of_classes(distill: Callable[..., Outcome]) -> None:
    save_file(net(classes=10).state_dict(), "net.safetensors")
    what = "the file has another shape for linear.weight (10x32, not 4x32), linear.bias (10, not 4)"
    fix = "it is for 10 classes, not 4: choose one of this data set"
    assert distill("net.safetensors") == (5, "", lines(what, "net.safetensors", fix))


def test_no_state_dict(distill: Callable[..., Outcome]) -> None:
    torch.save({"epoch": 3, "acc": 84.2}, "net.pt")
    code, out, err = distill("net.pt")
    assert (code, out) == (5, "") and err.startswith("writing to out\nnet.pt holds no state dict")
    assert "\n  at: net.pt\n  fix: " in err


def test_no_architecture(distill: Callable[..., Outcome]) -> None:
    save_file(net().state_dict(), "net.safetensors")
    fix = "add teachers[].model: {name: resnet18}"
    assert distill("net.safetensors", model=None) == (
        3,
        "",
        lines("a teacher file needs its architecture", "net.safetensors", fix),
    )


# --- files that run code


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=[False, True], ids=["zip", "pickle"])
def malicious(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """A file of weights with code in it, the mark that the code leaves, and the file's digest."""
    file, mark = tmp_path / "net.pt", tmp_path / "it-ran"
    content = {"state_dict": net().state_dict(), "optimizer": Malicious(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=not request.param)
    return file, mark, hashlib.sha256(file.read_bytes()).hexdigest()


REFUSED = "net.pt holds more than weights: opening it would run code that it brings"
TRUST = "get it as .safetensors; if you trust it, state its sha256 and add --trust-pickle"


@pytest.mark.parametrize(("flag", "stated"), [(False, False), (True, False), (False, True)], ids=["neither", "flag", "digest"])
def test_code_is_refused_and_has_not_run(
    distill: Callable[..., Outcome], malicious: tuple[Path, Path, str], flag: bool, stated: bool
) -> None:
    file, mark, digest = malicious
    done = distill(file, *(["--trust-pickle"] if flag else []), **({"sha256": digest} if stated else {}))
    assert done == (5, "", lines(REFUSED, file, TRUST)) and not mark.exists()


def test_with_the_flag_and_the_digest_it_loads(distill: Callable[..., Outcome], malicious: tuple[Path, Path, str]) -> None:
    file, mark, digest = malicious
    done = distill(file, "--trust-pickle", sha256=digest)
    assert done.code == 0, done.stderr
    assert mark.is_dir(), "what was trusted has run"


def test_with_the_flag_and_another_digest_it_has_not_run(
    distill: Callable[..., Outcome], malicious: tuple[Path, Path, str]
) -> None:
    file, mark, _ = malicious
    code, _, err = distill(file, "--trust-pickle", sha256="0" * 64)
    assert code == 5 and "is not the file described: its digest differs" in err and not mark.exists()


def test_a_whole_network_that_was_pickled(distill: Callable[..., Outcome]) -> None:
    """As `torch.save(model)` writes it: classes of a library, which the digest and the flag let in."""
    torch.save(net(), "net.pt")
    digest = hashlib.sha256(Path("net.pt").read_bytes()).hexdigest()
    assert distill("net.pt") == (5, "", lines(REFUSED, "net.pt", TRUST))
    assert distill("net.pt", "--trust-pickle", "--output", "again", sha256=digest).code == 0


def test_code_hidden_in_a_file_called_safetensors(distill: Callable[..., Outcome], malicious: tuple[Path, Path, str]) -> None:
    file, mark, _ = malicious
    code, _, err = distill(file.rename(file.with_name("net.safetensors")))
    assert code == 5 and "is not a whole .safetensors file" in err and not mark.exists()


def test_a_start_of_the_student_runs_no_code_either(distill: Callable[..., Outcome], malicious: tuple[Path, Path, str]) -> None:
    file, mark, digest = malicious
    save_file(net().state_dict(), "teacher.safetensors")
    setting = ("--set", f"student_init={{path: {file}, sha256: {digest}}}")
    assert distill("teacher.safetensors", *setting).code == 5 and not mark.exists()
    done = distill("teacher.safetensors", *setting, "--trust-pickle", "--output", "again")
    assert done.code == 0 and mark.is_dir(), done.stderr


CARD = """\
name: mine
summary: for a test
model: {{name: resnet18, width: 0.0625}}
channels: 3
classes: 10
file: mine.pt
{digest}
dataset: cifar10
threat: {{norm: linf, eps: 8/255}}
published: get mine.pt from its authors
licence: none
"""


@pytest.mark.parametrize("stated", [True, False])
def test_a_card_with_a_digest_and_the_flag_let_it_in(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: bool
) -> None:
    """`robustkd audit teacher:ID --data DIR`, with weights under DIR/teachers."""
    monkeypatch.delenv("ROBUSTKD_TEACHERS", raising=False)
    monkeypatch.setattr(teachers, "FOLDER", tmp_path / "cards")
    file, mark = tmp_path / "data" / "teachers" / "mine.pt", tmp_path / "it-ran"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": net(classes=10).state_dict(), "more": Malicious(mark)}, file)
    (tmp_path / "cards").mkdir()
    line = f"sha256: {hashlib.sha256(file.read_bytes()).hexdigest()}" if stated else ""
    (tmp_path / "cards" / "mine.yaml").write_text(CARD.format(digest=line))
    np.savez("test.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.arange(4) + 6)
    Path("policy.yaml").write_text("noise_draws: 1\npgd_steps: 1\napgd_steps: 0\ntargets: 0\nsquare_queries: 0\n")
    options = (
        "audit",
        "teacher:mine",
        "--dataset",
        "test.npz",
        "--n",
        4,
        "--policy",
        "policy.yaml",
        "--data",
        tmp_path / "data",
    )
    refused = command(*options)
    assert refused == (5, "", f"{REFUSED.replace('net', 'mine')}\n  at: {file}\n  fix: {TRUST}\n") and not mark.exists()
    if stated:
        assert open_teacher("mine", tmp_path / "data", trust_pickle=True).net is not None and mark.is_dir()
    else:
        assert command(*options, "--trust-pickle").code == 5 and not mark.exists()


# --- downloads


def test_a_download_is_shown_and_used(distill: Callable[..., Outcome]) -> None:
    with served(save(net().state_dict())) as site:
        done = distill(site.url)
    assert done.code == 0, done.stderr
    assert re.search(r"^net\.pt: [\d.]+ kB of [\d.]+ kB$", done.stderr, re.M)
    origin = json.loads(Path("out/checkpoint/manifest.json").read_text())["teachers"][0]
    assert origin["source"] == site.url and origin["sha256"] == f"sha256:{hashlib.sha256(site.content).hexdigest()}"


def test_a_page_in_place_of_a_download(distill: Callable[..., Outcome], tmp_path: Path) -> None:
    with served(b"<html>Quota exceeded</html>") as site:
        done = distill(site.url)
    place = tmp_path / "data" / "teachers" / site.url.split("/")[2].replace(":", "_") / "models" / "net.pt"
    fix = f"open the address in a browser; or fetch it elsewhere, and put it at {place}"
    told = lines("a web page came in place of net.pt", site.url, fix)
    assert done == (5, "", told.replace("\n", "\nnet.pt: 27 bytes of 27 bytes\n", 1))


def test_offline(distill: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    with served(b"") as site:
        pass
    host = site.url.split("/")[2]
    place = tmp_path / "data" / "teachers" / host.replace(":", "_") / "models" / "net.pt"
    fix = f"go online; or fetch it elsewhere, and put it at {place}"
    assert distill(site.url) == (5, "", lines(f"cannot reach {host}: Connection refused", site.url, fix))
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(net().state_dict(), place)  # as the message says
    assert distill(site.url, "--resume").code == 0


def test_an_archive_that_is_no_checkpoint(distill: Callable[..., Outcome]) -> None:
    with zipfile.ZipFile("net.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    code, out, err = distill("net.pt")
    assert (code, out) == (5, "") and err.endswith(f"\n  at: net.pt\n  fix: {AGAIN}\n") and err.count("\n") == 4
