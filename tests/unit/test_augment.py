"""Strong augmentations: what they may do to an image, what they draw from, and who may use them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import augment as bench
from robustkd.catalog import Shelf
from robustkd.datasets._base import ImageSet
from robustkd.errors import ConfigError, RequirementError
from robustkd.methods._base import Batch, Nets
from robustkd.recipe.reading import Source, validate
from robustkd.recipe.schema import MIXING, Recipe, TrainConfig
from robustkd.training.augment import Strong, combine, policy
from robustkd.training.batches import Batches, Place
from tests.nets import CLOCK, SmallNet, frozen, make
from tests.nets import images as pictures

pytest.importorskip("torchvision", reason="needs torchvision")

CPU = torch.device("cpu")
SINGLE = ("autoaugment", "randaugment", "trivialaugment", "erasing")
ALL = ("crop", "flip", *SINGLE, *MIXING)
SHAPES = [(1, 28, 28), (3, 32, 32)]


def data(n: int = 48, shape: tuple[int, int, int] = (1, 28, 28), dtype: Any = np.uint8, name: str = "toy") -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    if dtype == np.float32:
        images = images.astype(np.float32) / 255
    return ImageSet(images, np.arange(n) % 5, tuple("abcde"), name, "train")


def epoch(names: tuple[str, ...], images: ImageSet | None = None, *, number: int = 0, first: int = 0, **place: int) -> Any:
    """All batches of an epoch."""
    config = TrainConfig(batch_size=16, augment=names)
    here = Place(rank=place.get("rank", 0), world=place.get("world", 1), device=CPU)
    batches = Batches(data() if images is None else images, config, seed=place.get("seed", 3), place=here)
    return list(batches.epoch(number, first=first))


def stacked(found: Any) -> Tensor:
    return torch.cat([x for _, x, _ in found])


@settings(max_examples=40)
@given(
    names=st.sets(st.sampled_from(ALL)),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([np.uint8, np.float32]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_set_of_names_keeps_shape_type_range_and_labels(names, shape, dtype, seed):
    images = data(16, shape, dtype)
    ((_, x, y),) = epoch(tuple(sorted(names)), images, seed=seed)
    assert x.shape == (16, *shape) and x.dtype == torch.float32
    assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
    assert torch.equal(y.sort().values, torch.from_numpy(images.labels).sort().values)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_augmentation_gives_the_images_themselves(dtype):
    images = data(dtype=dtype)
    seen = {row.tobytes() for row in stacked(epoch((), images)).numpy()}
    assert seen == {row.tobytes() for row in images.floats()}


@pytest.mark.parametrize("name", ALL)
def test_each_name_changes_images_by_seed_epoch_step_and_rank(name):
    plain, found = stacked(epoch(())), stacked(epoch((name,)))
    changed = (plain != found).flatten(1).any(1)
    assert changed.float().mean() > 0.25
    assert torch.equal(found, stacked(epoch((name,))))
    same_images = ImageSet(np.repeat(data(1).images, 48, 0), np.zeros(48, np.int64), ("a",), "toy", "train")
    if name in MIXING:  # mixing an image with itself changes nothing
        same_images = data()
    first = epoch((name,), same_images)
    others = {
        "step": first[1][1],
        "epoch": epoch((name,), same_images, number=1)[0][1],
        "seed": epoch((name,), same_images, seed=4)[0][1],
    }
    for what, other in others.items():
        assert not torch.equal(first[0][1], other), what
    ranks = [epoch((name,), same_images, rank=rank, world=2)[0][1] for rank in (0, 1)]
    assert not torch.equal(*ranks)


@pytest.mark.parametrize("name", SINGLE)
def test_each_image_has_its_own_draw(name):
    """Copies of one image come out in many ways."""
    images = torch.from_numpy(np.repeat(data(1, (3, 32, 32)).images, 32, 0))
    out = Strong((name,), dataset="cifar10", side=32)(images, seed=0)
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert len({image.numpy().tobytes() for image in out}) > 8


def test_the_draw_of_an_image_depends_on_the_seed_alone():
    """Neither the global generators nor what was drawn before count, and they are left as they were."""
    strong, images = Strong(SINGLE, dataset="toy", side=28), torch.from_numpy(data().images)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise), random.seed(noise), np.random.seed(noise)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        results.append(strong(images, seed=5))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.equal(*results) and not torch.equal(results[0], strong(images, seed=6))


def test_between_two_batches_the_caller_may_draw():
    names = ("crop", "flip", "autoaugment", "mixup", "cutmix")
    whole = epoch(names)
    batches = Batches(data(), TrainConfig(batch_size=16, augment=names), seed=3, place=Place(0, 1, CPU))
    torch.manual_seed(7)
    alone = [float(torch.rand(())) for _ in range(3)]
    torch.manual_seed(7)
    for (_, x, _), (_, other, _), value in zip(batches.epoch(0), whole, alone, strict=True):
        assert torch.equal(x, other) and float(torch.rand(())) == value


def test_an_epoch_with_every_augmentation_can_be_entered_in_its_middle():
    whole, rest = epoch(ALL, number=1), epoch(ALL, number=1, first=2)
    assert [step for step, *_ in rest] == [2]
    for ours, theirs in zip(whole[2:], rest, strict=True):
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


def test_names_are_a_set_in_a_fixed_order():
    assert torch.equal(stacked(epoch(ALL)), stacked(epoch(tuple(reversed(ALL)))))


@pytest.mark.parametrize("cheap", [(), ("crop", "flip")])
def test_a_strong_one_comes_after_crop_and_flip_and_leaves_their_draws(cheap):
    strong = Strong(("erasing",), dataset="toy", side=28)
    plain, found = epoch(cheap), epoch((*cheap, "erasing"))
    for (_, x, _), (_, erased, _) in zip(plain, found, strict=True):
        assert torch.equal(erased[erased != 0], x[erased != 0]), "only black boxes are added"
    assert not torch.equal(stacked(plain), stacked(found)) and strong


def flat(*values: float) -> Tensor:
    """Images of one grey each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()


