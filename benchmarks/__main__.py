"""Speed, and strength against cost: ``make bench``.

``python -m benchmarks speed``, ``strength``, ``radius`` (at one radius) or ``overhead`` (time
between passes) does one of them. Each row of speed times two ways to do the same thing in one run
and prints their ratio, because times alone wander with the machine. The others are shown as they
are stored; ``--store`` runs what is missing or of older code, which takes hours, and rewrites files
in ``reproduce/results/benchmark``.
Nothing here is asserted: tests of speed are not tests of truth.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from adv import geometry
from adv.attacks import boundary, gradient
from adv.attacks.common import class_gradients
from adv.defenses import margin
from adv.lab import data, device, models, zoo
from adv.lab.training import cross_entropy, mixed
from reproduce.options import friendly, listed, refuse_unknown

Work = Callable[[], object]
Row = tuple[str, str, Work, str, Work]


def median(work: Work) -> float:
    """Median seconds of a call, over about one second of calls."""
    return float(Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=1).median)


def one_class_at_a_time(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian by one backward pass for each class."""
    z = x.clone().requires_grad_()
    logits = model(z)
    rows = [torch.autograd.grad(c.sum(), z, retain_graph=True)[0] for c in logits.unbind(1)]
    return torch.stack(rows, dim=1)


