"""The page of bench.methods: the tables with the words around them; every figure comes from measured.json files."""

from __future__ import annotations

from typing import Any

from bench._methods_plan import AUTOATTACK, YARDSTICK, Setting
from bench._methods_table import Line, Run, costs, lines, table, teachers

INTRODUCTION = """\
# All methods on one student

What each method reaches with the same student, teachers, images, steps and epochs. Made by `bench/methods.py`; no figure
on this page is written by hand."""

READING = f"""\
Sorted by accuracy under AutoAttack (the part named above). Accuracies are percent, means over the seeds. In brackets: the
95 % Wilson interval of that mean for the number of images (not images times seeds, for the seeds share their images); it says
how far other test images may move the figure. `over seeds` is the lowest and highest seed under AutoAttack: how far training
again may.

`against {YARDSTICK}` is the difference in points under AutoAttack. `worse / better` counts pairs of image and seed on which
{YARDSTICK} holds and the method is broken, and the reverse, with the exact McNemar test over these pairs; pairs of one image
are not independent, so this p is too small where seeds agree. `images worse / better` counts images on which one of the two
holds in more seeds than the other, with the exact sign test, which has no such flaw."""

COSTS = f"""\
Passes are counted by `robustkd.methods._cost` for the attack above, per training image and in forward passes of the network
named (an input gradient is 1 more, a full backward 2 more). Times are the median over the logged steps of a batch, then over
seeds; `times {YARDSTICK}` is the ratio to {YARDSTICK} with the same seed, median over seeds."""

CAVEATS = """\
- This is no ranking of the papers. The student is small, training is short and its attack weak; the papers train far larger
  networks for 76 to 300 epochs, mostly against ten steps, on other images and with schedules of their own.
- One robust and one clean teacher, both small; the methods were built for stronger ones.
- `saad` weighs images by how unsure the teacher is of them: of most images here this teacher is sure, so in a short run they
  hardly count. It is meant for teachers so strong that the student's adversarial images do not move them.
- Default knobs, but for the notes above; nothing is tuned, neither for a method nor against it.
- The times contain whatever else the machine did (see its load); the counted passes do not."""

SCALE = """\
- One learning rate for all. The KL terms of {} are averaged over images and classes, as their authors' code does
  for ten classes, and so are ten times smaller than the others' (a temperature such as ARD's makes up for it); in a short run
  that can cost accuracy."""

CONTROL = " `adaad-bmean` against `adaad` shows how much for one of them."


def page(runs: list[Run], command: str, *, missing: list[str], failed: dict[str, str]) -> str:
    """The whole page.

    Args:
        runs: the contents of the measured.json files, all of one setting.
        command: what made them.
        missing: names of runs asked for and not measured.
        failed: name and reason of those among them that stopped with an error.
    """
    setting, found, shown = Setting.read(runs[0]["setting"]), lines(runs), teachers(runs)
    parts = [INTRODUCTION, *_setting(runs, setting, found), f"```bash\n{command}\n```"]
    parts += ["## Result", table(found), READING, *_correction(found), *_notes(found)]
    parts += ["## Cost of a training step", costs(found), COSTS]
    parts += ["## Teachers", shown] if shown else []
    parts += ["## Caveats", _caveats(runs)]
    if missing or failed:
        parts += ["## Not measured", "\n".join(f"- `{name}`: {failed.get(name, 'not run')}" for name in missing)]
    return "\n\n".join(parts) + "\n"


def _setting(runs: list[Run], setting: Setting, found: list[Line]) -> list[str]:
    recipe = min((run for run in runs if "label" in run), key=lambda run: run["label"] != YARDSTICK)["recipe"]
    student, data, train, inner = recipe["student"], recipe["dataset"], recipe["train"], recipe["inner"]
    seeds = sorted({seed for line in found for seed in line.seeds})
    n, attack_n, others = found[0].n["clean"], found[0].n["autoattack"], "the others"
    used = f"{setting.train_n:,} of {others}" if setting.train_n else others
    return [
        f"**Student and data.** {student['name']} of width {student['width']:g} with a stem of stride "
        f"{student['stem_stride']}; {data['name']}, {data['holdout']} training images held out to choose the best epoch "
        f"(by PGD-10; by clean accuracy where training does not attack), {used} trained on.",
        f"**Training.** {train['epochs']} epochs, batch {train['batch_size']}, lr {train['lr']:g}, "
        f"{train['schedule']['name']}, augmentation {', '.join(train['augment'])}. The attack takes {inner['steps']} steps of "
        f"{255 * inner['step_size']:g}/255 within {255 * recipe['threat']['eps']:g}/255 ({recipe['threat']['norm']}) in every "
        f"method that attacks, from the method's own start. Seeds {', '.join(map(str, seeds))}.",
        f"**Measured** on the weights of the best epoch: clean accuracy and PGD-20 (cross entropy, step eps/4, uniform start; "
        f"the first image that fools counts) on the first {n} test images; {_attacks(setting)} on the first {attack_n}. The "
        f"same images for all; n is per seed.",
        _machine(runs, setting),
    ]


def _machine(runs: list[Run], setting: Setting) -> str:
    machines = sorted({f"{run['hardware']['cpu']}, {run['hardware']['cores']} cores" for run in runs})
    packages = sorted({f"torch {run['versions'].get('torch')}, robustkd {run['versions']['robustkd']}" for run in runs})
    loads = [run["load_before"] for run in runs if run["load_before"] is not None]
    load = f"; load average before a run {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return f"**Machine.** {'; '.join(machines)}; threads per run: {setting.threads}; {'; '.join(packages)}{load}."


def _attacks(setting: Setting) -> str:
    named = [f"{name} ({', '.join(f'{k} {v}' for k, v in setting.knobs(name).items())})" for name in setting.attacks]
    left_out = [name for name in AUTOATTACK if name not in setting.attacks]
    whole = not left_out and all(setting.knobs(name) == knobs for name, knobs in AUTOATTACK.items())
    without = f", without {' and '.join(left_out)}" if left_out else ""
    kind = "the standard set of AutoAttack" if whole else "a part of the standard set of AutoAttack"
    return f"{kind} in turn, {', '.join(named)}{without}{_fewer(setting)},"


def _fewer(setting: Setting) -> str:
    standard = AUTOATTACK["square"]["queries"]
    return (
        f"; the standard square has {standard} queries" if "square" in setting.attacks and setting.queries != standard else ""
    )


def _correction(found: list[Line]) -> list[str]:
    compared = sum(line.paired is not None for line in found)
    if not compared:
        return []
    return [f"Rows held against {YARDSTICK}: {compared}; with Bonferroni's correction a p counts below {0.05 / compared:.2g}."]


def _notes(found: list[Line]) -> list[str]:
    notes = [f"- `{line.label}`: {line.note}" for line in found if line.note]
    return ["\n".join(notes)] if notes else []


def _caveats(runs: list[Run]) -> str:
    small = sorted({run["label"] for run in runs if "label" in run and _over_classes(run["recipe"]["method"])})
    control = CONTROL if {"adaad", "adaad-bmean"} <= {run.get("label") for run in runs} else ""
    return CAVEATS + ("\n" + SCALE.format(", ".join(small)) + control if small else "")


def _over_classes(method: dict[str, Any]) -> bool:
    """Whether its KL is averaged over classes; AdaAD leaves that to the number of classes."""
    return method.get("reduction", "bmean") in ("emean", None) and not method.get("introspection", False)
