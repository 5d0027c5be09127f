"""Reference steps of the methods with state or with weights of images: MTARD, B-MTARD, SAAD."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference.tools import Setting, attack, kl_mean, kl_rows, look, on_labels, update

ETA, MU = 0.025, 0.001


def mtard(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise)
    adversarial, natural = s.student(x_adv), s.student(x)
    assert s.clean is not None
    loss_adv = kl_mean(adversarial, look(s.teacher, x_adv))
    loss_nat = kl_mean(natural, look(s.clean, x))
    return update(s, balanced(s, loss_adv, loss_nat))


def b_mtard(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise)
    adversarial, natural = s.student(x_adv), s.student(x)
    assert s.clean is not None
    tau_adv, tau_nat = s.memory.get("tau_adv", 1.0), s.memory.get("tau_nat", 1.0)
    teacher_adv, teacher_nat = look(s.teacher, x_adv) / tau_adv, look(s.clean, x) / tau_nat
    loss_adv, loss_nat = kl_mean(adversarial, teacher_adv), kl_mean(natural, teacher_nat)
    h_adv, h_nat = negative_entropy(teacher_adv), negative_entropy(teacher_nat)
    s.memory["tau_adv"] = min(max(tau_adv - MU * sign(h_adv / h_nat - 1), 1.0), 10.0)
    s.memory["tau_nat"] = min(max(tau_nat - MU * sign(h_nat / h_adv - 1), 1.0), 10.0)
    return update(s, balanced(s, loss_adv, loss_nat))


def balanced(s: Setting, loss_adv: Tensor, loss_nat: Tensor) -> Tensor:
    """The sum with the weights that follow from how far each loss has fallen since the first batch."""
    memory, adv, nat = s.memory, loss_adv.item(), loss_nat.item()
    first_adv, first_nat = memory.setdefault("first_adv", adv), memory.setdefault("first_nat", nat)
    ratio_adv, ratio_nat = adv / first_adv, nat / first_nat
    w_nat = memory.get("w_nat", 0.5)
    memory["w_nat"] = w_nat - ETA * (w_nat - ratio_nat / (ratio_nat + ratio_adv))
    return (1 - memory["w_nat"]) * loss_adv + memory["w_nat"] * loss_nat


def negative_entropy(logits: Tensor) -> float:
    """The mean over all entries of p log p, without the released code's 1e-5."""
    return float((F.softmax(logits, dim=1) * F.log_softmax(logits, dim=1)).mean())


def sign(value: float) -> float:
    return 0.0 if value == 0 else math.copysign(1.0, value)


def saad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """In the last epoch, where IGDM has its whole weight."""
    clean = x.clone().requires_grad_()
    logits = s.teacher(clean)
    slope = torch.autograd.grad(torch.gather(logits, 1, y.unsqueeze(1)).sum(), [clean])[0]
    logits, label = logits.detach(), F.one_hot(y, logits.shape[1])

    def objective(z: Tensor) -> Tensor:
        rise = (slope * (z - x)).flatten(1).sum(dim=1)
        return kl_live(s.student(z), logits + rise.unsqueeze(1) * label).sum()

    x_adv = attack(s, objective, x, noise)
    mirrored = x - (x_adv - x)
    teacher_adv, teacher_away = look(s.teacher, x_adv), look(s.teacher, mirrored)
    student_adv, student_away, student = s.student(x_adv), s.student(mirrored), s.student(x)
    entropy = -(F.softmax(teacher_adv, dim=1) * F.log_softmax(teacher_adv, dim=1)).sum(dim=1)
    weight = 5.0 * (entropy - entropy.min())
    spread = (weight - weight.min()) / (weight.max() - weight.min() + 1e-8)
    robust = weight * kl_rows(student_adv, teacher_adv)
    gradients = weight * kl_rows(student_adv - student_away, teacher_adv - teacher_away)
    natural = (1 - spread) * kl_rows(student, look(s.teacher, x))
    return update(s, (robust + 1.0 * gradients + 0.0 * natural).mean())


def kl_live(student: Tensor, target: Tensor) -> Tensor:
    """For each image, with gradient also through the target."""
    p = F.softmax(target, dim=1)
    return (p * (F.log_softmax(target, dim=1) - F.log_softmax(student, dim=1))).sum(dim=1)
