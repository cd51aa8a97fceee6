r"""Whether an adversarial image shows what the network says: judges' answers, and a committee.

A perturbation either leaves the image as it was, for anyone but the network, or changes what it
shows. A judge, a person of ``lab.annotate`` or the ``Committee`` of other classifiers here, names
the class of each image; the answers divide into *change* (the class that the attack reached), *no
change* (the original one) and *rest* (a third class, or none). The committee is a stand-in for
people and no more: it may be fooled by what fools the network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Int
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from adv.lab.data import Split

__all__ = ["UNKNOWN", "Committee", "Judgment", "Share", "assemble", "judge", "share", "table"]

UNKNOWN = -1  # the answer '?'
CHUNK = 500

Member = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Share:
    """A share of the answers and its Wilson interval, fractions of 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Judgment:
    """How the answers about one network's adversarial images divide; the shares add up to 1."""

    answers: int
    change: Share
    no_change: Share
    rest: Share


def share(count: int, total: int, *, level: float = 0.95) -> Share:
    """A share with Wilson's score interval, which stays inside [0, 1] and holds at 0 and 1 too.

    Args:
        count: answers of this kind.
        total: all answers, at least 1; they count as independent.
        level: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: ``count`` outside 0 to ``total``, nothing counted, ``level`` outside (0, 1).

    Source: Wilson (1927); chapter ``critic``.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} answers is no share")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    interval = binomtest(count, total).proportion_ci(level, "wilson")
    return Share(count / total, float(interval.low), float(interval.high))


def judge(
    answers: Int[Tensor, " N"],
    y: Int[Tensor, " N"],
    target: Int[Tensor, " N"],
    *,
    level: float = 0.95,
) -> Judgment:
    """Divide answers into change, no change and rest.

    Args:
        answers: (N,) classes that judges named, ``UNKNOWN`` for '?'.
        y: (N,) the classes of the images before the attack.
        target: (N,) the classes that the network takes the perturbed images for.
        level: coverage of the intervals.

    Raises:
        ValueError: not one of each for an image, no image, or an image whose two classes are equal,
            of which nothing could be said.

    Source: Matyasko (2020), section 4.4, Table 4.2; chapter ``critic``.
    """
    if not answers.shape == y.shape == target.shape or answers.ndim != 1:
        shapes = [tuple(t.shape) for t in (answers, y, target)]
        raise ValueError(f"answers, y and target are (N,) each, not {shapes}")
    if bool((y == target).any()):
        raise ValueError("an image was carried to its own class; leave out where the attack failed")
    changed, kept = int((answers == target).sum()), int((answers == y).sum())
    counts = changed, kept, len(answers) - changed - kept
    return Judgment(len(answers), *(share(c, len(answers), level=level) for c in counts))


def table(judgments: Mapping[str, Judgment]) -> pd.DataFrame:
    """Judgments as a table in percent, as the thesis prints them, with the intervals' ends.

    Args:
        judgments: by defense, or whatever names a row.

    Returns:
        Columns ``answers``, and for each of ``change``, ``no_change``, ``rest`` the share and its
        ``low`` and ``high``.
    """
    rows = {}
    for name, judgment in judgments.items():
        row: dict[str, float] = {"answers": judgment.answers}
        for kind in ("change", "no_change", "rest"):
            part: Share = getattr(judgment, kind)
            row |= {kind: 100 * part.value}
            row |= {f"{kind} low": 100 * part.low, f"{kind} high": 100 * part.high}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


# -------------------------------------------------------------------------------------- committee


@dataclass(frozen=True)
class Committee:
    """Classifiers that answer together: the class that more than half of them name, else '?'.

    Args:
        members: by name, each ``(B, ...) -> (B,)`` classes.

    Raises:
        ValueError: no members.
    """

    members: Mapping[str, Member]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a committee has at least one member")

    def votes(self, x: Tensor) -> dict[str, Int[Tensor, " N"]]:
        """What each member says of images (N, ...): (N,) classes on the CPU."""
        parts = x.split(CHUNK)
        return {
            name: torch.cat([member(part).cpu() for part in parts])
            for name, member in self.members.items()
        }

    def answers(self, x: Tensor) -> Int[Tensor, " N"]:
        """What more than half of the members say of images (N, ...), else ``UNKNOWN``."""
        votes = torch.stack(list(self.votes(x).values()))
        named, _ = votes.mode(dim=0)
        return torch.where(2 * (votes == named).sum(dim=0) > len(votes), named, UNKNOWN)

    def accuracy(self, test: Split) -> dict[str, float]:
        """Share of clean images that each member names right, and under ``"all"`` all together."""
        said = self.votes(test.x) | {"all": self.answers(test.x)}
        return {name: float((a == test.y.cpu()).double().mean()) for name, a in said.items()}


def assemble(
    train: Split,
    networks: Mapping[str, nn.Module] | None = None,
    *,
    neighbors: int = 5,
    penalty: float = 10.0,
    svm_samples: int = 10_000,
) -> Committee:
    r"""A committee of nearest neighbors, a support vector machine, and networks.

    To stand for judges, the networks must be none of those whose images are judged.

    Args:
        train: images for the first two members, in [0, 1].
        networks: ``(B, ...) -> (B, K)`` logits by name, in evaluation mode, such as a robust one.
        neighbors: that vote on a class, in l2.
        penalty: $C$ of the support vector machine (Gaussian kernel, width from the data).
        svm_samples: it learns from the first ones only, as its cost grows with their square.

    Raises:
        ValueError: a network in training mode, or no training images.

    Source: chapter ``critic``.
    """
    networks = networks or {}
    moving = [name for name, net in networks.items() if any(m.training for m in net.modules())]
    if moving:
        raise ValueError(f"{', '.join(moving)}: in training mode; call .eval()")
    x, y = train.x.flatten(1).cpu().numpy(), train.y.cpu().numpy()
    fitted = {
        "nearest neighbors": KNeighborsClassifier(neighbors).fit(x, y),
        "support vector machine": SVC(C=penalty).fit(x[:svm_samples], y[:svm_samples]),
    }
    members = {name: partial(_said, classifier) for name, classifier in fitted.items()}
    return Committee(members | {name: partial(_named, net) for name, net in networks.items()})


def _said(classifier: KNeighborsClassifier | SVC, x: Tensor) -> Tensor:
    return torch.from_numpy(classifier.predict(x.detach().flatten(1).cpu().numpy())).long()


@torch.no_grad()
def _named(network: nn.Module, x: Tensor) -> Tensor:
    place = next(iter(network.parameters()), x).device
    return network(x.clone().to(place)).argmax(dim=1)  # a layer may change it in place
