"""The quirks of published checkpoints (methods.md, sections 7 and 8): each test fails where one is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from robustkd.errors import ArtifactError
from robustkd.models._base import bare
from robustkd.models._files import load_state
from robustkd.models._foreign import read_foreign
from robustkd.recipe.schema import TeacherConfig
from robustkd.training import teachers
from robustkd.training.teachers import load_teachers
from tests import layouts
from tests.layouts import Layout
from tests.unit.test_models import SMALL, build

CIFAR10: dict[str, tuple[float, ...]] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
CIFAR100: dict[str, tuple[float, ...]] = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
#: as one repository writes CIFAR-100's, in full
CIFAR100_IN_FULL: dict[str, tuple[float, ...]] = {
    "mean": (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    "std": (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
}


def filled(layout: Layout) -> dict[str, Tensor]:
    """A state of this layout, no two tensors alike."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) if shape else torch.tensor(7) for key, shape in layout.items()}


def same(net: nn.Module, state: dict[str, Tensor]) -> bool:
    held = bare(net).state_dict()
    return held.keys() == state.keys() and all(torch.equal(held[key], value) for key, value in state.items())


# --- keys and shapes of published files


PUBLISHED: list[tuple[str, dict[str, Any], int, Layout, int]] = [
    ("resnet18", {}, 10, layouts.resnet18(10), 11_173_962),
    ("resnet18", {}, 100, layouts.resnet18(100), 11_220_132),
    ("mobilenet-v2", {}, 10, layouts.mobilenet_v2(10), 2_296_922),
    ("mobilenet-v2", {}, 200, layouts.mobilenet_v2(200), 2_540_312),
    ("wide-resnet", {"depth": 34, "widen_factor": 10}, 10, layouts.wide_resnet(10, 34, 10), 46_160_474),
    (
        "wide-resnet",
        {"depth": 34, "widen_factor": 10, "sub_block1": True},
        100,
        layouts.wide_resnet(100, 34, 10, sub_block1=True),
        48_320_276,
    ),
    ("wide-resnet", {"depth": 34, "widen_factor": 20}, 10, layouts.wide_resnet(10, 34, 20), 184_531_674),
    (
        "hypersphere-wrn",
        {"depth": 34, "widen_factor": 20, "sub_block1": True},
        10,
        layouts.wide_resnet(10, 34, 20, sub_block1=True, bias=False),
        192_883_056,
    ),
    ("deepmind-wrn", {"depth": 28, "widen_factor": 10}, 10, layouts.deepmind_wrn(10, 28, 10), 36_479_194),
    ("deepmind-wrn", {"depth": 70, "widen_factor": 16}, 100, layouts.deepmind_wrn(100, 70, 16), 266_888_756),
    ("deepmind-wrn", {"depth": 82, "widen_factor": 8}, 10, layouts.deepmind_wrn(10, 82, 8), 79_125_466),
    ("deepmind-wrn", {"depth": 94, "widen_factor": 16}, 10, layouts.deepmind_wrn(10, 94, 16), 365_915_610),
    ("deepmind-preact-resnet", {}, 10, layouts.deepmind_preact_resnet(10), 12_548_426),
    ("preact-resnet", {}, 10, layouts.preact_resnet(10), 11_171_146),
    ("preact-resnet", {"final_norm": True}, 100, layouts.preact_resnet(100, final_norm=True), 11_218_340),
    ("preact-resnet", {"pool": "quarter"}, 200, layouts.preact_resnet(200, features=2048), 11_575_816),
]


@pytest.mark.parametrize(("name", "knobs", "classes", "layout", "parameters"), PUBLISHED)
def test_keys_and_shapes_are_those_written_down(
    name: str, knobs: dict[str, Any], classes: int, layout: Layout, parameters: int
) -> None:
    counted = {key: shape for key, shape in layout.items() if not key.rsplit(".", 1)[1].startswith(("running", "num"))}
    assert sum(int(torch.Size(shape).numel()) for shape in counted.values()) == parameters, "the layout is the paper's"
    with torch.device("meta"):
        held = {key: tuple(value.shape) for key, value in build(name, classes=classes, **knobs).state_dict().items()}
    assert held == layout


def test_the_papers_students_hold_so_many_entries() -> None:
    assert (len(layouts.resnet18(10)), len(layouts.mobilenet_v2(10))) == (122, 344)


# --- the papers' students


STUDENTS = [("resnet18", layouts.resnet18), ("mobilenet-v2", layouts.mobilenet_v2)]
students = pytest.mark.parametrize(("name", "layout"), STUDENTS, ids=[name for name, _ in STUDENTS])


@students
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("filed", [None, "state_dict"])
def test_a_students_file_of_the_papers_loads(
    name: str, layout: Callable[[int], Layout], prefix: str, filed: str | None, tmp_path: Path
) -> None:
    state = filled(layout(10))
    content: Any = {prefix + key: value for key, value in state.items()}
    torch.save({filed: content, "epoch": 299, "acc": 84.0} if filed else content, tmp_path / "student.pth")
    net = build(name)
    load_state(net, read_foreign(tmp_path / "student.pth"), "student.pth")
    assert same(net, state)


