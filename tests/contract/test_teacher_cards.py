"""Every teacher card: the ids, architectures, counts, figures and constants of methods.md, section 8, and its files."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from robustkd.catalog import Shelf
from robustkd.models._base import Normalized, bare
from robustkd.recipe.schema import TeacherConfig
from robustkd.training import teachers
from robustkd.training.teachers import Card, cards, load_teachers, read_card
from tests.real_data import TEST_FILE, need_data, read_grids

CPU = torch.device("cpu")
CONSTANTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# methods.md, 8.4: id, architecture, clean and AutoAttack accuracy in percent
LISTED = {
    "cifar10": """
        Chen2021LTD_WRN34_10 wrn-34-10 85.21 56.94
        Chen2021LTD_WRN34_20 wrn-34-20 86.03 57.71
        Pang2020Boosting hypersphere-34-20 85.14 53.74
        Pang2022Robustness_WRN28_10 dm-28-10 88.61 61.04
        Pang2022Robustness_WRN70_16 dm-70-16 89.01 63.35
        Gowal2020Uncovering_70_16 dm-70-16 85.29 57.20
        Gowal2020Uncovering_34_20 dm-34-20 85.64 56.86
        Gowal2020Uncovering_70_16_extra dm-70-16 91.10 65.88
        Gowal2020Uncovering_28_10_extra dm-28-10 89.48 62.80
        Gowal2021Improving_28_10_ddpm_100m dm-28-10 87.50 63.44
        Gowal2021Improving_70_16_ddpm_100m dm-70-16 88.74 66.11
        Gowal2021Improving_R18_ddpm_100m dm-r18 87.35 58.63
        Rebuffi2021Fixing_28_10_cutmix_ddpm dm-28-10 87.33 60.75
        Rebuffi2021Fixing_70_16_cutmix_ddpm dm-70-16 88.54 64.25
        Rebuffi2021Fixing_R18_ddpm dm-r18 83.53 56.66
        Rade2021Helper_R18_extra dm-r18 89.02 57.67
        Rade2021Helper_R18_ddpm dm-r18 86.86 57.09
        Rade2021Helper_ddpm dm-28-10 88.16 60.97
        Rade2021Helper_extra dm-34-10 91.47 62.83
        Zhang2019Theoretically wrn-34-10-sub 84.92 53.08
        Rice2020Overfitting wrn-34-20 85.34 53.42
        Wu2020Adversarial wrn-34-10 85.36 56.17
        Sehwag2021Proxy wrn-34-10 86.68 60.27
        Sehwag2021Proxy_R18 r18 84.59 55.54
        Addepalli2022Efficient_RN18 r18 85.71 52.48
        Addepalli2021Towards_RN18 r18 80.24 51.06
        Cui2023Decoupled_WRN-34-10 wrn-34-10 85.31 57.09
        Cui2023Decoupled_WRN-28-10 dm-28-10 92.16 67.73
        Wang2023Better_WRN-28-10 dm-28-10 92.44 67.31
        Wang2023Better_WRN-70-16 dm-70-16 93.25 70.69
        Bartoldson2024Adversarial_WRN-94-16 dm-94-16 93.68 73.71
        Bartoldson2024Adversarial_WRN-82-8 dm-82-8 93.11 71.59
        Chen2024Data_WRN_34_10 wrn-34-10 86.54 57.30
        Chen2024Data_WRN_34_20 wrn-34-20 86.10 58.09
    """,
    "cifar100": """
        Chen2021LTD_WRN34_10 wrn-34-10-sub 64.07 30.59
        Pang2022Robustness_WRN28_10 dm-28-10 63.66 31.08
        Pang2022Robustness_WRN70_16 dm-70-16 65.56 33.05
        Gowal2020Uncovering dm-70-16 60.86 30.03
        Gowal2020Uncovering_extra dm-70-16 69.15 36.88
        Rebuffi2021Fixing_28_10_cutmix_ddpm dm-28-10 62.41 32.06
        Rebuffi2021Fixing_70_16_cutmix_ddpm dm-70-16 63.56 34.64
        Rebuffi2021Fixing_R18_ddpm dm-r18 56.87 28.50
        Rade2021Helper_R18_ddpm dm-r18 61.50 28.88
        Wang2023Better_WRN-28-10 dm-28-10 72.58 38.83
        Wang2023Better_WRN-70-16 dm-70-16 75.22 42.67
        Cui2023Decoupled_WRN-28-10 dm-28-10 73.85 39.18
        Cui2023Decoupled_WRN-34-10 wrn-34-10 65.76 31.91
        Rice2020Overfitting preact-bn 53.83 18.95
        Addepalli2022Efficient_RN18 r18 65.45 27.67
    """,
}
ROWS = [(data, *row.split()) for data, rows in LISTED.items() for row in rows.strip().splitlines()]
# methods.md, 7 and 8.1: the shelf's name, features of the last layer, parameters for 10 classes (None: given for 100 only)
ARCHITECTURES: dict[str, tuple[str, int, int]] = {
    "wrn-34-10": ("wide-resnet", 640, 46_160_474),
    "wrn-34-10-sub": ("wide-resnet", 640, 48_262_586),
    "wrn-34-20": ("wide-resnet", 1280, 184_531_674),
    "dm-28-10": ("deepmind-wrn", 640, 36_479_194),
    "dm-34-10": ("deepmind-wrn", 640, 46_160_474),
    "dm-34-20": ("deepmind-wrn", 1280, 184_531_674),
    "dm-70-16": ("deepmind-wrn", 1024, 266_796_506),
    "dm-94-16": ("deepmind-wrn", 1024, 365_915_610),
    "dm-82-8": ("deepmind-wrn", 512, 79_125_466),
    "dm-r18": ("deepmind-preact-resnet", 512, 12_548_426),
    "r18": ("resnet18", 512, 11_173_962),
    # given for 100 classes: 11,218,340
    "preact-bn": ("preact-resnet", 512, 11_218_340 - 90 * 513),
}
# methods.md, 8.2: inside forward from non-persistent buffers, or filled in after loading; all others take plain [0, 1]
INSIDE = re.compile(
    r"Gowal2020|Gowal2021|Rebuffi2021|Rade2021|Pang2022|Wang2023|Cui2023Decoupled_WRN-28|Bartoldson2024|Rice2020|Pang2020"
)
every_card = pytest.mark.parametrize("name", cards())


@cache
def card_of(name: str) -> Card:
    return read_card(name)


@cache
def network(model: str, channels: int, classes: int) -> nn.Module:
    """On a device that computes shapes only, once for all cards of one architecture."""
    with torch.device("meta"):
        config = Shelf("models").get(yaml.safe_load(model)["name"]).model_validate(yaml.safe_load(model))
        net: nn.Module = config.build(channels=channels, classes=classes)
        return net.eval()


def net_of(card: Card) -> nn.Module:
    plain = card.model.model_dump(mode="json", exclude={"normalize"})
    return network(yaml.safe_dump(plain), card.channels, card.classes)


def size_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def at(data: str, key: str) -> Card:
    (card,) = (card_of(name) for name in cards() if card_of(name).file == f"{data}/Linf/{key}.pt")
    return card


# --- every card by itself


@every_card
def test_a_card_is_whole(name: str) -> None:
    card = card_of(name)
    assert card.name == name and card.summary and card.licence
    assert card.paper or card.recipe
    facts = Shelf("datasets").get(card.dataset)(name=card.dataset).facts
    assert (facts.shape[0], facts.classes) == (card.channels, card.classes)
    assert card.size in (None, facts.shape[1])
    ships = (teachers.FOLDER / card.file).is_file()
    assert ships != bool(card.published), "it ships, or says where to get it"
    assert card.sha256 or not ships, "what ships has its digest"
    clean = card.threat is None
    assert clean == name.startswith("clean-"), "only clean teachers withstand nothing"
    assert name.endswith(card.dataset) or ships


@every_card
def test_the_parameters_a_card_speaks_of_are_those_of_its_network(name: str) -> None:
    card = card_of(name)
    assert re.findall(r"([\d,]+) parameters", card.summary) == [f"{size_of(net_of(card)):,}"]


@every_card
def test_a_card_fits_a_line_of_the_list(name: str) -> None:
    assert len(card_of(name).summary) <= 140 and "\n" not in card_of(name).summary


SHAPES = sorted(
    {(c.model.model_dump_json(exclude={"normalize"}), c.channels, c.classes, c.dataset) for c in map(card_of, cards())}
)


@pytest.mark.parametrize(("model", "channels", "classes", "data"), SHAPES)
def test_a_card_takes_the_images_of_its_data(model: str, channels: int, classes: int, data: str) -> None:
    shape = Shelf("datasets").get(data)(name=data).facts.shape
    net = network(yaml.safe_dump(yaml.safe_load(model)), channels, classes)
    assert net(torch.empty(1, *shape, device="meta")).shape == (1, classes)


# --- against the list


def test_every_listed_id_is_a_card_and_nothing_else_claims_to_be_one() -> None:
    held = [card_of(name).file for name in cards() if "/Linf/" in card_of(name).file]
    assert sorted(held) == sorted(f"{data}/Linf/{key}.pt" for data, key, *_ in ROWS)
    assert len(ROWS) == 49


@pytest.mark.parametrize(("data", "key", "architecture", "clean", "attacked"), ROWS)
def test_a_listed_id_as_it_is_listed(data: str, key: str, architecture: str, clean: str, attacked: str) -> None:
    card = at(data, key)
    assert card.dataset == data and key in card.summary and key in card.published and "RobustBench" in card.published
    assert card.reported["clean"] * 100 == pytest.approx(float(clean), abs=1e-6)
    assert card.reported["autoattack"] * 100 == pytest.approx(float(attacked), abs=1e-6)
    assert not card.measured and card.sha256 is None, "neither is known of these files"
    assert card.threat is not None and card.threat.norm == "linf"
    assert card.threat.eps == pytest.approx(0.031 if key == "Zhang2019Theoretically" else 8 / 255)
    if architecture == "hypersphere-34-20":  # its count is not listed: the plain network's, the copied group, no biases
        assert card.model.name == "hypersphere-wrn"
        assert size_of(net_of(card)) == 184_531_674 - 10 + size_of(net_of(card).get_submodule("sub_block1"))
        return
    name, features, parameters = ARCHITECTURES[architecture]
    assert card.model.name == name
    assert size_of(net_of(card)) == parameters + (card.classes - 10) * (features + 1)


@pytest.mark.parametrize(("data", "key"), [row[:2] for row in ROWS])
def test_a_listed_id_normalises_with_the_constants_of_its_own_data(data: str, key: str) -> None:
    normalize = at(data, key).model.normalize
    if INSIDE.match(key):
        assert normalize is not None and (normalize.mean, normalize.std) == CONSTANTS[data]
    else:
        assert normalize is None


@pytest.mark.parametrize(("data", "key", "architecture"), [row[:3] for row in ROWS])
def test_sub_block1_is_where_it_is_listed(data: str, key: str, architecture: str) -> None:
    held = any(name.startswith("sub_block1.") for name in net_of(at(data, key)).state_dict())
    assert held == (architecture.endswith("-sub") or key == "Pang2020Boosting")


def test_key_prefixes_and_names_are_those_of_the_files() -> None:
    assert at("cifar10", "Chen2021LTD_WRN34_20").prefix == "module."
    assert at("cifar100", "Chen2021LTD_WRN34_10").prefix == ""
    for name in ("clean-resnet20-cifar10", "clean-resnet56-cifar10"):  # saved from a parallel network that ends in `linear`
        assert (card_of(name).prefix, card_of(name).rename) == ("module.", {"linear": "fc"})


# --- a file in its published form, through the card


def narrow(card: Card) -> dict[str, Any]:
    """The card's model with its quirks, as small as it can be."""
    small = {"depth": 20 if card.model.name == "cifar-resnet" else 10, "widen_factor": 1, "width": 0.0625}
    knobs = card.model.model_dump(mode="json")
    return {**knobs, **{key: value for key, value in small.items() if key in knobs}}


