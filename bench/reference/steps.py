"""One training step of each method, written as scripts that accompany the papers write it; two outer passes, one after
the other. The methods with two teachers, and those weighted by image, are in `more.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference import more
from bench.reference.tools import Setting, Step, attack, kl, kl_mean, look, on_labels, update

__all__ = ["STEPS", "Setting", "Step"]


def standard(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return update(s, F.cross_entropy(s.student(x), y))


def kd(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    student, target = s.student(x), look(s.teacher, x)
    soft = kl(student / 4.0, target / 4.0) / len(x)
    return update(s, 0.9 * 4.0**2 * soft + 0.1 * F.cross_entropy(student, y))


def pgd_at(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise)
    loss = F.cross_entropy(s.student(x_adv), y)
    look(s.student, x)  # the scripts log clean accuracy in train mode: it moves the running statistics
    return update(s, loss)


def trades(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    # the released code looks at the clean images again in each step of the attack
    x_adv = attack(s, lambda z: kl(s.student(z), s.student(x)), x, noise)
    natural = F.cross_entropy(s.student(x), y)
    robust = kl(s.student(x_adv), s.student(x)) / len(x)
    return update(s, natural + 6.0 * robust)


def mart(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise)
    logits, logits_adv = s.student(x), s.student(x_adv)
    adv = F.softmax(logits_adv, dim=1)
    top = torch.argsort(adv, dim=1)[:, -2:]
    rival = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
    boosted = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv + 1e-12), rival)
    natural = F.softmax(logits, dim=1)
    label = torch.gather(natural, 1, y.unsqueeze(1)).squeeze()
    gap = F.kl_div(torch.log(adv + 1e-12), natural, reduction="none").sum(dim=1)
    return update(s, boosted + 5.0 * (1.0 / len(x)) * torch.sum(gap * (1.0000001 - label)))


def ard(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise, training=True)
    adversarial, natural = s.student(x_adv), s.student(x)
    soft = kl_mean(adversarial / 30.0, look(s.teacher, x) / 30.0)
    return update(s, 1.0 * 30.0 * 30.0 * soft + 0.0 * F.cross_entropy(natural, y))


def iad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """IAD-I once introspection has begun, without the released code's second passes, which nothing but statistics see."""
    x_adv = on_labels(s, x, y, noise, training=True)
    adversarial, natural = s.student(x_adv), s.student(x)
    target, opinion = look(s.teacher, x), look(s.teacher, x_adv)
    trust = torch.pow(torch.gather(F.softmax(opinion, dim=1), 1, y.unsqueeze(1)).squeeze(), 0.1)
    own = ((1 - trust) * more.kl_live(adversarial, natural)).mean()
    return update(s, 1.0 * (kl(adversarial, target) / len(x) + own) + 0.0 * F.cross_entropy(natural, y))


def rslad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    target = look(s.teacher, x)
    x_adv = attack(s, lambda z: kl(s.student(z), target), x, noise)
    adversarial = kl_mean(s.student(x_adv), target)
    natural = kl_mean(s.student(x), target)
    return update(s, 5 / 6 * adversarial + 1 / 6 * natural)


def akd(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = on_labels(s, x, y, noise)
    mixture = 0.5 * F.softmax(look(s.teacher, x_adv), dim=1) + 0.5 * F.one_hot(y, 10)
    loss = -(mixture * F.log_softmax(s.student(x_adv), dim=1)).sum(dim=1).mean()
    look(s.student, x)
    return update(s, loss)


def adaad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: kl(s.student(z), s.teacher(z)), x, noise)
    natural = kl_mean(s.student(x), look(s.teacher, x))
    adversarial = kl_mean(s.student(x_adv), look(s.teacher, x_adv))
    return update(s, 1.0 * adversarial + 0.0 * natural)


def advfunmatch(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: kl(s.student(z), s.teacher(z)), x, noise)
    natural = kl(s.student(x), look(s.teacher, x)) / len(x)
    adversarial = kl(s.student(x_adv), look(s.teacher, x_adv)) / len(x)
    return update(s, 1.0 * adversarial + 0.0 * natural)


def dgad(s: Setting, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    x_adv = attack(s, lambda z: kl(s.student(z), s.teacher(z)), x, noise)
    clean_target, target = look(s.teacher, x), look(s.teacher, x_adv)
    wrong = clean_target.argmax(1) != y
    clean_target, target = exchange(clean_target, y), exchange(target, y)
    clean, adversarial = s.student(x), s.student(x_adv)
    standard = kl(clean[wrong], clean_target[wrong]) / len(x)
    robust = kl(adversarial[~wrong], target[~wrong]) / len(x)
    consistency = F.mse_loss(F.softmax(adversarial, dim=1), F.softmax(clean, dim=1))
    return update(s, standard + robust + 5.0 * consistency)


def exchange(logits: Tensor, y: Tensor) -> Tensor:
    """Label and largest logit change places; nothing happens where they are one."""
    swapped, row, top = logits.clone(), torch.arange(len(y), device=y.device), logits.argmax(1)
    swapped[row, y] = logits[row, top]
    swapped[row, top] = logits[row, y]
    return swapped


STEPS: dict[str, Step] = {
    "standard": standard,
    "kd": kd,
    "pgd-at": pgd_at,
    "trades": trades,
    "mart": mart,
    "ard": ard,
    "iad": iad,
    "rslad": rslad,
    "akd": akd,
    "adaad": adaad,
    "advfunmatch": advfunmatch,
    "dgad": dgad,
    "mtard": more.mtard,
    "b-mtard": more.b_mtard,
    "saad": more.saad,
}
