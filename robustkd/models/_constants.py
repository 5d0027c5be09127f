"""Normalisation constants that a file brings along: compared with those of the network, never loaded silently.

RobustBench's Rice2020Overfitting and Pang2020Boosting keep them as `mu` and `sigma`, older copies of DeepMind's
networks as `mean` and `std`; most files of either hold none (methods.md, section 8.2). Here they belong to the
network's description, so a file that holds others is refused.
"""

from __future__ import annotations

from torch import Tensor, nn

from robustkd.errors import ArtifactError
from robustkd.models._base import Normalized, bare

PAIRS = (("mu", "sigma"), ("mean", "std"))
#: sources round the same statistics of a data set to three or four digits
TOLERANCE = 1e-3


def without_constants(net: nn.Module, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state without its mean and deviation, where they are those of the network.

    Args:
        net: the network, with its normalisation in front where it has one.
        state: tensors of a file under the keys of the bare network.
        where: the file, for the message.

    Raises:
        ArtifactError: the file normalises with other constants than the network, or the network not at all.
    """
    own = bare(net).state_dict().keys()
    for pair in PAIRS:
        if not all(key in state and key not in own for key in pair):
            continue
        held = [state[key].flatten().tolist() for key in pair]
        wanted = _constants(net, len(held[0]))
        if any(_differ(has, want) for has, want in zip(held, wanted, strict=True)):
            mean, std = (_listed(values) for values in held)
            raise ArtifactError(
                f"the file normalises with other constants than the network: {_listed(wanted[0])} and {_listed(wanted[1])}",
                where=where,
                fix=f"add to its model normalize: {{mean: {mean}, std: {std}}}",
            )
        state = {key: value for key, value in state.items() if key not in pair}
    return state


def _constants(net: nn.Module, channels: int) -> list[list[float]]:
    if not isinstance(net, Normalized):
        return [[0.0] * channels, [1.0] * channels]
    return [net.normalize.mean.flatten().tolist(), net.normalize.std.flatten().tolist()]


def _differ(has: list[float], want: list[float]) -> bool:
    return len(has) != len(want) or any(not abs(a - b) <= TOLERANCE for a, b in zip(has, want, strict=True))


def _listed(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