def stirred(net: nn.Module) -> nn.Module:
    """With statistics of batch norm that a forgotten buffer would change."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.get_buffer("running_mean"), -1, 1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return net.eval()


def published(card: Card, net: nn.Module) -> dict[str, Tensor]:
    """The state under the keys of the published file."""
    back = {new: old for old, new in card.rename.items()}
    keys = {key: ".".join([back.get(key.split(".")[0], key.split(".")[0]), *key.split(".")[1:]]) for key in net.state_dict()}
    return {card.prefix + keys[key]: value for key, value in net.state_dict().items()}


QUIRKS = sorted({(c.model.name, str(narrow(c)), c.prefix, c.dataset): c.name for c in map(card_of, cards())}.values())


@pytest.mark.parametrize("name", QUIRKS)
def test_a_published_file_answers_through_its_card(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One card of each kind: the file as published, strictly loaded, gives the logits of the network that wrote it."""
    card = card_of(name)
    torch.manual_seed(0)
    net = stirred(
        Shelf("models").get(card.model.name).model_validate(narrow(card)).build(channels=card.channels, classes=card.classes)
    )
    told = yaml.safe_load((teachers.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    told.pop("sha256", None)
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / f"{name}.yaml").write_text(yaml.safe_dump({**told, "model": narrow(card)}), encoding="utf-8")
    file = tmp_path / "weights" / card.file
    file.parent.mkdir(parents=True)
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(published(card, bare(net)), file)
    else:
        torch.save({"state_dict": published(card, bare(net)), "epoch": 1}, file)
    monkeypatch.setattr(teachers, "FOLDER", tmp_path / "cards")
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(tmp_path / "weights"))
    nets, _ = load_teachers((TeacherConfig(id=name),), channels=card.channels, classes=card.classes, device=CPU)
    (loaded,) = nets.values()
    assert isinstance(loaded, Normalized) == (card.model.normalize is not None)
    size = card.size or 28
    x = torch.rand(2, card.channels, size, size)
    with torch.no_grad():
        assert torch.allclose(loaded(x), net(x), atol=1e-5)


# --- and real ones


def test_the_small_robust_teacher_on_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its digest, and near the 83.81 % its card states: within three points on the first 500 test images."""
    folder = need_data("weights/cifar10_resnet20_pgdat8_a.safetensors", TEST_FILE)
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(folder / "weights"))
    card = card_of("pgd-at-resnet20-cifar10")
    nets, (origin,) = load_teachers((TeacherConfig(id=card.name),), channels=3, classes=10, device=CPU)
    assert card.sha256 is not None and origin["sha256"].endswith(card.sha256)
    images, labels = read_grids(folder / TEST_FILE, 500)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        right = (nets["robust"](x).argmax(1).numpy() == labels).mean()
    assert right == pytest.approx(card.measured["clean"], abs=0.03)
