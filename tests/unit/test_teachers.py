"""Teachers: cards, published checkpoints with their quirks, and refusals that say where and what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from robustkd import api
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError
from robustkd.models._foreign import read_foreign
from robustkd.recipe.schema import TeacherConfig
from robustkd.training import teachers
from robustkd.training.teachers import load_teachers, read_card, weights_of
from tests import real_data

CPU = torch.device("cpu")
STATE = {"conv1.weight": torch.rand(2, 1, 3, 3), "linear.weight": torch.rand(3, 2), "linear.bias": torch.rand(3)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- published checkpoints


def saved(folder: Path, content: Any, *, name: str = "net.pt", old: bool = False) -> Path:
    torch.save(content, folder / name, _use_new_zipfile_serialization=not old)
    return folder / name


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best_prec1": torch.tensor(93.0)},
        lambda state: {"last": state, "optimizer": {"lr": 0.1}},
    ],
    ids=["plain", "state_dict", "last"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_published_forms(tmp_path: Path, wrapped: Callable[[Any], Any], prefix: str, old: bool) -> None:
    assert same(read_foreign(saved(tmp_path, wrapped(prefixed(prefix)), old=old)), STATE)


def test_safetensors_are_read_with_the_same_quirks(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "net.safetensors")
    assert same(read_foreign(tmp_path / "net.safetensors"), STATE)


def test_only_a_real_prefix_is_taken_off(tmp_path: Path) -> None:
    """RobustBench's helper cuts by length wherever the text occurs; here every key must begin with it."""
    state = {"block.module.weight": torch.rand(2), "module.weight": torch.rand(2)}
    assert same(read_foreign(saved(tmp_path, state)), state)


def test_a_cards_own_prefix_and_names(tmp_path: Path) -> None:
    renamed = {"conv1.weight": STATE["conv1.weight"], "fc.weight": STATE["linear.weight"], "fc.bias": STATE["linear.bias"]}
    file = saved(tmp_path, prefixed("0.module."))
    assert same(read_foreign(file, prefix="0.", rename={"linear": "fc", "lin": "no"}), renamed)
    assert same(read_foreign(saved(tmp_path, renamed), prefix="0.", rename={"linear": "fc"}), renamed), "nothing to do"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ({}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        ({"a": torch.zeros(1), "epoch": 3}, "holds no state dict"),
        ({1: torch.zeros(1)}, "holds no state dict"),
        (nn.Linear(1, 1), "holds more than weights"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason) as caught:
        read_foreign(saved(tmp_path, content))
    assert caught.value.exit_code == 5 and caught.value.where and caught.value.fix


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n  <html><head>Google Drive - Virus scan warning"])
def test_a_web_page_in_place_of_the_file(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "net.pt").write_bytes(page)
    with pytest.raises(ArtifactError, match="is a web page"):
        read_foreign(tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "folder.pt"])
def test_files_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ArtifactError, match=f"cannot read {name}"):
        read_foreign(tmp_path / name)


class Dangerous:
    ran = False

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _mark_ran, ()


def _mark_ran() -> int:
    Dangerous.ran = True
    return 0


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
def test_nothing_a_checkpoint_asks_for_is_run(tmp_path: Path, old: bool) -> None:
    with pytest.raises(ArtifactError, match="opening it would run code that it brings"):
        read_foreign(saved(tmp_path, {"state_dict": STATE, "extra": Dangerous()}, old=old))
    assert not Dangerous.ran


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_checkpoint_is_an_artifact_error(tmp_path: Path, old: bool, data: st.DataObject) -> None:
    whole = saved(tmp_path, STATE, name="whole.pt", old=old).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ArtifactError):
        read_foreign(tmp_path / "cut.pt")


# --- from a card to a network