@students
def test_a_student_for_other_classes_is_refused_by_name_and_nothing_is_loaded(
    name: str, layout: Callable[[int], Layout]
) -> None:
    net = build(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load_state(net, filled(layout(100)), "student.pth")
    assert "linear.weight (100x" in caught.value.what and "linear.bias (100, not 10)" in caught.value.what
    assert "100 classes, not 10" in caught.value.fix
    assert same(net, before)


@students
def test_every_mismatch_is_named_and_nothing_is_loaded(name: str, layout: Callable[[int], Layout]) -> None:
    net, state = build(name), filled(layout(10))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state["bn1.weight"] = torch.rand(7)
    state["head.weight"] = state.pop("linear.weight")
    with pytest.raises(ArtifactError) as caught:
        load_state(net, state, "student.pth")
    for said in ("lacks linear.weight", "bn1.weight (7, not ", "unknown to the net, head.weight"):
        assert said in caught.value.what
    assert caught.value.where == "student.pth" and caught.value.exit_code == 5
    assert same(net, before)


def test_one_student_does_not_pass_for_the_other() -> None:
    for name, layout in (("resnet18", layouts.mobilenet_v2), ("mobilenet-v2", layouts.resnet18)):
        with pytest.raises(ArtifactError, match="lacks"):
            load_state(build(name), filled(layout(10)), "student.pth")


def test_statistics_without_their_step_counters_load() -> None:
    """Files from before the counters were introduced, and those that dropped them."""
    state = filled(layouts.resnet18(10))
    net = build("resnet18")
    load_state(net, {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, "old.pth")
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in state if not key.endswith("tracked"))


# --- prefixes and filing


def small(name: str, **knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **SMALL[name], **knobs)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_teachers_file_loads_with_and_without_its_wrappers(prefix: str, tmp_path: Path) -> None:
    """LTD's WRN-34-20 was saved from a parallel network, its WRN-34-10 for CIFAR-100 was not."""
    state = small("wide-resnet").state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "net.pt")
    net = small("wide-resnet")
    nn.init.zeros_(net.get_parameter("fc.weight"))
    load_state(net, read_foreign(tmp_path / "net.pt"), "net.pt")
    assert same(net, state)


def test_a_key_in_which_a_prefix_merely_occurs_keeps_its_name(tmp_path: Path) -> None:
    """RobustBench's helper would cut seven characters off `block.module.weight`."""
    state = {"block.module.weight": torch.rand(2), "fc.model.bias": torch.rand(2)}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "net.pt")
    assert read_foreign(tmp_path / "net.pt").keys() == state.keys()
    mixed = {"module.weight": torch.rand(2), "fc.bias": torch.rand(2)}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert read_foreign(tmp_path / "mixed.pt").keys() == mixed.keys(), "a wrapper's prefix is on every key, or it is none"


def test_of_two_states_the_last_one_is_taken(tmp_path: Path) -> None:
    """Two families file their network under `last`, beside the one that was best on the test set."""
    best, last = ({"fc.weight": torch.full((2, 2), value)} for value in (1.0, 2.0))
    torch.save({"best": best, "last": last}, tmp_path / "net.pt")
    assert torch.equal(read_foreign(tmp_path / "net.pt")["fc.weight"], last["fc.weight"])


# --- constants