def margin_by_loop(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``margin_loss(0.1)`` with the gradients of all classes recorded, one after the other."""
    z = x.clone().requires_grad_()
    logits = net(z)
    rows = [torch.autograd.grad(c.sum(), z, create_graph=True)[0] for c in logits.unbind(1)]
    jacobian = torch.stack(rows).flatten(2)
    size = (jacobian - jacobian[y, torch.arange(len(y), device=y.device)]).norm(dim=2).amax(dim=0)
    return margin.hinge(lambda _: logits, z, y) + 0.1 * size.mean()


def slopes(loss: Callable[..., Tensor], net: nn.Module, x: Tensor, y: Tensor) -> object:
    """What a step of training calculates."""
    return torch.autograd.grad(loss(net, x, y), list(net.parameters()), allow_unused=True)


def by_bisection(u: Tensor, eps: float, box: geometry.Box, rounds: int = 60) -> Tensor:
    """The l1 projection inside a box by bisection on its multiplier."""
    low, high = torch.zeros(len(u), 1, device=u.device), u.abs().amax(dim=1, keepdim=True)
    for _ in range(rounds):
        mu = (low + high) / 2
        z = (u.sign() * (u.abs() - mu).clamp_min(0)).clamp(*box)
        long = z.abs().sum(dim=1, keepdim=True) > eps
        low, high = torch.where(long, mu, low), torch.where(long, high, mu)
    return z


def rows(place: torch.device) -> Iterator[Row]:
    """The comparisons: what, one way, its work, another way, its work."""
    torch.manual_seed(0)
    for part in (projections, gradients, precisions, attacks):
        yield from part(place)


def projections(place: torch.device) -> Iterator[Row]:
    """The exact projection onto ball and box against bisection."""
    for d in (64, 784, 3072):
        x, u = torch.rand(256, d, device=place), torch.randn(256, d, device=place)
        box = geometry.room(x)
        yield (
            f"l1 ball and box, 256 x {d}",
            "exact",
            partial(geometry.project, u, "l1", 2.0, box=box),
            "60 bisections",
            partial(by_bisection, u, 2.0, box),
        )


def gradients(place: torch.device) -> Iterator[Row]:
    """Gradients of all classes at once against one after the other."""
    nets = {
        "digits/cnn, 200 digits": (zoo.load("digits/cnn", device=place), (200, 1, 8, 8)),
        "MLP 784-1000-1000-1000-10, 100": (
            models.build("mlp", sizes=(784, 1000, 1000, 1000, 10), seed=0).eval().to(place),
            (100, 1, 28, 28),
        ),
    }
    ways: dict[str, Callable[..., Tensor]] = {
        "all classes in a loop": margin_by_loop,
        "plain hinge": margin.hinge,
    }
    for name, (net, shape) in nets.items():
        z = torch.rand(shape, device=place)
        yield (
            f"Jacobian, {name}",
            "batched",
            partial(class_gradients, net, z),
            "a loop over classes",
            partial(one_class_at_a_time, net, z),
        )
        labels = torch.arange(len(z), device=place) % 10
        for other, loss in ways.items():
            yield (
                f"margin loss, {name}",
                "one row recorded",
                partial(slopes, margin.margin_loss(0.1), net, z, labels),
                other,
                partial(slopes, loss, net, z, labels),
            )


def precisions(place: torch.device) -> Iterator[Row]:
    """Mixed precision against float32."""
    losses = {"cross-entropy": cross_entropy, "margin loss": margin.margin_loss(0.1)}
    for name, shape in (("lenet5-wide", (100, 1, 28, 28)), ("nin", (32, 3, 32, 32))):
        net, z = models.build(name, seed=0).to(place), torch.rand(shape, device=place)
        labels = torch.arange(len(z), device=place) % 10
        for what, loss in losses.items():
            yield (
                f"{what}, {name}, {len(z)}",
                "mixed precision",
                partial(slopes, mixed(loss), net, z, labels),
                "float32",
                partial(slopes, loss, net, z, labels),
            )


def attacks(place: torch.device) -> Iterator[Row]:
    """Attacks of few steps against PGD."""
    net, digits = zoo.load("digits/cnn", device=place), data.load("digits").test
    x, y = digits.x[:200].to(place), digits.y[:200].to(place)
    yield (
        "200 digits, linf, eps 0.1",
        "FGSM",
        partial(gradient.fgsm, net, x, y, eps=0.1),
        "PGD of 10 steps",
        partial(gradient.pgd, net, x, y, eps=0.1, steps=10),
    )
    yield (
        "200 digits, l2",
        "DeepFool",
        partial(boundary.deepfool, net, x, y, steps=50),
        "PGD of 50 steps",
        partial(gradient.pgd, net, x, y, norm="l2", eps=0.5, steps=50),
    )


def speed() -> None:
    """Print one line for each comparison."""
    place = device()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {place}, {threads} threads, {platform.machine()}")
    for what, one, first, other, second in rows(place):
        a, b = median(first), median(second)
        print(f"{what:<42} {one} {a * 1e3:8.2f} ms, {other} {b * 1e3:8.2f} ms: x{b / a:.2f}")


def contests(given: argparse.Namespace) -> None:
    """Print the tables; to ``store`` them, run the attacks that are not stored yet before that."""
    from benchmarks import strength
    from reproduce import optima
    from reproduce.files import read

    networks = {network.name: network for network in strength.networks()}
    refuse_unknown(listed(given.only), networks, "network")
    chosen: dict[str, Any] = {"norms": listed(given.norms)}
    chosen["budgets"] = tuple(map(int, listed(given.budgets)))
    chosen = {name: value for name, value in chosen.items() if value}
    for network in map(networks.__getitem__, listed(given.only) or networks):
        content = (
            strength.contest(network, trust=given.trust, **chosen)
            if given.store
            else read(strength.path(network.name))
        )
        if content is None:
            print(f"\n{network.name}: nothing stored yet; --store runs it")
            continue
        known = read(optima.path(network.name))
        if known is not None and known["weights"] != content["weights"]:
            known = None
        print(f"\n{network.name}, {len(content['images'])} images of {content['data']}")
        print(strength.table(content, known).to_string(float_format=lambda v: f"{v:.4g}"))


def at_one_radius(*, store: bool) -> None:
    """Print the table; to ``store`` it, run the attacks that are not stored yet before that."""
    from benchmarks import radius
    from reproduce.files import read

    content = radius.contest() if store else read(radius.path())
    if content is None:
        print("\nat one radius: nothing stored yet; --store runs it")
        return
    print(f"\n{content['network']}, {content['norm']}, radius {content['eps']}, images left")
    print(radius.table(content).to_string(na_rep="", float_format=lambda v: f"{v:.0f}"))


def between_passes(*, store: bool) -> None:
    """Print the table; to ``store`` it, run the attacks that are not stored yet before that."""
    from benchmarks import overhead
    from reproduce.files import read

    network = overhead.network()
    content = overhead.contest(network) if store else read(overhead.path(network.name))
    if content is None:
        print("\ntime between passes: nothing stored yet; --store runs it")
        return
    print(
        f"\n{content['network']}, {len(content['images'])} images, {content['steps']} passes: time"
    )
    print(
        "over that of the same passes alone (cost), and of these over passes at the images (points)"
    )
    print(overhead.table(content).to_string(float_format=lambda v: f"{v:.2f}"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "part", nargs="?", choices=("speed", "strength", "radius", "overhead"), help="default: all"
    )
    parser.add_argument("--only", default="", help="networks, separated by commas")
    parser.add_argument("--norms", default="", help="separated by commas")
    parser.add_argument("--budgets", default="", help="passes, separated by commas")
    parser.add_argument("--store", action="store_true", help="run the attacks, store the rows")
    parser.add_argument("--trust", action="store_true", help="keep rows of older code")
    given = parser.parse_args()
    if not given.store and (given.norms or given.budgets or given.trust):
        parser.error("--norms, --budgets and --trust say what to run: give --store as well")
    chosen = any((given.only, given.norms, given.budgets, given.trust))
    if given.part == "speed" and (given.store or chosen):
        parser.error("of the comparisons of speed nothing can be chosen or stored")
    if given.part in ("radius", "overhead") and chosen:
        parser.error(f"of {given.part} nothing can be chosen but --store")
    with friendly("benchmarks"):
        if given.part in (None, "speed"):
            speed()
        if given.part in (None, "strength"):
            contests(given)
        if given.part == "radius" or (given.part is None and not chosen):
            at_one_radius(store=given.store)
        if given.part == "overhead" or (given.part is None and not chosen):
            between_passes(store=given.store)


if __name__ == "__main__":
    main()