def test_mixup_is_a_weighted_mean_of_two_images_with_a_share_of_its_own():
    x = flat(*torch.linspace(0, 1, 64).tolist())
    mixed = combine(x, ("mixup",), torch.Generator().manual_seed(0))
    grey = mixed[:, 0, 0, 0]
    assert torch.allclose(mixed, grey[:, None, None, None].expand_as(mixed))
    assert ((grey >= 0) & (grey <= 1)).all() and len(grey.unique()) > 60
    blends = combine(flat(*[0.0] * 32, *[1.0] * 32), ("mixup",), torch.Generator().manual_seed(0))[:, 0, 0, 0]
    assert len(blends.unique()) > 20, "a share for each image"


def test_cutmix_replaces_one_box_by_the_same_place_of_another_image():
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cut = combine(x, ("cutmix",), torch.Generator().manual_seed(1))
    sizes = set()
    for ours, original in zip(cut, x, strict=True):
        other = (ours != original).all(0)
        assert torch.equal(other, (ours != original).any(0)), "all channels at once"
        rows, columns = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & columns[None]) and contiguous(rows) and contiguous(columns)
        sizes.add((int(rows.sum()), int(columns.sum())))
        if other.any():
            assert any(torch.equal(ours[:, other], candidate[:, other]) for candidate in x)
    assert len(sizes) > 10


def contiguous(mask: Tensor) -> bool:
    where = mask.nonzero().flatten()
    return not len(where) or len(where) == int(where[-1] - where[0]) + 1


def test_with_both_names_each_image_gets_one_of_the_two():
    x = flat(*torch.linspace(0, 1, 200).tolist())
    both = combine(x, MIXING, torch.Generator().manual_seed(0))
    kinds = [len(image[0].unique()) for image in both]
    blended = [k == 1 and not torch.isin(image[0, 0, 0], x[:, 0, 0, 0]) for k, image in zip(kinds, both, strict=True)]
    assert sum(k == 2 for k in kinds) > 40 and sum(blended) > 60 and max(kinds) == 2


