"""IAD: trust the teacher as far as it is right under attack, and elsewhere the student's own clean prediction.

Zhu et al., "Reliable Adversarial Distillation with Unreliable Teachers", ICLR 2022 (methods.md, 4.2). Three forms:
`iad-1` (one robust teacher), `iad-2` (a second, clean teacher), and `akd2`, which is `iad-2` without introspection.
The introspective target S(x) is not detached. Introspection starts at `gate_epoch`.

Departures: `iad-1` leaves the teacher's term without the weight w, as the released code does, where the paper has it;
`weight_teacher_term: true` is the paper's. The released code's second, unused pass on x' is dropped, and one clean pass
serves both of its clean terms. In `iad-2`, as in the code, the introspective KL has temperature 1 under the factor
tau^2, and there is no clean pass before introspection starts. Of the lr schedule what is said in `ard` holds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from robustkd.ascent import Objective
from robustkd.losses import cross_entropy, full, kl
from robustkd.methods._base import Batch, Clock, Method, MethodConfig, Nets, Role, Terms, fixed, terms

Form = Literal["iad-1", "iad-2", "akd2"]
#: knobs that mean something in some of the forms only
_ONLY_IN: dict[str, tuple[Form, ...]] = {
    "alpha": ("iad-1",),
    "clean_bn_pass": ("iad-1",),
    "alpha_robust": ("iad-2", "akd2"),
    "alpha_clean": ("iad-2", "akd2"),
    "beta": ("iad-1", "iad-2"),
    "gate_epoch": ("iad-1", "iad-2"),
    "weight_teacher_term": ("iad-1", "iad-2"),
}
_GATE: dict[Form, int] = {"iad-1": 60, "iad-2": 40}


class IadConfig(MethodConfig, frozen=True):
    """Knobs of the three forms; one that the form does not have is refused."""

    name: Literal["iad"] = "iad"
    form: Form = Field("iad-1", description="iad-1; iad-2 and akd2 need a second, clean teacher")
    alpha: float = Field(1.0, ge=0, le=1, description="iad-1: weight of distillation; the rest is the clean label loss")
    alpha_robust: float = Field(0.5, ge=0, le=1, description="iad-2, akd2: weight of the robust teacher's part")
    alpha_clean: float = Field(0.25, ge=0, le=1, description="iad-2, akd2: weight of the clean teacher; the rest is CE")
    tau: float = Field(1.0, gt=0, description="temperature of both sides of the teachers' terms")
    beta: float = Field(0.1, ge=0, description="exponent of the trust w = pT(y | x')^beta")
    gate_epoch: int | None = Field(
        None, ge=0, description="0-based epoch introspection starts at; left out: 60, in iad-2 40; on CIFAR-100 80"
    )
    weight_teacher_term: bool | None = Field(
        None, description="multiply the robust teacher's term by w; left out as in the code: no, in iad-2 yes"
    )
    clean_bn_pass: bool = Field(
        True, description="iad-1: run the clean pass also where it has no weight: it moves running statistics"
    )

    @field_validator(*_ONLY_IN)
    @classmethod
    def _of_this_form(cls, value: Any, info: ValidationInfo) -> Any:
        forms, form = _ONLY_IN[str(info.field_name)], info.data.get("form")
        # a resolved recipe writes every knob out, so the default passes
        if form is not None and form not in forms and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"{form} has no such knob, only {' and '.join(forms)}")
        return value

    @model_validator(mode="after")
    def _leave_something(self) -> IadConfig:
        if self.form != "iad-1" and self.alpha_robust + self.alpha_clean > 1:
            raise ValueError(f"alpha_robust + alpha_clean is {self.alpha_robust + self.alpha_clean:g}, more than 1")
        return self


class Iad(Method[IadConfig, None]):
    """Introspective adversarial distillation."""

    summary = "ARD that trusts the teacher where it is right at x', else the student; a clean teacher by form: iad-2"
    paper = "Zhu et al., ICLR 2022"
    equation = (
        "w = pT(y | x')^0.1    inner: max CE(S(x'), y)    "
        "outer: iad-1: a tau^2 KL(T(x) || S(x')) + (1 - a) CE(S(x), y), and from epoch 60 + a (1 - w) KL(S(x) || S(x')); "
        "iad-2: (1 - a1 - a2) CE(S(x'), y) + a1 tau^2 [ w KL(T(x') || S(x')) + (1 - w) KL(S(x) || S(x')) ]"
        " + a2 tau^2 KL(Tclean(x') || S(x')), w = 1 before epoch 40; akd2: iad-2 with w = 1 throughout; means over images"
    )
    departures = (
        "iad-1's teacher term is without w (as in the code, the paper has it): weight_teacher_term; "
        "an unused second pass on x' is dropped and one clean pass kept"
    )
    roles = ("robust",)
    start = "uniform"
    attack_mode = "train"
    Config = IadConfig

    @classmethod
    def roles_for(cls, config: MethodConfig) -> tuple[Role, ...]:
        """`iad-2` and `akd2` have a clean teacher too."""
        return ("robust",) if isinstance(config, IadConfig) and config.form == "iad-1" else ("robust", "clean")

    def inner(self, nets: Nets, x: Tensor, y: Tensor) -> Objective:
        """CE(S(x'), y)."""
        return lambda x_adv: cross_entropy(nets.student(x_adv), y)

    def loss(self, nets: Nets, batch: Batch, state: None, clock: Clock) -> tuple[Tensor, Terms]:
        """The equation above; passes: adversarial, then clean (in `iad-2` only while introspective)."""
        config = self.config
        gate = _GATE.get(config.form) if config.gate_epoch is None else config.gate_epoch
        introspective = config.form != "akd2" and gate is not None and clock.epoch >= gate
        return (self._first if config.form == "iad-1" else self._second)(nets, batch, introspective)

    def _first(self, nets: Nets, batch: Batch, introspective: bool) -> tuple[Tensor, Terms]:
        alpha, tau = self.config.alpha, self.config.tau
        zero = batch.x.new_zeros(())
        adversarial = nets.student(batch.x_adv)
        taught, ce, own, doubt = kl(fixed(nets.robust, batch.x), adversarial, tau=tau), zero, zero, zero
        if introspective or alpha < 1 or self.config.clean_bn_pass:
            clean = nets.student(batch.x)
            ce = cross_entropy(clean, batch.y).mean() if alpha < 1 else ce
        if introspective:
            w, rest = trust(fixed(nets.robust, batch.x_adv), batch.y, self.config.beta)
            own, doubt = (rest * kl(clean, adversarial)).mean(), rest.mean()
            taught = w * taught if self.config.weight_teacher_term else taught
        teacher = tau**2 * batch.weighted(taught).mean()
        loss = alpha * (teacher + own) + (1 - alpha) * ce if alpha < 1 else teacher + own
        return loss, terms(kl_adv=teacher, ce_clean=ce, introspection=own, introspection_weight=doubt)

    def _second(self, nets: Nets, batch: Batch, introspective: bool) -> tuple[Tensor, Terms]:
        config, tau = self.config, self.config.tau
        own = doubt = batch.x.new_zeros(())
        adversarial = nets.student(batch.x_adv)
        ce = cross_entropy(adversarial, batch.y).mean()
        robust = fixed(nets.robust, batch.x_adv)
        taught = kl(robust, adversarial, tau=tau)
        if introspective:
            w, rest = trust(robust, batch.y, config.beta)
            own, doubt = tau**2 * (rest * kl(nets.student(batch.x), adversarial)).mean(), rest.mean()
            taught = taught if config.weight_teacher_term is False else w * taught
        teacher = tau**2 * batch.weighted(taught).mean()
        second = tau**2 * batch.weighted(kl(fixed(nets.teachers["clean"], batch.x_adv), adversarial, tau=tau)).mean()
        a1, a2 = config.alpha_robust, config.alpha_clean
        loss = (1 - a1 - a2) * ce + a1 * (teacher + own) + a2 * second
        return loss, terms(ce_adv=ce, kl_adv=teacher, kl_adv_clean=second, introspection=own, introspection_weight=doubt)


def trust(logits: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The weights w = p_y^beta in (0, 1] and 1 - w, both (N,), without gradient; the second is no difference of numbers near 1.

    Args:
        logits: the robust teacher's at x', (N, C).
        y: labels (N,).
        beta: the exponent.
    """
    power = beta * full(logits.detach()).log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return power.exp(), -power.expm1()


ENTRY = Iad
