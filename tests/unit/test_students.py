"""Students for larger images: torchvision's and timm's networks, pretrained or not, and images that a student does not take."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robustkd.bundle import Bundle
from robustkd.catalog import Shelf
from robustkd.errors import ArtifactError, ConfigError, RequirementError
from robustkd.models._base import Normalized, bare, check_takes
from robustkd.models._files import load_net
from robustkd.models._imagenet import IMAGENET
from robustkd.recipe.reading import Source, override, validate
from robustkd.recipe.schema import Recipe

pytest.importorskip("torchvision", reason="needs torchvision")
with_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm: pip install 'robustkd[timm]'")
FILES = {"resnet18-imagenet": "resnet18-f37072fd.pth", "mobilenet-v2-imagenet": "mobilenet_v2-7ebf99e0.pth"}
STEM = {"resnet18-imagenet": "conv1.weight", "mobilenet-v2-imagenet": "features.0.0.weight"}
HEAD = {"resnet18-imagenet": "fc", "mobilenet-v2-imagenet": "classifier.1"}
both = pytest.mark.parametrize("name", [*FILES])


def config(name: str, **knobs: Any) -> Any:
    return Shelf("models").get(name).model_validate({"name": name, **knobs})


def student(value: Any) -> Any:
    """The student of a recipe that says `student: value`."""
    return Recipe.model_validate({"dataset": "fashion-mnist-10k", "student": value, "method": "pgd-at"}).student


def last_map(net: nn.Module, size: int) -> list[int]:
    """Sizes of the feature maps that the pooling before the last layer takes."""
    seen: list[int] = []
    stage = net.layer4 if hasattr(net, "layer4") else net.features
    assert isinstance(stage, nn.Module)
    stage.register_forward_hook(lambda m, i, o: seen.append(o.shape[-1]))
    with torch.no_grad():
        net.eval()(torch.rand(1, 3, size, size))
    return seen


@both
def test_the_stem_is_that_of_imagenet(name: str) -> None:
    """A 32nd of the image: three pixels are left of 96, seven of 224."""
    knobs = {"width": 0.25} if name.startswith("mobile") else {}
    net = config(name, **knobs).build(channels=3, classes=10)
    assert last_map(net, 96) == [3]
    assert last_map(net, 224)[-1] == 7
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules()), "the attack and the loss see one network"


def test_width_of_the_mobilenet() -> None:
    narrow = config("mobilenet-v2-imagenet", width=0.25).build(channels=1, classes=10)
    assert narrow.features[0][0].weight.shape == (8, 1, 3, 3)
    with pytest.raises(ValidationError, match="pretrained weights are of width 1"):
        config("mobilenet-v2-imagenet", width=0.5, pretrained=True)


# --- pretrained


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Weights as torchvision's address would give them, put by hand where an error message says."""
    torch.manual_seed(7)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    states = {}
    for name, file in FILES.items():
        states[name] = config(name).build(channels=3, classes=1000).state_dict()
        torch.save(states[name], folder / file)
    return states


@both
def test_a_pretrained_start(name: str, published: dict[str, dict[str, Tensor]]) -> None:
    """All but the head, which is new where the classes differ; behind the constants it was trained with."""
    asked = config(name, pretrained=True)
    torch.manual_seed(0)
    net = asked.build(channels=3, classes=10)
    assert isinstance(net, Normalized) and (asked.normalize.mean, asked.normalize.std) == IMAGENET
    head = {key: value.clone() for key, value in bare(net).state_dict().items() if key.startswith(HEAD[name])}
    asked.begin(net, channels=3, classes=10)
    own = bare(net).state_dict()
    assert len(head) == 2 and all(torch.equal(own[key], value) for key, value in head.items())
    assert all(torch.equal(own[key], value) for key, value in published[name].items() if key not in head)


@both
def test_the_head_stays_where_the_classes_are_those_of_imagenet(name: str, published: dict[str, dict[str, Tensor]]) -> None:
    net = config(name, pretrained=True).build(channels=3, classes=1000)
    config(name, pretrained=True).begin(net, channels=3, classes=1000)
    assert all(torch.equal(bare(net).state_dict()[key], value) for key, value in published[name].items())


@both
def test_a_pretrained_start_on_grey_images_computes_what_it_does_on_grey_colours(
    name: str, published: dict[str, dict[str, Tensor]]
) -> None:
    grey, colour = (
        config(name, pretrained=True, normalize={"mean": [0.45] * channels, "std": [0.23] * channels}) for channels in (1, 3)
    )
    nets = []
    for asked, channels in ((grey, 1), (colour, 3)):
        torch.manual_seed(0)
        net = asked.build(channels=channels, classes=1000)
        asked.begin(net, channels=channels, classes=1000)
        nets.append(net.eval())
    x = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        assert torch.allclose(nets[0](x), nets[1](x.expand(-1, 3, -1, -1)), atol=1e-4)
    with pytest.raises(ConfigError, match="3 values, the images have 1 channels"):
        config(name, pretrained=True).build(channels=1, classes=10)