def constants(pair: tuple[str, str], given: dict[str, tuple[float, ...]], shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {key: torch.tensor(values).view(shape) for key, values in zip(pair, given.values(), strict=True)}


pairs = pytest.mark.parametrize(
    ("pair", "shape"), [(("mu", "sigma"), (1, 3, 1, 1)), (("mean", "std"), (3, 1, 1))], ids=["mu-sigma", "mean-std"]
)


@pairs
def test_a_file_that_brings_the_networks_own_constants_loads(pair: tuple[str, str], shape: tuple[int, ...]) -> None:
    net = small("deepmind-wrn", normalize=CIFAR100)
    state = bare(net).state_dict()
    load_state(net, {**state, **constants(pair, CIFAR100, shape)}, "net.pt")
    load_state(net, {**state, **constants(pair, CIFAR100_IN_FULL, shape)}, "net.pt")
    load_state(net, state, "net.pt")


@pairs
@pytest.mark.parametrize("normalize", [CIFAR100, None], ids=["cifar100", "none"])
def test_a_file_that_brings_other_constants_is_refused(
    pair: tuple[str, str], shape: tuple[int, ...], normalize: dict[str, Any] | None
) -> None:
    net = small("deepmind-wrn", normalize=normalize)
    before = {key: value.clone() for key, value in bare(net).state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    with pytest.raises(ArtifactError, match="normalises with other constants") as caught:
        load_state(net, {**state, **constants(pair, CIFAR10, shape)}, "net.pt")
    assert "normalize: {mean: [0.4914, 0.4822, 0.4465], std: [0.2471, 0.2435, 0.2616]}" in caught.value.fix
    assert same(net, before), "nothing is loaded"


def test_constants_that_do_nothing_belong_to_a_network_without_any() -> None:
    net = small("wide-resnet")
    neutral = constants(("mu", "sigma"), {"mean": (0.0,) * 3, "std": (1.0,) * 3}, (1, 3, 1, 1))
    load_state(net, {**net.state_dict(), **neutral}, "net.pt")


def test_half_a_pair_is_a_key_like_any_other() -> None:
    net = small("wide-resnet")
    with pytest.raises(ArtifactError, match="unknown to the net, mu"):
        load_state(net, {**net.state_dict(), "mu": torch.zeros(1, 3, 1, 1)}, "net.pt")


def test_constants_that_are_no_numbers_are_refused() -> None:
    net = small("wide-resnet", normalize=CIFAR10)
    broken = constants(("mu", "sigma"), {"mean": (float("nan"),) * 3, "std": CIFAR10["std"]}, (1, 3, 1, 1))
    with pytest.raises(ArtifactError, match="other constants"):
        load_state(net, {**bare(net).state_dict(), **broken}, "net.pt")


@pytest.mark.parametrize(("given", "right"), [(CIFAR100, True), (CIFAR10, False)], ids=["cifar100", "cifar10"])
def test_a_teacher_of_cifar100_with_constants_of_cifar10_is_refused(
    given: dict[str, tuple[float, ...]], right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake of two papers' scripts, through a card of the shelf made narrow."""
    name = "wang2023-wrn28-10-cifar100"
    told = yaml.safe_load((teachers.FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    told["model"] |= SMALL["deepmind-wrn"]
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    net = small("deepmind-wrn", classes=100)
    file = tmp_path / told["file"]
    file.parent.mkdir(parents=True)
    torch.save({**net.state_dict(), **constants(("mean", "std"), given, (3, 1, 1))}, file)
    monkeypatch.setattr(teachers, "FOLDER", tmp_path)
    monkeypatch.setenv("ROBUSTKD_TEACHERS", str(tmp_path))

    def load() -> None:
        load_teachers((TeacherConfig(id=name),), channels=3, classes=100, device=torch.device("cpu"))

    if right:
        load()
    else:
        with pytest.raises(ArtifactError, match="other constants"):
            load()


def test_constants_of_a_safetensors_file_are_compared_too(tmp_path: Path) -> None:
    net = small("preact-resnet", normalize=CIFAR10)
    held = {f"module.{key}": value for key, value in bare(net).state_dict().items()}
    save_file({**held, "module.mu": torch.zeros(3), "module.sigma": torch.ones(3)}, tmp_path / "net.safetensors")
    with pytest.raises(ArtifactError, match="other constants"):
        load_state(net, read_foreign(tmp_path / "net.safetensors"), "net.safetensors")


# --- what no key tells


@pytest.mark.parametrize("name", sorted({name for name, *_ in PUBLISHED} | {"cifar-resnet", "resnet34", "resnet50"}))
def test_batch_norms_are_those_the_weights_were_trained_with(name: str) -> None:
    """PyTorch's epsilon and momentum in all of them, and affine: another epsilon shifts every logit without an error."""
    norms = [module for module in small(name).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {(n.eps, n.momentum, n.affine, n.track_running_stats) for n in norms} == {(1e-5, 0.1, True, True)}


@pytest.mark.parametrize("shortcut", ["activated", "raw"])
def test_a_shortcut_convolution_takes_what_is_said(shortcut: str) -> None:
    """By hand, on a block with a convolution; a block without one adds its input as it is."""
    net = small("preact-resnet", shortcut=shortcut).eval()
    blocks: list[Any] = [net.get_submodule("layer2.0"), net.get_submodule("layer2.1")]
    with torch.no_grad():
        for block in blocks:
            nn.init.uniform_(block.bn1.weight, 0.5, 2)
            nn.init.uniform_(block.bn1.bias, -1, 1)
            x = torch.randn(2, block.bn1.num_features, 8, 8)
            active = torch.relu(block.bn1(x))
            inner = block.conv2(torch.relu(block.bn2(block.conv1(active))))
            skip = x if block.shortcut is None else block.shortcut(x if shortcut == "raw" else active)
            assert torch.allclose(block(x), inner + skip, atol=1e-6)


def test_both_shortcuts_have_the_same_keys_and_not_the_same_logits() -> None:
    activated, raw = (small("preact-resnet", shortcut=s).eval() for s in ("activated", "raw"))
    load_state(raw, activated.state_dict(), "net.pt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(activated(x), raw(x), atol=1e-5)
