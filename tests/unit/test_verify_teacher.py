"""A teacher is measured after loading: what is said of it holds, or training does not begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkd import api
from robustkd.datasets._base import ImageSet
from robustkd.errors import ConfigError, NumericsError
from robustkd.models._base import Normalization, Normalized
from robustkd.recipe.schema import Figures, TeacherConfig, VerifyConfig
from robustkd.threat import ThreatModel
from robustkd.training import verify_teacher
from robustkd.training.teachers import Expected, load_teachers, read_card
from robustkd.training.verify_teacher import Verifier, measure

CPU = torch.device("cpu")
SHIPPED = "fashion-mnist-resnet18"


class Right(nn.Module):
    """Sees the class in the first pixel, except for a share of the images, which the last pixel marks."""

    def forward(self, x: Tensor) -> Tensor:
        label = (x[:, 0, 0, 0] * 4).round().long()
        wrong = x[:, 0, -1, -1] > 0.5
        return nn.functional.one_hot((label + wrong) % 4, 4) + 0 * x.flatten(1).sum(1, keepdim=True)


def images(n: int, right: float) -> ImageSet:
    labels = np.arange(n) % 4
    x = np.zeros((n, 1, 2, 2), np.float32)
    x[:, 0, 0, 0] = labels / 4
    x[: round(n * (1 - right)), 0, 1, 1] = 1
    return ImageSet(x, labels, ("a", "b", "c", "d"), "made", "test")


def told(
    n: int, right: float, *, exact: bool = False, threat: ThreatModel | None = None, sample: int | None = None, **said: Any
) -> str:
    expected = Expected("it", "it.pt", "sha256:0", Figures(**said), exact, threat, VerifyConfig(clean=sample))
    return measure(Right(), expected, images(n, right), CPU)


@pytest.mark.parametrize("said", [0.80, 0.75, 0.85])
def test_a_figure_within_the_noise_of_the_sample_is_taken(said: float) -> None:
    assert told(1000, 0.8, clean=said) == "clean 80.0% of 1000 images"


@pytest.mark.parametrize("said", [0.70, 0.90])
def test_a_figure_outside_of_it_is_not(said: float) -> None:
    with pytest.raises(NumericsError) as caught:
        told(1000, 0.8, clean=said)
    assert caught.value.exit_code == 6 and caught.value.where == "it.pt"
    assert caught.value.what == f"teacher it does not answer as reported: clean 80.0% of 1000 images, expected {said:.1%}"
    assert "normalisation" in caught.value.fix and "--no-verify-teacher" in caught.value.fix


def test_on_exactly_the_published_images_a_small_difference_counts() -> None:
    told(10_000, 0.8, clean=0.804, exact=True, sample=10_000)
    told(10_000, 0.8, clean=0.82, sample=10_000)
    with pytest.raises(NumericsError):
        told(10_000, 0.8, clean=0.82, exact=True, sample=10_000)
    told(2000, 0.8, clean=0.82, exact=True, sample=2000)  # a part of them has noise


@pytest.mark.parametrize(
    ("said", "fits"), [({"autoattack": 0.6}, True), ({"autoattack": 0.95}, False), ({"pgd10": 0.5}, False)]
)
def test_autoattack_is_a_floor_of_pgd_and_pgd_a_figure(said: dict[str, float], fits: bool) -> None:
    """Nothing moves this network, so its PGD-10 accuracy is its clean one, 80 %."""
    run = lambda: told(1000, 0.8, threat=ThreatModel(eps=0.01), clean=0.8, **said)  # noqa: E731
    if fits:
        assert run().startswith("clean 80.0% of 1000 images, PGD-10 ")
        return
    expected = "expected at least 95.0%" if "autoattack" in said else "expected 50.0%"
    with pytest.raises(NumericsError, match=rf"PGD-10 .*, {expected}"):
        run()


def test_a_clean_teacher_is_not_attacked() -> None:
    assert "PGD" not in told(100, 0.8, clean=0.8, pgd10=0.1) and "PGD" not in told(100, 0.8, threat=ThreatModel(), clean=0.8)


def test_of_an_unknown_teacher_a_few_clean_images_are_shown() -> None:
    assert told(1000, 1.0, threat=ThreatModel()) == "clean 100.0% of 200 images"


# --- the shipped teacher


@pytest.fixture(scope="module")
def shipped() -> tuple[nn.Module, Expected, ImageSet]:
    recipe = api.load_recipe("quickstart")
    seen: list[Any] = []
    load_teachers(
        (TeacherConfig(id=SHIPPED),),
        channels=1,
        classes=10,
        device=CPU,
        dataset=recipe.dataset.name,
        measure=lambda net, said: seen.append((net, said)) or "",  # type: ignore[func-returns-value]
    )
    return (*seen[0], recipe.dataset.load("test"))


def test_the_shipped_teacher_answers_as_its_card_says(shipped: tuple[nn.Module, Expected, ImageSet]) -> None:
    net, said, test = shipped
    assert said.figures == Figures(clean=0.893, pgd10=0.852) and said.threat == ThreatModel(eps=8 / 255)
    assert measure(net, said, test, CPU).startswith("clean ")


@pytest.mark.parametrize(
    ("mean", "std"),
    [(0.5, 0.5), (0.0, 1 / 255), (0.449, 0.226)],
    ids=["half", "range of 255", "ImageNet"],
)
def test_wrong_normalisation_of_it_is_found(shipped: tuple[nn.Module, Expected, ImageSet], mean: float, std: float) -> None:
    net, said, test = shipped
    with pytest.raises(NumericsError, match="does not answer as reported"):
        measure(Normalized(Normalization(mean=(mean,), std=(std,)), net).eval(), said, test, CPU)


def test_images_upside_down_are_found(shipped: tuple[nn.Module, Expected, ImageSet]) -> None:
    net, said, test = shipped
    turned = ImageSet(np.ascontiguousarray(np.asarray(test.images)[:, :, ::-1]), test.labels, test.classes, "turned", "test")
    with pytest.raises(NumericsError):
        measure(net, said, turned, CPU)


def test_figures_hold_on_the_data_of_the_card_alone() -> None:
    card = read_card(SHIPPED)
    assert card.figures("fashion-mnist")[0] == card.figures("fashion-mnist-10k")[0] != Figures()
    assert card.figures("folder") == (Figures(), False)
    reported = read_card("trades-wrn34-10-cifar10").figures("cifar10")
    assert reported == (Figures(clean=0.8492, autoattack=0.5308), True)


# --- in a run

Command = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = {
        "dataset": {"name": "fashion-mnist-10k", "holdout": 20, "train_n": 100},
        "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
        "teachers": [{"id": SHIPPED}],
        "method": "rslad",
        "inner": {"steps": 1},
        "train": {"epochs": 1, "batch_size": 40, "tensorboard": False, "device": "cpu"},
    }
    (tmp_path / "r.json").write_text(json.dumps(text))
    return (tmp_path / "r.json").rename(tmp_path / "r.yaml")


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_teacher, "SAMPLE", 100)


def test_a_run_says_what_was_measured_and_keeps_it(command: Command, recipe: Path, small_sample: None) -> None:
    done = command("distill", "--recipe", recipe, "--output", "out")
    assert done.code == 0, done.stderr
    assert f"teacher {SHIPPED}: clean " in done.stderr and "as expected" in done.stderr
    [teacher] = json.loads(Path("out/checkpoint/manifest.json").read_text())["teachers"]
    assert teacher["source"] == SHIPPED and teacher["measured"].startswith("clean ")


def wrong(tmp_path: Path, **said: Any) -> str:
    """A setting: the shipped teacher's file behind a normalisation that is not its own."""
    file = Path(api.__file__).parent / "teachers" / "fashion_mnist_resnet18.safetensors"
    model = {"name": "resnet18", "width": 0.25, "stem_stride": 2, "normalize": {"mean": [0.5], "std": [0.5]}}
    return "teachers=" + json.dumps([{"path": str(file), "model": model, "reported": said}])


