r"""Generative networks: the evidence lower bound, how tight it is, and the Wasserstein game.

``elbo`` is a loss for ``lab.training.fit``; ``evidence`` measures what it bounds. A WGAN is a game
of two networks and has a loop of its own, ``fit_wgan``. The networks are in ``lab.models``;
``VAEManifold`` is one of them as ``attacks.latent`` wants it.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from adv.attacks.common import check_count, check_number, generator
from adv.lab import checkpoints
from adv.lab.data import Split
from adv.lab.models import VAE, WGAN, VAEs
from adv.lab.training import DivergenceError, Loss, resting

__all__ = [
    "Game",
    "VAEManifold",
    "class_elbo",
    "divergence",
    "elbo",
    "evidence",
    "fit_wgan",
    "gradient_penalty",
    "samples",
    "with_manifold",
]


def divergence(
    mean: Float[Tensor, "B k"], log_variance: Float[Tensor, "B k"]
) -> Float[Tensor, " B"]:
    r"""Kullback-Leibler divergence of $\mathcal N(\mu,\mathrm{diag}\,\sigma^2)$ from the prior.

    $\frac12\sum_i(\mu_i^2+\sigma_i^2-1-\log\sigma_i^2)$, in nats, from $\mathcal N(0,I)$.

    Source: Kingma and Welling (2014), appendix B; chapter ``generative_models``.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def elbo(variance: float = 0.01, targets: Float[Tensor, "N C H W"] | None = None) -> Loss:
    r"""The negative evidence lower bound of a ``VAE``, as a loss for ``fit``, in nats an image.

    $$-\log p(x)\le\mathbb E_q\Big[\frac{\|x-G(z)\|^2}{2s^2}\Big]+\frac d2\log(2\pi s^2)
    +\mathrm{KL}\big(q(z\mid x)\,\|\,\mathcal N(0,I)\big),$$

    with one draw $z=\mu+\sigma\epsilon$ an image (the reparametrization), so that the gradient goes
    through $\mu$ and $\sigma$. Draws come from the global generator, which ``fit`` seeds.

    Args:
        variance: $s^2$ of a pixel given $z$, fixed; smaller ones make sharper images and longer
            codes. Without the constant and times $2s^2$, this is squared error $+\,2s^2$ KL.
        targets: what the images are to be decoded to instead of themselves; the "labels" that
            ``fit`` hands on are then indices into it. For models without classes.

    Returns:
        The loss ``(model, x, y) -> scalar``; a model with classes is told ``y``.

    Raises:
        ValueError: a variance that isn't positive.

    Source: Kingma and Welling (2014), (3) and (10); chapter ``generative_models``.
    """
    if not 0 < variance < math.inf:
        raise ValueError(f"variance must be positive and finite, not {variance}")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        vae = _vae(model)
        told = y if vae.classes else None
        wanted = x if targets is None else targets[y.to(targets.device)].to(x)
        mean, log_variance = vae.posterior(x, told)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        misfit = _misfit(vae.decode(z, told), wanted, variance)
        return (misfit + divergence(mean, log_variance)).mean()

    return loss


def class_elbo(variance: float = 0.01) -> Loss:
    r"""The loss of ``elbo`` for ``VAEs``: each image is seen by the model of its class alone.

    Args:
        variance: $s^2$ of a pixel given $z$; analysis by synthesis with $\beta$ uses decoders
            trained with $s^2=\beta/2$, which makes its losses $2s^2$ times these bounds.

    Returns:
        The loss ``(model, x, y) -> scalar``, a mean over the images; it raises a ``ValueError`` on
        a label without a model.

    Raises:
        ValueError: a variance that isn't positive.

    Source: Schott et al. (2019), section 3; chapter ``generative``.
    """
    one = elbo(variance)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(model, VAEs):
            raise TypeError(f"class_elbo trains VAEs, not a {type(model).__name__}")
        if not bool(((y >= 0) & (y < len(model.parts))).all()):
            raise ValueError(f"there are models of the classes 0 to {len(model.parts) - 1} alone")
        own = [y == c for c in range(len(model.parts))]
        sums = [
            one(part, x[mine], y[mine]) * mine.sum()
            for part, mine in zip(model.parts, own, strict=True)
            if mine.any()
        ]
        return torch.stack(sums).sum() / len(x)

    return loss