@both
def test_normalisation_is_identity_unless_pretrained_and_ones_own_where_given(name: str) -> None:
    assert config(name).normalize is None
    assert config(name, pretrained=True, normalize=None).normalize is None
    assert config(name, pretrained=True, normalize={"mean": [0.0], "std": [1.0]}).normalize.mean == (0.0,)
    dumped = config(name, pretrained=True).model_dump(mode="json")
    assert config(**dumped) == config(name, pretrained=True), "a resolved recipe says what it is"


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", _no_network)
    asked = config("resnet18-imagenet", pretrained=True)
    with pytest.raises(ArtifactError, match="cannot be had: no route") as caught:
        asked.begin(asked.build(channels=3, classes=10), channels=3, classes=10)
    file = tmp_path / "hub" / "checkpoints" / FILES["resnet18-imagenet"]
    assert caught.value.where == str(file) and "https://download.pytorch.org" in caught.value.fix
    assert caught.value.exit_code == 5


def _no_network(*args: Any, **named: Any) -> None:
    raise OSError("no route to host")


def test_damaged_weights_are_named(published: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "hub" / "checkpoints" / FILES["resnet18-imagenet"]
    file.write_bytes(file.read_bytes()[:1000])
    asked = config("resnet18-imagenet", pretrained=True)
    with pytest.raises(ArtifactError) as caught:
        asked.begin(asked.build(channels=3, classes=10), channels=3, classes=10)
    assert caught.value.where == str(file)


@both
def test_without_torchvision_the_install_line_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(RequirementError) as caught:
        config(name).build(channels=3, classes=10)
    assert "pip install 'robustkd[train]'" in caught.value.fix and caught.value.exit_code == 4


# --- images that do not fit


def test_a_student_that_does_not_take_the_images_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 10)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    check_takes(net, (3, 28, 28), "mine")
    with pytest.raises(ConfigError, match="student mine does not take images of 40x28 pixels") as caught:
        check_takes(net, (3, 28, 40), "mine")
    assert caught.value.exit_code == 3 and "dataset.size" in caught.value.fix
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# --- timm


@pytest.mark.parametrize("value", ["timm:test_resnet", {"name": "timm:test_resnet"}, {"name": "timm", "model": "test_resnet"}])
def test_one_line_names_a_student_of_timm(value: Any) -> None:
    asked = student(value)
    assert (asked.name, asked.model, asked.architecture) == ("timm", "test_resnet", "timm:test_resnet")
    assert student(asked.model_dump(mode="json")) == asked


def test_a_student_of_timm_in_a_setting_and_with_a_wrong_key() -> None:
    values = {"dataset": "fashion-mnist-10k", "student": "resnet18", "method": "pgd-at"}
    source = override(Source({**values}), ["student=timm:resnet10t"])
    assert validate(Recipe, source).student.architecture == "timm:resnet10t"
    source = override(Source({**values}), ["student=timm:resnet10t", "student.widht=2"])
    with pytest.raises(ConfigError, match=r"student\.widht is not a field"):
        validate(Recipe, source)
    with pytest.raises(ConfigError, match=r"student\.options: num_classes is not an option"):
        validate(Recipe, Source({**values, "student": {"name": "timm", "model": "vit", "options": {"num_classes": 3}}}))


def test_without_timm_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(RequirementError) as caught:
        student("timm:resnet10t").build(channels=3, classes=10)
    assert caught.value.what == "student timm:resnet10t needs timm" and caught.value.exit_code == 4
    assert caught.value.fix == "pip install 'robustkd[timm]'"


@with_timm
def test_a_name_that_timm_does_not_know() -> None:
    with pytest.raises(ConfigError, match="timm has no model resnet10x") as caught:
        student("timm:resnet10x").build(channels=3, classes=10)
    assert "did you mean resnet10" in caught.value.fix


@with_timm
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_vit"])
def test_models_of_timm(model: str, channels: int) -> None:
    options = {"img_size": 96} if model == "test_vit" else {}
    net = student({"name": "timm", "model": model, "options": options}).build(channels=channels, classes=7)
    with torch.no_grad():
        assert net.eval()(torch.rand(2, channels, 96, 96)).shape == (2, 7)
    check_takes(net, (channels, 96, 96), model)


@with_timm
def test_a_transformer_for_other_images_is_refused() -> None:
    net = student("timm:vit_tiny_patch16_224").build(channels=3, classes=7)
    with pytest.raises(ConfigError, match="does not take images of 96x96 pixels: Input height"):
        check_takes(net, (3, 96, 96), "timm:vit_tiny_patch16_224")


