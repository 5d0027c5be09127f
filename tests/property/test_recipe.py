"""A recipe that is resolved, dumped and loaded again is the same recipe."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from robustkd.recipe.reading import Source, validate
from robustkd.recipe.schema import Recipe
from robustkd.resources import shipped

finite = st.floats(1e-6, 1e3)
fraction = st.floats(0, 1)
normalize = st.none() | st.just({"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with any of the fields left out, but never its name."""
    name = {"name": fields.pop("name")} if "name" in fields else {}
    return st.fixed_dictionaries(name, optional=fields)


students = st.one_of(
    record(name=st.just("resnet18"), width=st.floats(0.01, 8), stem_stride=st.integers(1, 2), normalize=normalize),
    record(name=st.just("mobilenet-v2"), width=st.floats(0.01, 8)),
    record(
        name=st.just("cifar-resnet"), depth=st.sampled_from([20, 56]), shortcut=st.sampled_from(["pad_end", "conv_shortcut"])
    ),
    st.just("resnet18"),
)
paths = st.sampled_from(["a.npz", "/data/b.npz", "sub/c.npz"])
datasets = st.one_of(
    record(
        name=st.just("cifar10"), root=st.just("/data"), holdout=st.integers(0, 5000), train_n=st.none() | st.integers(1, 99)
    ),
    record(name=st.just("npz"), train=st.lists(paths), test=st.lists(paths), classes=st.just(["cat", "dog"])),
    record(name=st.just("folder"), path=paths, size=st.integers(1, 64), channels=st.sampled_from([1, 3])),
    st.just("fashion-mnist-10k"),
)
untaught = st.one_of(
    st.just("standard"),
    record(name=st.just("pgd-at"), clean_bn_pass=st.booleans()),
    record(name=st.just("trades"), beta=finite),
)
taught = st.one_of(
    record(
        name=st.just("rslad"), adversarial_weight=fraction, reduction=st.sampled_from(["emean", "bmean", "sum"]), scale=finite
    ),
    record(name=st.just("adaad"), alpha=fraction, reduction=st.sampled_from([None, "emean", "bmean"])),
    record(name=st.just("dgad"), beta=finite, kl_scale=finite, partition=st.booleans()),
)
teachers = st.one_of(
    st.fixed_dictionaries({"id": st.text(min_size=1, max_size=9)}),
    st.fixed_dictionaries({"path": paths, "model": students}, optional={"sha256": st.just("0" * 64)}),
)
pixels = st.one_of(st.sampled_from(["8/255", "0.5 / 255", "0"]), st.floats(0, 1))
sections = {
    "threat": record(norm=st.sampled_from(["linf", "l2"]), eps=pixels),
    "inner": record(steps=st.integers(0, 50), step_size=pixels, start=st.sampled_from([None, "noise", "uniform"])),
    "train": record(epochs=st.integers(1, 300), lr=finite, augment=st.lists(st.sampled_from(["crop", "flip"]), max_size=2)),
    "audit": record(n=st.integers(1, 10**4), tolerance=st.floats(0, 100), min_robust=st.none() | st.floats(0, 100)),
    "targets": st.lists(st.text(min_size=1, max_size=9), max_size=3),
    "seed": st.integers(0, 2**31 - 1),
    "name": st.text(min_size=1, max_size=9),
}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    values = draw(st.fixed_dictionaries({"dataset": datasets, "student": students}, optional=sections))
    if draw(st.booleans()):
        return values | {"method": draw(untaught)}
    return values | {"method": draw(taught), "teachers": [draw(teachers)]}


@given(values=recipes())
def test_resolve_dump_load_is_the_identity(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    dumped = recipe.model_dump(mode="json")
    assert Recipe.model_validate(dumped) == recipe
    assert Recipe.model_validate(json.loads(json.dumps(dumped, allow_nan=False))) == recipe
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(dumped))) == recipe
    assert Recipe.model_validate(dumped).model_dump(mode="json") == dumped


@given(values=recipes())
def test_every_knob_given_is_a_knob_kept(values: dict[str, Any]) -> None:
    """Nothing is dropped on the way: SerializeAsAny keeps the fields of the shelf entry's own config."""
    dumped = validate(Recipe, Source(values)).model_dump(mode="json")
    for section in ("dataset", "student", "method"):
        given_values = values[section] if isinstance(values[section], dict) else {"name": values[section]}
        for key, value in given_values.items():
            assert dumped[section][key] == value


def test_shipped_recipes_are_the_identity_too() -> None:
    from robustkd.recipe.reading import read

    for name in shipped("recipe"):
        recipe = validate(Recipe, read("recipe", name))
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
