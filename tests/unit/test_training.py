"""The training loop: batches, schedules, state, resume, the run's folder."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from robustkd.bundle import Bundle
from robustkd.datasets._base import ImageSet
from robustkd.errors import ArtifactError, ConfigError, Interrupted, NumericsError
from robustkd.losses import cross_entropy
from robustkd.methods._base import Method, terms
from robustkd.methods.pgd_at import PgdAt
from robustkd.models._files import load_net, read_state
from robustkd.recipe.schema import Recipe, Schedule, TrainConfig
from robustkd.training import threads
from robustkd.training.batches import Batches, Place, augment, divide, random_crop
from robustkd.training.evaluate import evaluate
from robustkd.training.schedule import rate
from robustkd.training.verb import WORK, difference, distill, only_run

HERE = Place(rank=0, world=1, device=torch.device("cpu"))
SMALL = {
    "dataset": {"name": "fashion-mnist-10k", "holdout": 40, "train_n": 200},
    "student": {"name": "resnet18", "width": 0.0625, "stem_stride": 2},
    "method": {"name": "pgd-at"},
    "inner": {"steps": 2, "step_size": "4/255"},
    "train": {"epochs": 2, "batch_size": 32, "threads": 1, "tensorboard": False, "save_every": 3},
}


def recipe(**sections) -> Recipe:
    values = {k: {**v} for k, v in SMALL.items()}
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return Recipe.model_validate(values)


def images(n: int = 50, classes: int = 5) -> ImageSet:
    rng = np.random.default_rng(0)
    names = tuple(f"c{i}" for i in range(classes))
    return ImageSet(rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), np.arange(n) % classes, names, "toy", "train")


def test_an_epoch_shows_every_image_once_and_ranks_share_it():
    config = TrainConfig(batch_size=16, augment=())
    whole = Batches(images(), config, seed=3, place=HERE)
    seen = np.concatenate([(x * 255).round().numpy() for _, x, _ in whole.epoch(0)]).reshape(50, -1)
    assert len({row.tobytes() for row in seen}) == 50
    parts = [
        np.concatenate([y.numpy() for _, _, y in Batches(images(), config, seed=3, place=Place(r, 2, HERE.device)).epoch(0)])
        for r in (0, 1)
    ]
    assert sorted(np.concatenate(parts)) == sorted(images().labels)


def test_an_epoch_can_be_entered_in_its_middle():
    batches = Batches(images(), TrainConfig(batch_size=16), seed=3, place=HERE)
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, first=2))
    assert [step for step, *_ in rest] == [2, 3]
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0][1], next(iter(batches.epoch(2)))[1])


def test_a_crop_shifts_each_image_by_at_most_the_padding():
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1
    cropped = random_crop(x, 2, torch.Generator().manual_seed(0))
    assert cropped.shape == x.shape and torch.equal(cropped.sum((1, 2, 3)), torch.ones(64))
    where = cropped.flatten(1).argmax(1)
    rows, columns = where // 9, where % 9
    assert {int(v) for v in rows} == {int(v) for v in columns} == {2, 3, 4, 5, 6}


def test_a_flip_mirrors_some_images_and_leaves_the_others():
    x = torch.rand(40, 1, 5, 5)
    flipped = augment(x, TrainConfig(augment=("flip",)), torch.Generator().manual_seed(1))
    same = [torch.equal(a, b) for a, b in zip(x, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(x, flipped, strict=True)]
    assert all(s or m for s, m in zip(same, mirrored, strict=True)) and 5 < sum(same) < 35


def test_held_out_images_are_never_trained_on():
    train, held = divide(images(), recipe(dataset={"holdout": 10, "train_n": None}))
    assert len(train) == 40 and len(held) == 10
    pixels = {i.tobytes() for i in train.images}
    assert not any(i.tobytes() in pixels for i in held.images)


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        (Schedule(), 99.9, 0.1),
        (Schedule(), 100, 0.01),
        (Schedule(), 150, 0.001),
        (Schedule(name="cosine"), 0, 0.1),
        (Schedule(name="cosine"), 100, 0.05),
        (Schedule(name="cosine", warmup=10), 5, 0.05 * 0.5 * 2 * (0.5 + 0.5 * np.cos(np.pi * 5 / 200))),
        (Schedule(name="onecycle", warmup=50), 25, 0.05),
        (Schedule(name="onecycle", warmup=50), 50, 0.1),
        (Schedule(name="onecycle", warmup=50), 125, 0.05),
        (Schedule(name="constant"), 150, 0.1),
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule, epoch, expected):
    assert rate(schedule, 0.1, epoch=epoch, epochs=200) == pytest.approx(expected)


def test_pgd_accuracy_is_not_above_clean_accuracy_and_the_net_keeps_its_mode():
    net = recipe().student.build(channels=1, classes=5).train()
    found = evaluate(net, images(), recipe().threat, seed=0, device=HERE.device)
    assert 0 <= found.robust <= found.clean <= 1 and net.training
    assert found.score("weighted") == pytest.approx((found.clean + found.robust) / 2)


def test_distill_writes_a_bundle_that_loads_and_logs_what_it_saw(tmp_path):
    events: list[dict] = []
    made = distill(recipe(), tmp_path / "run", listen=events.append)
    facts = Bundle.open(made.path, kind="checkpoint").manifest
    assert facts.model.input_shape == (1, 28, 28) and len(facts.model.classes) == 10
    assert load_net(made)(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [m for m in lines if "loss" in m], [m for m in lines if "clean_accuracy" in m]
    assert {"ce_adv", "lr", "images_per_s", "inner_share"} <= steps[0].keys() and len(evaluations) == 2
    assert all(0 < m["inner_share"] < 1 for m in steps)
    assert [e["event"] for e in events].count("evaluation") == 2
    assert facts.model_extra["selected"]["best"]["robust"] == max(m["robust_accuracy"] for m in evaluations)


def test_a_finished_run_is_not_overwritten(tmp_path):
    distill(recipe(train={"epochs": 1}), tmp_path)
    before = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="finished"):
        distill(recipe(train={"epochs": 1}), tmp_path)
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == before
    assert distill(recipe(train={"epochs": 1}), tmp_path, resume=True).path == tmp_path / "checkpoint"


def test_another_recipe_cannot_resume_a_run(tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    with pytest.raises(Interrupted):
        distill(recipe(), tmp_path)
    with pytest.raises(ArtifactError, match=r"train\.lr was 0\.1, is 0\.2"):
        distill(recipe(train={"lr": 0.2}), tmp_path, resume=True)
    with pytest.raises(ArtifactError, match="unfinished run"):
        distill(recipe(), tmp_path)


def test_nothing_to_resume_is_an_error_that_creates_no_run(tmp_path):
    with pytest.raises(ArtifactError, match="nothing to resume"):
        distill(recipe(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / WORK).exists()


def stop_after(monkeypatch, steps: int) -> None:
    """Ask for a stop, as a signal would, after some outer losses."""
    loss, count = PgdAt.loss, iter(range(10_000))

    def counted(self, *args):
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args)

    monkeypatch.setattr(PgdAt, "loss", counted)


@pytest.mark.parametrize("steps", [1, 6, 9])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch, steps):
    whole = distill(recipe(), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, steps)
        distill(recipe(), tmp_path / "cut")
    cut = distill(recipe(), tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = read_state(whole.path / name), read_state(cut.path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert timeless(whole) == timeless(cut)


def timeless(bundle: Bundle) -> list[dict]:
    lines = [json.loads(line) for line in (bundle.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("images_per_s", "inner_share")} for m in lines]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL in the middle of the second epoch, through the real command line."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "robustkd", "distill", "--recipe", str(tmp_path / "small.yaml"), "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    victim = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "cut" / WORK / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert state.exists() and not (tmp_path / "cut" / "checkpoint").exists()
    subprocess.run([*command, str(tmp_path / "cut"), "--resume"], check=True, capture_output=True)
    a, b = (read_state(tmp_path / name / "checkpoint" / "last.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_term(tmp_path, monkeypatch):
    def broken(self, nets, batch, state, clock):
        ce = cross_entropy(nets.student(batch.x_adv), batch.y).mean() * (float("nan") if clock.step == 5 else 1.0)
        return ce, terms(fine=ce.detach() * 0 if clock.step != 5 else torch.zeros(()), ce_adv=ce)

    monkeypatch.setattr(PgdAt, "loss", broken)
    with pytest.raises(NumericsError, match="ce_adv is nan in step 5"):
        distill(recipe(), tmp_path)
    state = read_state(tmp_path / WORK / "state.safetensors")
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_two_runs_cannot_share_a_folder(tmp_path):
    imports = "import sys; from pathlib import Path; from robustkd.training.verb import only_run"
    code = f"{imports}\nwith only_run(Path(sys.argv[1])): pass"
    with only_run(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "another run is using this folder" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True).returncode == 0


def test_too_few_images_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="fewer than two"):
        distill(recipe(dataset={"train_n": 1}), tmp_path)


def test_the_first_difference_of_two_recipes_is_named():
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b was 1, is 2"
    assert difference({"train": {"threads": 1}}, {"train": {"threads": 2}}) == ""


@pytest.mark.parametrize(("said", "expected"), [("1", 1), ("64", 4), ("", 4), ("0", 4), ("2,1", 4)])
def test_omp_num_threads_is_a_limit(said, expected, monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads.cores() == expected


def test_threads_follow_the_load(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 8)
    for busy, expected in ((0.0, 8), (3.2, 5), (20.0, 1)):
        monkeypatch.setattr(threads, "load", lambda busy=busy: busy)
        assert threads.choose(None) == (expected, "")
    assert "slower" in threads.choose(4)[1]


def test_every_method_states_where_its_state_goes():
    assert Method.save(PgdAt.__new__(PgdAt), None) == {}


def test_what_has_just_ended_does_not_count_as_load(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 6.0, 6.0))
    ticks = iter([1000, 1000 + int(threads.GLANCE_S * os.sysconf("SC_CLK_TCK"))])
    monkeypatch.setattr(threads, "_busy_ticks", lambda: next(ticks))
    assert threads.load() == pytest.approx(1.0, abs=0.05)
    monkeypatch.setattr(threads, "_busy_ticks", lambda: 0)
    assert threads.load() == 6.0