@torch.no_grad()
def evidence(
    vae: VAE,
    x: Float[Tensor, "B C H W"],
    y: Int[Tensor, " B"] | None = None,
    *,
    variance: float = 0.01,
    draws: int = 100,
    seed: int = 0,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    r"""The evidence lower bound of each image, and a tighter estimate of $\log p(x)$.

    Both from the same draws $z_k\sim q(z\mid x)$ with weights $w_k=p(x,z_k)/q(z_k\mid x)$: the mean
    of $\log w_k$, and $\log\frac1K\sum_kw_k$, which is a lower bound too in the mean, and tends to
    $\log p(x)$ with the number of draws.

    Args:
        vae: the model, in evaluation mode.
        x: (B, C, H, W) images, at least one.
        y: (B,) classes, for a model that is told them.
        variance: $s^2$ of a pixel given $z$, as in training; positive and finite.
        draws: $K$, at least 1.
        seed: of the draws.

    Returns:
        Bound and estimate, (B,) each, in nats; for every $K$ and every draw the first is at most
        the second.

    Raises:
        TypeError: ``draws`` is no integer.
        ValueError: no draws, no images or images of another shape, a variance that isn't positive
            and finite; a class missing, or given to a model that has none.

    Source: Burda, Grosse and Salakhutdinov (2016), (8); chapter ``generative_models``.
    """
    check_count("draws", draws)
    if not 0 < variance < math.inf:
        raise ValueError(f"variance must be positive and finite, not {variance}")
    if len(x) == 0:
        raise ValueError("there are no images")
    mean, log_variance = vae.posterior(x, y)
    noise = generator(seed)
    weights = []
    for _ in range(draws):
        unit = torch.randn(mean.shape, generator=noise, dtype=mean.dtype).to(mean.device)
        z = mean + (0.5 * log_variance).exp() * unit
        # log p(z) - log q(z|x): the normal densities' constants cancel.
        prior = 0.5 * (unit.square() + log_variance - z.square()).sum(dim=1)
        weights.append(prior - _misfit(vae.decode(z, y), x, variance))
    w = torch.stack(weights)
    return w.mean(dim=0), w.logsumexp(dim=0) - math.log(draws)


@torch.no_grad()
def samples(
    model: VAE | WGAN, count: int, *, label: int | None = None, seed: int = 0
) -> Float[Tensor, "count C H W"]:
    """Images that a model makes of latent vectors drawn from the prior.

    Args:
        model: a ``VAE`` or a ``WGAN``.
        count: how many, at least 1.
        label: their class, for a VAE that is told it; a WGAN ignores it.
        seed: of the latent vectors.

    Returns:
        (count, C, H, W) images in (0, 1).

    Raises:
        TypeError: ``count`` is no integer.
        ValueError: ``count`` is below 1; a label that is no class of the VAE, is missing, or is
            given to one without classes.
    """
    check_count("count", count)
    classes = 0 if isinstance(model, WGAN) else model.classes
    if classes and label is not None and not 0 <= label < classes:
        raise ValueError(f"label must be in 0..{classes - 1}, not {label}")
    place = next(model.parameters())
    z = torch.randn(count, model.latent, generator=generator(seed)).to(place)
    if isinstance(model, WGAN):
        return model.decode(z)
    return model.decode(z, None if label is None else torch.full_like(z[:, 0], label).long())


class VAEManifold(nn.Module):
    """A variational autoencoder as the manifold of ``attacks.latent``: posterior mean and decoder.

    Args:
        vae: the model; one with classes is told the label, another ignores it.

    Source: chapter ``manifold``.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, x: Float[Tensor, "B C H W"], y: Int[Tensor, " B"]) -> Float[Tensor, "B k"]:
        """The posterior's mean."""
        return self.vae.posterior(x, y if self.vae.classes else None)[0]

    def decode(self, z: Float[Tensor, "B k"], y: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        """Images in (0, 1)."""
        return self.vae.decode(z, y if self.vae.classes else None)


def with_manifold(settings: Any, find: Callable[[str], nn.Module]) -> Any:
    """Settings, nested as they are, in which each VAE named as a ``manifold`` has become one.

    Args:
        settings: mappings and lists, such as those of a loss that names its attacks.
        find: from a name to the model.

    Raises:
        ValueError: the model is no ``VAE``.
    """
    if isinstance(settings, list):
        return [with_manifold(part, find) for part in settings]
    if not isinstance(settings, Mapping):
        return settings
    result = {}
    for key, value in settings.items():
        if key == "manifold":
            if not isinstance(vae := find(value), VAE):
                raise ValueError(f"a manifold is a VAE, not {value!r}")
            result[key] = VAEManifold(vae).eval()
        else:
            result[key] = with_manifold(value, find)
    return result


# ----------------------------------------------------------------------------- the Wasserstein game


@dataclass
class Game:
    """What happened in each epoch of a WGAN's training.

    Args:
        distance: mean of the critic's opinion of real images less that of made ones: its estimate
            of the Wasserstein distance, from below, where its slope is at most 1.
        penalty: mean gradient penalty, without its weight.
        seconds: wall-clock time.
    """

    distance: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Float[Tensor, "B C H W"],
    made: Float[Tensor, "B C H W"],
    share: Float[Tensor, " B"],
) -> Float[Tensor, ""]:
    r"""$\mathbb E(\|\nabla D(\hat x)\|_2-1)^2$ at $\hat x=ux+(1-u)G(z)$, the norm over all pixels.

    Args:
        critic: images to (B,) opinions.
        real: images of the data.
        made: images of the generator, without gradient.
        share: $u$ in [0, 1] of each pair.

    Returns:
        A scalar that can be differentiated with respect to the critic's weights.

    Source: Gulrajani et al. (2017), (3).
    """
    u = share.reshape(-1, *[1] * (real.ndim - 1))
    between = (u * real + (1 - u) * made).requires_grad_()
    opinion = critic(between.clone())  # which a layer may change in place
    (slope,) = torch.autograd.grad(opinion.sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def fit_wgan(
    model: WGAN,
    train: Split,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-4,
    critic_steps: int = 5,
    weight: float = 10.0,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Game:
    r"""Train generator and critic against each other, and leave both in evaluation mode.

    The critic maximizes $\mathbb E D(x)-\mathbb E D(G(z))$ less ``weight`` times the gradient
    penalty at every batch; after every ``critic_steps`` batches the generator takes one step to
    raise $\mathbb E D(G(z))$. Both use Adam with momenta (0.5, 0.9), their rate falling linearly to
    0. Order and latent vectors are drawn on the CPU, by generators of their own.

    Args:
        model: trained in place on the device of its parameters.
        train: the images; labels are not used.
        epochs: passes through the images, at least 1.
        batch_size: images a step.
        lr: learning rate of both at the start.
        critic_steps: steps of the critic for each of the generator.
        weight: of the gradient penalty.
        seed: of the order and the latent vectors. The initial weights are the caller's.
        checkpoint: file written after each epoch, and resumed from where it exists; a training that
            was killed ends with the same weights as one that was not. It is kept.
        progress: show a bar on stderr.

    Returns:
        The critic's estimate of the distance, and the penalty, for each epoch.

    Raises:
        TypeError, ValueError: counts below 1, negative rates or weights, an empty set, a checkpoint
            that is damaged or another run's.
        DivergenceError: where a loss is not finite.

    Source: Gulrajani et al. (2017), algorithm 1; chapter ``generative_models``.
    """
    for name, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("critic_steps", critic_steps),
    ):
        check_count(name, value)
    check_number("lr", lr)
    check_number("weight", weight)
    if len(train) == 0:
        raise ValueError("the training set is empty")
    epochs, batch_size, critic_steps = int(epochs), int(batch_size), int(critic_steps)
    lr, weight = float(lr), float(weight)
    place = next(model.parameters()).device
    train, game, count = train.to(place), Game(), 0
    run: dict[str, Any] = {}
    players = {
        part: torch.optim.Adam(getattr(model, part).parameters(), lr=lr, betas=(0.5, 0.9))
        for part in ("critic", "generator")
    }
    hide: dict[str, bool] = {} if progress else {"disable": True}
    if checkpoint is not None:
        run = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "critic_steps": critic_steps}
        run |= {"weight": weight, "seed": seed}
        run |= {"model": checkpoints.described(model), "data": checkpoints.checksums(train.x)}
        if (state := checkpoints.load(checkpoint, run)) is not None:
            model.load_state_dict(state["model"])
            for name, player in players.items():
                player.load_state_dict(state[name])
            game, count = Game(**state["game"]), state["count"]
    with (
        resting([model], players.values()),
        tqdm(total=epochs, initial=len(game.distance), **hide) as bar,
    ):
        model.train()
        for epoch in range(len(game.distance), epochs):
            start = time.perf_counter()
            for player in players.values():
                player.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
            draws = generator(seed, epoch)
            order = torch.randperm(len(train), generator=draws).to(place)
            told = []
            for index in order.split(batch_size):
                told.append(_criticize(model, train.x[index], players["critic"], weight, draws))
                count += 1
                if count % critic_steps == 0:
                    _generate(model, len(index), players["generator"], draws)
            distance, penalty = torch.stack(told).mean(dim=0).tolist()
            if not math.isfinite(distance + penalty):
                raise DivergenceError(f"the game diverged: distance {distance}, penalty {penalty}")
            game.distance.append(distance)
            game.penalty.append(penalty)
            game.seconds.append(time.perf_counter() - start)
            if checkpoint is not None:
                state = {"model": model.state_dict(), "game": asdict(game), "count": count}
                state |= {name: player.state_dict() for name, player in players.items()}
                checkpoints.save(checkpoint, run, state)
            bar.update()
    return game


def _criticize(
    model: WGAN,
    x: Tensor,
    player: torch.optim.Optimizer,
    weight: float,
    draws: torch.Generator,
) -> Tensor:
    """One step of the critic; distance and penalty."""
    with torch.no_grad():
        made = model.decode(_latent(model, len(x), draws))
    distance = model.judge(x).mean() - model.judge(made).mean()
    share = torch.rand(len(x), generator=draws).to(x)
    penalty = gradient_penalty(model.judge, x, made, share)
    player.zero_grad(set_to_none=True)
    (weight * penalty - distance).backward()
    player.step()
    return torch.stack([distance.detach(), penalty.detach()])


def _generate(
    model: WGAN, count: int, player: torch.optim.Optimizer, draws: torch.Generator
) -> None:
    """One step of the generator."""
    player.zero_grad(set_to_none=True)
    (-model.judge(model.decode(_latent(model, count, draws))).mean()).backward()
    player.step()


def _latent(model: WGAN, count: int, draws: torch.Generator) -> Tensor:
    return torch.randn(count, model.latent, generator=draws).to(next(model.parameters()))


def _misfit(made: Tensor, x: Tensor, variance: float) -> Float[Tensor, " B"]:
    r"""$-\log p(x\mid z)$ in nats."""
    square = (made - x).flatten(1).square().sum(dim=1)
    return 0.5 * (square / variance + math.prod(x.shape[1:]) * math.log(2 * math.pi * variance))


def _vae(model: nn.Module) -> VAE:
    if not isinstance(model, VAE):
        raise TypeError(f"elbo trains a VAE, not a {type(model).__name__}")
    return model