def test_a_batch_of_one_has_nobody_to_be_mixed_with():
    x = torch.rand(1, 3, 8, 8)
    assert torch.allclose(combine(x, MIXING, torch.Generator()), x)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("cifar100", 32, "CIFAR10"),
        ("fashion-mnist", 28, "CIFAR10"),
        ("svhn-npz", 32, "SVHN"),
        ("tiny-imagenet", 64, "IMAGENET"),
    ],
)
def test_autoaugment_takes_the_policy_found_on_a_data_set_of_the_kind(name, side, expected):
    assert policy(name, side) == expected


@contextmanager
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in ("torchvision.transforms", "torchvision.transforms.v2"):
            patch.setitem(sys.modules, module, None)
        yield


def test_without_torchvision_strong_names_say_what_to_install_and_the_others_work(monkeypatch):
    with hidden(monkeypatch):
        epoch(("crop", "flip", "mixup", "cutmix"))
        with pytest.raises(RequirementError, match="autoaugment needs torchvision") as caught:
            epoch(("autoaugment",))
    assert "pip install 'robustkd[train]'" in caught.value.fix and caught.value.exit_code == 4


def recipe(method: Any, augment: list[str]) -> Recipe:
    roles = Shelf("methods").get(method["name"] if isinstance(method, dict) else method).roles
    return validate(
        Recipe,
        Source(
            {
                "dataset": "fashion-mnist-10k",
                "student": "resnet18",
                "teachers": [{"role": role, "id": "fashion-mnist-resnet18"} for role in roles],
                "method": method,
                "train": {"augment": augment},
            },
            {("train", "augment"): "mine.yaml, line 7"},
        ),
    )


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("method", ["pgd-at", "dgad", {"name": "adaad", "introspection": True}])
def test_mixing_is_refused_where_labels_are_used(name, method):
    with pytest.raises(ConfigError, match=rf"train\.augment: {name} mixes images and no labels") as caught:
        recipe(method, ["crop", name])
    assert caught.value.exit_code == 3 and caught.value.where == "mine.yaml, line 7"
    assert "adaad, advfunmatch" in caught.value.fix and "pgd-at" not in caught.value.fix


@pytest.mark.parametrize("method", ["adaad", "advfunmatch", "rslad"])
def test_mixing_is_taken_where_no_labels_are_used(method):
    assert recipe(method, ["crop", "flip", "autoaugment", "mixup", "cutmix"]).train.augment[-1] == "cutmix"
    assert recipe("pgd-at", ["crop", "flip", *SINGLE]).train.augment[-1] == "erasing"


def test_an_unknown_augmentation_is_refused_with_the_field():
    with pytest.raises(ConfigError, match=r"train\.augment\.0: .*'autoaugment'"):
        recipe("rslad", ["autoaugmnet"])


def test_the_benchmark_says_what_an_image_costs_beside_crop_and_flip():
    rows = list(bench.rows(quick=True, names=("flip", "erasing"), pairs=2))
    assert [row["case"] for row in rows] == ["augment/flip", "augment/erasing"]
    for row in rows:
        assert row["per_image"] == pytest.approx(row["ours"] / bench.BATCH) and row["ratio"] > 0 and row["threads"] == 1


@pytest.mark.parametrize("name", Shelf("methods").names())
def test_what_a_method_says_of_labels_is_true(name):
    """Other labels change neither attack nor loss where it says it looks at none, and one of them where it does."""
    method = make(name, classes=4)
    nets = Nets(SmallNet(4, seed=1).eval(), {role: frozen(SmallNet(4, seed=2)) for role in type(method).roles})
    x, x_adv = pictures(6), pictures(6, seed=9)
    found = []
    for y in (torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)):
        loss, terms = method.loss(nets, Batch(x, y, x_adv), method.init(), CLOCK)
        attack = method.inner(nets, x, y)(x_adv)
        found.append(torch.cat([loss.detach().flatten(), attack.detach(), *(term.flatten() for term in terms.values())]))
    assert torch.equal(*found) != type(method).labels_for(method.config)