@with_timm
def test_options_that_timm_does_not_take() -> None:
    asked = student({"name": "timm", "model": "test_resnet", "options": {"colour": "red"}})
    with pytest.raises(ConfigError, match="timm does not build test_resnet so"):
        asked.build(channels=3, classes=7)


@with_timm
def test_a_pretrained_start_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are made here: what is tested is what becomes of them, and that the run's own draws go on as before."""
    import timm

    create, asked_for = timm.create_model, []

    def made(name: str, pretrained: bool = False, **named: Any) -> nn.Module:
        asked_for.append((pretrained, named))
        net: nn.Module = create(name, pretrained=False, **named)
        if pretrained:
            for p in net.parameters():
                nn.init.constant_(p, 0.25)
        return net

    monkeypatch.setattr(timm, "create_model", made)
    asked = student({"name": "timm:test_resnet", "pretrained": True})
    assert asked.normalize is not None and len(asked.normalize.mean) == 3, "as timm states them"
    net = asked.build(channels=3, classes=7)
    before = torch.get_rng_state()
    asked.begin(net, channels=3, classes=7)
    assert torch.equal(before, torch.get_rng_state())
    assert asked_for[-1] == (True, {"in_chans": 3, "num_classes": 7})
    assert all(bool((p == 0.25).all()) for p in bare(net).parameters())


@with_timm
def test_pretrained_weights_of_timm_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = student({"name": "timm:test_resnet", "pretrained": True})
    net = asked.build(channels=3, classes=7)
    monkeypatch.setattr("timm.create_model", lambda *args, **named: _no_network())
    with pytest.raises(ArtifactError, match=r"timm:test_resnet cannot be had: no route") as caught:
        asked.begin(net, channels=3, classes=7)
    assert "HF_HOME" in caught.value.fix


# --- the whole chain

LARGE = [
    pytest.param("resnet18-imagenet", {}, id="resnet18-imagenet"),
    pytest.param("mobilenet-v2-imagenet", {"width": 0.125}, id="mobilenet-v2-imagenet"),
    pytest.param("timm:test_resnet", {"normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}, id="timm", marks=with_timm),
]


def large(folder: Path, name: str, knobs: dict[str, Any]) -> Path:
    """A recipe of one epoch on pictures that are not square and are streamed."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("test", 3)):
        for label, kind in enumerate(("cat", "dog")):
            inner = folder / "mine" / split / kind
            inner.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(90 * label, 90 * label + 120, (96, 104, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(inner / f"{i}.png")
    policy = "noise_draws: 1\npgd_steps: 1\napgd_steps: 1\ntargets: 1\nsquare_queries: 1\nfresh_process: false\n"
    (folder / "policy.yaml").write_text(policy)
    recipe = {
        "dataset": {"name": "folder", "path": str(folder / "mine"), "holdout": 2, "stream": "always", "workers": 0},
        "student": {"name": name, **knobs},
        "method": {"name": "pgd-at"},
        "inner": {"steps": 1},
        "train": {"epochs": 1, "batch_size": 3, "threads": 1, "tensorboard": False},
        "targets": ["cpu-fp32"],
        "audit": {"policy": str(folder / "policy.yaml"), "n": 6, "tolerance": 50, "batch_size": 6},
    }
    (folder / "large.yaml").write_text(json.dumps(recipe))
    return folder / "large.yaml"


@pytest.mark.parametrize(("name", "knobs"), LARGE)
def test_a_student_of_large_images_trains_and_its_bundle_computes_the_same(
    name: str, knobs: dict[str, Any], tmp_path: Path, command: Any
) -> None:
    done = command("distill", "--recipe", large(tmp_path, name, knobs), "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    bundle = Bundle.open(tmp_path / "out" / "checkpoint", kind="checkpoint")
    model = bundle.manifest.model
    assert model is not None and (model.architecture, model.input_shape) == (name, (3, 96, 104))
    net = load_net(bundle)
    assert isinstance(net, Normalized) is ("normalize" in knobs)
    x = torch.rand(2, 3, 96, 104)
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (2, 2) and not torch.equal(logits, net(x * 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "knobs"), LARGE)
def test_a_large_image_goes_from_picture_to_verdict(name: str, knobs: dict[str, Any], tmp_path: Path, command: Any) -> None:
    """Training, ONNX at the opset of the target, and the audit of that file."""
    done = command("run", "--recipe", large(tmp_path, name, knobs), "--output", tmp_path / "out", "--json")
    told = json.loads(done.stdout)
    verdict = told["targets"]["cpu-fp32"]["verdict"]
    assert done.code == {"pass": 0, "fail": 10, "inconclusive": 11, "invalid": 12}[verdict], done.stderr
    result = json.loads((tmp_path / "out" / "cpu-fp32" / "audit" / "result.json").read_text())
    assert result["dataset"]["n"] == 6 and result["source_model"] is not None