CARD = """\
name: small
summary: for a test
model: {name: preact-resnet, width: 0.0625, pool: quarter}
channels: 3
classes: 4
size: 64
file: mine/small.pt
dataset: folder
published: get small.pt from its authors
licence: none
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shelf with one card whose weights are elsewhere: in the data root."""
    shelf, data = tmp_path / "shelf", tmp_path / "data"
    shelf.mkdir()
    (shelf / "small.yaml").write_text(CARD)
    monkeypatch.setattr(teachers, "FOLDER", shelf)
    monkeypatch.setenv("ROBUSTKD_DATA", str(data))
    monkeypatch.delenv("ROBUSTKD_TEACHERS", raising=False)
    (data / "teachers" / "mine").mkdir(parents=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net().state_dict().items()}}, data / "teachers/mine/small.pt")
    return data


def net() -> nn.Module:
    torch.manual_seed(0)
    config = Shelf("models").get("preact-resnet")(width=0.0625, pool="quarter")
    built: nn.Module = config.build(channels=3, classes=4)
    return built


def load(**options: Any) -> Any:
    wanted = {"channels": 3, "classes": 4, "size": (64, 64), **options}
    return load_teachers((TeacherConfig(id="small"),), device=CPU, **wanted)


def test_weights_are_found_in_the_data_root(small: Path) -> None:
    nets, origins = load()
    loaded = nets["robust"]
    assert same(dict(loaded.state_dict()), dict(net().state_dict()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    digest = hashlib.sha256((small / "teachers" / "mine" / "small.pt").read_bytes()).hexdigest()
    assert origins == [{"role": "robust", "source": "small", "sha256": f"sha256:{digest}"}]


def test_the_folder_of_teachers_comes_before_the_data_root(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "models"
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(mine))
    assert weights_of(read_card("small")) == small / "teachers" / "mine" / "small.pt", "where the first folder lacks it"
    (mine / "mine").mkdir(parents=True)
    save_file(net().state_dict(), mine / "mine" / "small.safetensors")
    assert weights_of(read_card("small")) == mine / "mine" / "small.safetensors"
    load()


def test_the_recipes_own_data_root_is_searched(small: Path, tmp_path: Path) -> None:
    (small / "teachers").rename(tmp_path / "teachers")
    load(root=tmp_path)
    with pytest.raises(ArtifactError):
        load()


def test_missing_weights_say_what_where_and_whence(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "teachers" / "mine" / "small.pt").unlink()
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(tmp_path / "models"))
    with pytest.raises(ArtifactError, match=r"the weights of teacher small are not here: mine/small\.pt") as caught:
        load()
    error = caught.value
    assert error.exit_code == 5
    assert error.where == f"{tmp_path / 'models'} or {small / 'teachers'}"
    assert "get small.pt from its authors" in error.fix and "ROBUSTKD_TEACHERS" in error.fix


@pytest.mark.parametrize("right", [True, False])
def test_the_digest_of_a_card_is_checked_before_anything_is_read(small: Path, right: bool) -> None:
    file = small / "teachers" / "mine" / "small.pt"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (teachers.FOLDER / "small.yaml").write_text(CARD + f"sha256: {digest}\n")
    if right:
        load()
        return
    file.write_bytes(b"not even a checkpoint")
    with pytest.raises(ArtifactError, match=r"small.pt is not the file described: its digest differs"):
        load()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classes": 5}, "for 3 channels and 4 classes, the data has 3 and 5"),
        ({"channels": 1}, "for 3 channels and 4 classes, the data has 1 and 4"),
        ({"size": (32, 32)}, "for images of 64x64 pixels, the data has 32x32"),
    ],
)
def test_a_card_of_other_data_is_a_wrong_recipe(small: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load(**options)
    assert caught.value.exit_code == 3 and caught.value.where == "teachers[0]" and caught.value.fix


def test_a_file_of_ones_own_that_takes_no_such_images(small: Path) -> None:
    path = small / "teachers" / "mine" / "small.pt"
    model = {"name": "preact-resnet", "width": 0.0625, "pool": "quarter"}
    config = TeacherConfig.model_validate({"path": str(path), "model": model})
    load_teachers((config,), channels=3, classes=4, size=(64, 64), device=CPU)
    with pytest.raises(ConfigError, match="does not take images of 32x32 pixels"):
        load_teachers((config,), channels=3, classes=4, size=(32, 32), device=CPU)
    with pytest.raises(ArtifactError, match="another shape"):
        load_teachers((config,), channels=3, classes=5, size=(64, 64), device=CPU)


# --- recipes that name them


def recipe(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


MINE = """\
dataset: {dataset}
student: resnet18
method: rslad
teachers:
  - role: robust
    id: {teacher}
"""


@pytest.mark.parametrize(
    ("dataset", "teacher", "reason"),
    [
        ("cifar100", "ltd-wrn34-20-cifar10", "for 3 channels and 10 classes, the data has 3 and 100"),
        ("cifar10", "fashion-mnist-resnet18", "for 1 channels and 10 classes, the data has 3 and 10"),
        ("tiny-imagenet", "ltd-wrn34-10-cifar100", "for 3 channels and 100 classes, the data has 3 and 200"),
        ("cifar10", "ltd-wrn34-20-cifar1", "there is no teacher ltd-wrn34-20-cifar1"),
    ],
)
def test_a_recipe_with_the_wrong_teacher_names_file_and_line(tmp_path: Path, dataset: str, teacher: str, reason: str) -> None:
    path = recipe(tmp_path, MINE.format(dataset=dataset, teacher=teacher))
    with pytest.raises(ConfigError, match=reason) as caught:
        api.load_recipe(path)
    assert caught.value.where == f"{path}, line 6" and caught.value.fix
    assert "did you mean ltd-wrn34-20-cifar10?" in caught.value.fix or "there is no" not in reason


def test_a_recipe_over_data_that_is_not_known_yet_is_checked_later(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINE.format(dataset="folder", teacher="ltd-wrn34-20-cifar10"))
    assert api.load_recipe(path).teachers[0].id == "ltd-wrn34-20-cifar10"


def test_a_shipped_recipe_without_its_weights_says_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBUSTKD_TEACHERS", raising=False)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for part in range(1, 6):
        (folder / f"data_batch_{part}.bin").write_bytes(bytes(3073) * 210)
    plan = api.load_recipe("dgad-mnv2", [f"dataset.root={tmp_path}"])
    with pytest.raises(ArtifactError, match=r"cifar10/Linf/Chen2021LTD_WRN34_20\.pt") as caught:
        api.distill(plan, tmp_path / "run")
    assert caught.value.where == str(tmp_path / "teachers") and "RobustBench" in caught.value.fix


# --- real weights


@pytest.mark.slow
def test_the_clean_teacher_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published ResNet-56 in the form its repository has, on half of the CIFAR-10 test set."""
    folder = real_data.need_data("weights/cifar10_resnet56_clean.safetensors", real_data.TEST_FILE)
    state = read_foreign(folder / "weights" / "cifar10_resnet56_clean.safetensors")
    published = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in state.items()}
    (tmp_path / "cifar10").mkdir()
    torch.save({"state_dict": published, "best_prec1": 0.0}, tmp_path / "cifar10" / "resnet56-4bfd9763.th")
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(tmp_path))
    card = TeacherConfig(role="clean", id="clean-resnet56-cifar10")
    nets, _ = load_teachers((card,), channels=3, classes=10, size=(32, 32), device=CPU)
    images, labels = real_data.read_grids(folder / real_data.TEST_FILE)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        right = sum(
            int((nets["clean"](a).argmax(1) == b).sum())
            for a, b in zip(x.split(500), torch.from_numpy(labels).split(500), strict=True)
        )
    assert right / len(labels) == pytest.approx(0.93, abs=0.01)