def test_wrong_normalisation_stops_the_run_with_6_before_training(
    command: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("distill", "--recipe", recipe, "--output", "out", "--set", wrong(tmp_path, clean=0.893, pgd10=0.852))
    code, out, err = command(*options)
    assert (code, out) == (6, "") and "Traceback" not in err
    file = Path(api.__file__).parent / "teachers" / "fashion_mnist_resnet18.safetensors"
    assert err.endswith(
        f"teacher {file} does not answer as reported: clean 75.7% of 1000 images, expected 89.3%\n"
        f"  at: {file}\n"
        "  fix: check its normalisation (model.normalize), file, class order and image range; or add --no-verify-teacher\n"
    )
    assert not Path("out/checkpoint").exists()
    # the run that stopped there is the one that goes on
    done = command(*options, "--resume", "--no-verify-teacher")
    assert done.code == 0, done.stderr
    assert "teacher " not in done.stderr
    [teacher] = json.loads(Path("out/checkpoint/manifest.json").read_text())["teachers"]
    assert "measured" not in teacher


def test_run_takes_the_flag_as_well(command: Command) -> None:
    assert "--no-verify-teacher" in command("run", "--help").stdout
    assert "--no-verify-teacher" in command("distill", "--help").stdout


def test_a_teacher_of_which_nothing_is_known_is_shown(command: Command, recipe: Path, tmp_path: Path) -> None:
    done = command("distill", "--recipe", recipe, "--output", "out", "--set", wrong(tmp_path))
    assert done.code == 0, done.stderr
    assert "of 200 images; nothing is known to hold it against" in done.stderr


def test_a_resumed_run_does_not_measure_again(shipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, said, _ = shipped
    dataset, said_lines = api.load_recipe("quickstart").dataset, []
    monkeypatch.setattr(verify_teacher, "SAMPLE", 50)
    first = Verifier(dataset, CPU, tmp_path / "teachers.json", said_lines.append)(net, said)
    monkeypatch.setattr(verify_teacher, "measure", lambda *a: pytest.fail("measured again"))
    assert Verifier(dataset, CPU, tmp_path / "teachers.json", said_lines.append)(net, said) == first
    assert len(said_lines) == 1


def test_without_test_images_it_is_said_and_nothing_is_measured(shipped: Any, tmp_path: Path) -> None:
    from robustkd.datasets.npz import ENTRY

    net, said, _ = shipped
    lines: list[str] = []
    verifier = Verifier(ENTRY(name="npz", train=(tmp_path / "train.npz",)), CPU, tmp_path / "teachers.json", lines.append)
    assert verifier(net, said) == "not measured: no test images"
    assert lines == [f"teacher {SHIPPED} is not measured: no test images (no .npz files for the test split)"]


def test_a_broken_file_of_figures_is_a_wrong_recipe(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        api.load_recipe(recipe, ["teachers=[{path: x, reported: {clean: 85.2}}]"])
