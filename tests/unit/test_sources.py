"""Where weights come from: files and folders, the Hub, addresses, torchvision and timm; and the digest of the first use."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from robustkd.bundle import ModelInfo, create
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError, RequirementError
from robustkd.recipe.schema import TeacherConfig
from robustkd.threat import ThreatModel
from robustkd.training import fetch as fetching
from robustkd.training.sources import bring, locate, remote
from robustkd.training.teachers import load_teachers
from tests.web import Site, served

CPU = torch.device("cpu")
MODEL = {"name": "resnet18", "width": 0.0625}


def net(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = Shelf("models").get("resnet18")(width=0.0625).build(channels=3, classes=classes)
    return built


def load(path: object, **options: Any) -> tuple[nn.Module, str, dict[str, str]]:
    """The network, its digest and its line in the manifest."""
    teacher = {"path": str(path), "model": MODEL, **options.pop("teacher", {})}
    wanted = {"channels": 3, "classes": 4, "size": (32, 32), "device": CPU, **options}
    nets, origins = load_teachers((TeacherConfig.model_validate(teacher),), **wanted)
    return nets["robust"], origins[0]["sha256"], origins[0]


def loads(path: object, **options: Any) -> None:
    loaded, _, _ = load(path, **options)
    theirs, ours = loaded.state_dict(), net().state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("ROBUSTKD_TEACHERS", raising=False)
    return tmp_path / "data"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    with served(save(net().state_dict())) as found:
        yield found


def bundle(folder: Path, classes: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    told = {
        "recipe": {"student": MODEL},
        "model": ModelInfo(architecture="resnet18", classes=classes, input_shape=(3, 32, 32)),
        "threat": ThreatModel(),
    }
    with create(folder, "checkpoint", **told) as (work, _):
        save_file(net().state_dict(), work / "model.safetensors")
    return folder


# --- here


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net.th", "without_ending"])
def test_a_file_of_any_ending(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": net().state_dict()}, tmp_path / name)
    if name == "net.safetensors":
        save_file(net().state_dict(), tmp_path / name)
    loads(tmp_path / name)


def test_safetensors_without_their_ending(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    loads((tmp_path / "net.safetensors").rename(tmp_path / "weights"))


def test_a_folder_with_one_file_of_weights(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "README").write_text("mine")
    loads(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"2 files of weights: net\.safetensors, other\.pt") as caught:
        load(tmp_path)
    assert caught.value.where == str(tmp_path) and caught.value.fix == "name one file"


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_a_checkpoint_of_ours_or_the_run_around_it(tmp_path: Path, inside: str) -> None:
    bundle(tmp_path / "run" / "checkpoint")
    nets, origins = load_teachers(
        (TeacherConfig(path=str(tmp_path / "run" / inside)),), channels=3, classes=4, size=(32, 32), device=CPU
    )
    assert set(nets) == {"robust"} and origins[0]["sha256"].startswith("sha256:")


def test_a_checkpoint_whose_classes_are_in_another_order(tmp_path: Path) -> None:
    bundle(tmp_path / "checkpoint", ("a", "b", "c", "d"))
    load(tmp_path, names=("a", "b", "c", "d"))
    load(tmp_path, names=("w", "x", "y", "z"))
    with pytest.raises(ConfigError, match="another order: class 2 is c, not d"):
        load(tmp_path, names=("a", "b", "d", "c"))


# --- the web


@pytest.mark.parametrize("source", ["hf:o/r", "http://x/y", "https://x/y"])
def test_what_is_remote(source: str) -> None:
    assert remote(source) and not remote("./" + source)


def test_an_address_is_fetched_once_and_lies_under_its_host(site: Site, root: Path) -> None:
    told: list[dict[str, Any]] = []
    loads(site.url, root=root, listen=told.append)
    assert told and all(event["event"] == "download" and event["file"] == "net.pt" for event in told)
    host = site.url.split("/")[2].replace(":", "_")
    assert (root / "teachers" / host / "models" / "net.pt").is_file()
    loads(site.url, root=root)
    assert len(site.seen) == 1


@pytest.mark.parametrize("path", ["/../../../../etc/net.pt", "/%2e%2e/%2e%2e/net.pt", "/a/..%2f..%2f..%2fnet.pt"])
def test_an_address_never_leads_out_of_the_folder(site: Site, root: Path, path: str) -> None:
    base = site.url.removesuffix("/models/net.pt")
    assert (root / "teachers").resolve() in bring(base + path, root).resolve().parents


def test_addresses_that_differ_in_their_query_are_different_files(site: Site, root: Path) -> None:
    assert len({bring(f"{site.url}{query}", root) for query in ("", "?id=1", "?id=2")}) == 3


def test_a_file_put_by_hand_needs_no_server(root: Path) -> None:
    place = root / "teachers" / "nowhere.invalid" / "net.pt"
    place.parent.mkdir(parents=True)
    save_file(net().state_dict(), place)
    loads("https://nowhere.invalid/net.pt", root=root)


def test_an_address_needs_an_architecture_before_anything_is_fetched(site: Site, root: Path) -> None:
    with pytest.raises(ConfigError, match="needs its architecture"):
        load(site.url, root=root, teacher={"model": None})
    assert not site.seen


# --- the digest of the first use


def test_the_first_use_is_recorded_and_held_against(site: Site, root: Path) -> None:
    _, digest, _ = load(site.url, root=root)
    [record] = root.rglob("*.sha256.json")
    assert json.loads(record.read_bytes()) == {"file": "net.pt", "sha256": digest}
    save_file({**net().state_dict(), "linear.bias": torch.ones(4)}, record.with_name("net.pt"))
    with pytest.raises(ArtifactError, match=r"net\.pt is not the file of its first use: its digest differs") as caught:
        load(site.url, root=root)
    assert caught.value.exit_code == 5 and record.name in caught.value.fix
    record.unlink()
    load(site.url, root=root)


@pytest.mark.parametrize("record", [False, True])
def test_a_file_that_does_not_load_or_is_not_to_be_recorded_leaves_no_record(site: Site, root: Path, record: bool) -> None:
    if record:
        site.content = save(net(classes=5).state_dict())
        with pytest.raises(ArtifactError):
            load(site.url, root=root)
    else:
        load(site.url, root=root, record=False)
    assert not list(root.rglob("*.sha256.json"))


def test_a_damaged_record_says_so(site: Site, root: Path) -> None:
    load(site.url, root=root)
    [record] = root.rglob("*.sha256.json")
    record.write_text("{}")
    with pytest.raises(ArtifactError, match=r"record of net\.pt's digest cannot be read"):
        load(site.url, root=root)


def test_a_stated_digest_stands_in_place_of_the_record(site: Site, root: Path) -> None:
    _, digest, _ = load(site.url, root=root)
    load(site.url, root=root, teacher={"sha256": digest})
    with pytest.raises(ArtifactError, match="is not the file described"):
        load(site.url, root=root, teacher={"sha256": "0" * 64})


# --- the Hub


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_ENDPOINT", site.url.removesuffix("/models/net.pt"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return site


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("hf:org/repo/net.safetensors", "net.safetensors"),
        ("hf:org/repo@v1/sub/net.pt", "@v1/sub/net.pt"),
        ("hf:org/repo", "model.safetensors"),
    ],
)
def test_the_hub(hub: Site, root: Path, source: str, place: str) -> None:
    loads(source, root=root)
    assert (root / "teachers" / "hf" / "org" / "repo" / place).is_file()
    hub.statuses = [404] * 10
    loads(source, root=root)  # it is here now


def test_a_file_the_hub_does_not_have_says_where_to_put_it(hub: Site, root: Path) -> None:
    hub.statuses = [404] * 10
    with pytest.raises(ArtifactError, match=r"the Hub does not give net\.pt: ") as caught:
        load("hf:org/repo/net.pt", root=root)
    assert caught.value.where == "hf:org/repo/net.pt"
    assert caught.value.fix.endswith(f"put it at {root.absolute() / 'teachers/hf/org/repo/net.pt'}")


@pytest.mark.parametrize("source", ["hf:", "hf:org", "hf:../../x", "hf:org/re po/x", "hf:../org/x"])
def test_what_names_nothing_on_the_hub(root: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="names nothing on the Hub"):
        locate(source, root)


def test_without_its_package_the_hub_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequirementError) as caught:
        load("hf:org/repo/net.pt", root=root)
    assert caught.value.fix == "pip install 'robustkd[hub]'"


# --- torchvision and timm


def big(source: str, **options: Any) -> nn.Module:
    wanted = {"channels": 3, "classes": 1000, "size": (224, 224), "device": CPU, **options}
    nets, origins = load_teachers((TeacherConfig(role="clean", path=source),), **wanted)
    assert origins[0]["sha256"].startswith("sha256:") and origins[0]["source"] == source
    return nets["clean"]


def test_a_network_of_torchvision_comes_behind_its_own_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    plain = models.get_model("squeezenet1_1", weights=None).eval()
    name = models.get_model_weights("squeezenet1_1").DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(plain.state_dict(), tmp_path / "hub" / "checkpoints" / name)  # as one puts it there by hand
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))
    net = big("torchvision:squeezenet1_1", size=(64, 64))
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(net(x), plain((x - mean) / std), atol=1e-5)
    for options, reason in (
        ({"classes": 10}, "1000 classes, the data has 10"),
        ({"channels": 1}, "3 channels, the data has 1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            big("torchvision:squeezenet1_1", **options)


def test_a_network_of_torchvision_offline_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))

    def offline(*args: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ArtifactError, match="cannot be fetched: Name or service not known") as caught:
        big("torchvision:squeezenet1_1")
    assert "TORCH_HOME" in caught.value.fix


def test_what_torchvision_does_not_have() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ConfigError, match="torchvision has no classifier resnet81"):
        big("torchvision:resnet81")


@pytest.mark.parametrize(("package", "source"), [("timm", "timm:resnet18"), ("torchvision", "torchvision:resnet18")])
def test_without_their_package(monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RequirementError, match=f"needs {package}") as caught:
        big(source)
    assert caught.value.fix.startswith("pip install 'robustkd[")


def test_a_network_of_timm_comes_behind_its_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is a stand-in here: what of it is used has these names since its version 1.0."""
    inner = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 1000))
    inner.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}  # type: ignore[assignment]
    library = types.ModuleType("timm")
    vars(library).update(
        is_model=lambda name: name == "small",
        list_models=lambda pretrained: ["small"],
        create_model=lambda name, pretrained: inner,
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)))
    assert torch.allclose(big("timm:small", size=(8, 8))(x), inner((x - mean) / std), atol=1e-6)
    with pytest.raises(ConfigError, match="timm has no network smal") as caught:
        big("timm:smal")
    assert caught.value.fix == "did you mean small?"
    with pytest.raises(ConfigError, match="timm:small does not take images of 16x16 pixels"):
        big("timm:small", size=(16, 16))
