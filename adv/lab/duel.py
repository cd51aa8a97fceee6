"""The game of classifier and adversary critic: alternating training, watched and resumable."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from adv.attacks.common import check_count, check_number, eval_mode, generator
from adv.attacks.confidence import nearest_class, unrolled
from adv.defenses.critic import (
    Critic,
    RunningConfidence,
    critic_loss,
    cycle_loss,
    fooling_loss,
    slope_penalty,
)
from adv.lab import checkpoints
from adv.lab.data import Split
from adv.lab.training import DivergenceError, resting

__all__ = ["Duel", "fit_critic", "new_critic"]

LOOK_BACK = 3
"""Epochs over which ``Duel.verdict`` averages."""


@dataclass
class Duel:
    """What happened in each epoch: means over its batches, before each batch's steps.

    Args:
        loss: the classifier's cross-entropy on clean images, in nats.
        accuracy: its share of clean training images classified right.
        fooling: its price for adversarial images that look unreal, in nats.
        cycle: squared distance between images and their way there and back.
        confidence: its mean confidence on clean images.
        success: share of the attacked images whose prediction changed.
        length: mean l2 length of the attack.
        critic: the critic's loss in nats, without penalty; ``2 log 2`` is ignorance.
        penalty: its slope penalty at real images plus that at adversarial ones, without weight.
        real: share of the real images that it takes for real.
        made: share of the adversarial images that it takes for made.
        seconds: wall-clock time.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    fooling: list[float] = field(default_factory=list)
    cycle: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    success: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    critic: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    real: list[float] = field(default_factory=list)
    made: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``"in balance"``, or how the game has collapsed, from the means of the last epochs."""
        if not self.loss:
            return "not started"
        last = {f.name: _tail(getattr(self, f.name)) for f in fields(self)}
        if last["accuracy"] < 0.5:
            return "collapsed: the classifier has lost its classes"
        if last["success"] < 0.1:
            return "collapsed: the attack no longer changes predictions (masked gradients)"
        if min(last["real"], last["made"]) > 0.97:
            return "collapsed: the critic tells everything apart"
        if max(last["real"], last["made"]) > 0.9 and min(last["real"], last["made"]) < 0.1:
            return "collapsed: the critic says the same of all images"
        if last["length"] < 0.7 * self.length[0]:
            return "collapsed: the attack needs less and less (is a sign wrong?)"
        return "in balance"


def new_critic(seed: int = 0, **settings: Any) -> Critic:
    """A ``Critic`` with seeded weights; the global random state is left as it was.

    Args:
        seed: of the initial weights.
        settings: of ``Critic``, such as ``sizes=(64, 200, 200, 10)``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Critic(**settings)


def fit_critic(
    model: nn.Module,
    critic: nn.Module,
    train: Split,
    *,
    epochs: int,
    batch_size: int = 100,
    lr: float = 5e-4,
    critic_lr: float = 1e-3,
    weight: float = 0.5,
    cycle: float = 0.01,
    penalty: float = 10.0,
    steps: int = 5,
    overshoot: float = 0.05,
    pretrain: int = 1,
    halve_every: int = 40,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    observe: Callable[[int, Duel], None] | None = None,
    progress: bool = True,
) -> Duel:
    r"""Train a classifier against an adversary critic, and leave both in evaluation mode.

    For each batch, every image is attacked with ``unrolled`` from the class that the model gives
    it to the nearest other one $t$, up to the running confidence of $t$. Then the critic takes one
    step on ``critic_loss`` plus ``penalty`` times the slope penalties at real and at adversarial
    images, and the classifier one step on

    $$\mathrm{CE}(f(x),y)+\lambda\,\mathbb E[-\log D_{t'}(x_{adv})]
    +\lambda_{rec}\,\mathbb E\|\mathcal A(x_{adv})-x\|_2^2,$$

    the last two means over images whose prediction changed, to $t'$. Both use Adam with momenta
    (0.5, 0.999). The randomness of an epoch is a function of ``(seed, epoch)``.

    Args:
        model: the classifier, trained in place on the device of its parameters.
        critic: ``(B, ...) -> (B, K)`` logits, trained in place; its noise is always on.
        train: the training set.
        epochs: passes through the training set, at least 1, those of ``pretrain`` not counted.
        batch_size: images a step.
        lr: learning rate of the classifier.
        critic_lr: learning rate of the critic.
        weight: $\lambda$; 0 trains without the critic's opinion, and a negative number with the
            sign that the thesis prints (errata 15).
        cycle: $\lambda_{rec}\ge0$; with 0 the way back is not calculated.
        penalty: $\lambda_{grad}\ge0$.
        steps: of the attack.
        overshoot: of the attack.
        pretrain: epochs of cross-entropy alone, before the game.
        halve_every: epochs after which both learning rates are halved, again and again.
        seed: of the order and the critic's noise. The initial weights are the caller's.
        checkpoint: file written after each epoch, and resumed from where it exists. It is kept.
            Both networks are recognized by their layers and the shapes of their tensors.
        observe: called after each epoch with its number and the history so far.
        progress: show a bar on stderr.

    Returns:
        The history; its ``verdict`` says whether the game has collapsed.

    Raises:
        TypeError, ValueError: counts below 1, an empty set, negative weights where they have no
            meaning, a checkpoint that is damaged or another run's.
        DivergenceError: where a loss is not finite.

    Source: Matyasko (2020), (4.2)-(4.5) and section 4.4, as corrected by errata 14 and 15; chapter
    ``critic``.
    """
    for name, count in (("epochs", epochs), ("batch_size", batch_size), ("steps", steps)):
        check_count(name, count)
    check_count("halve_every", halve_every)
    if pretrain != 0:
        check_count("pretrain", pretrain)
    numbers = {"lr": lr, "critic_lr": critic_lr, "cycle": cycle, "penalty": penalty}
    for name, value in numbers.items():
        check_number(name, value)
    if len(train) == 0:
        raise ValueError("the training set is empty")
    epochs, batch_size, pretrain = int(epochs), int(batch_size), int(pretrain)
    place = next(model.parameters()).device
    train = train.to(place)
    with torch.no_grad(), eval_mode(model):
        classes = model(train.x[:1].clone()).shape[1]  # which a layer may change in place
    game = _Game(
        model,
        critic.to(place),
        RunningConfidence(classes).to(place),
        {"weight": float(weight), "cycle": float(cycle), "penalty": float(penalty)},
        {"steps": int(steps), "overshoot": float(overshoot)},
        {"model": float(lr), "critic": float(critic_lr)},
    )
    history = Duel()
    run: dict[str, Any] = {}
    if checkpoint is not None:
        run = {"epochs": epochs, "batch_size": batch_size, "pretrain": pretrain, "seed": seed}
        run |= game.weights | game.attack | game.told()
        run |= {"halve_every": int(halve_every)}
        run |= {"data": checkpoints.checksums(train.x, train.y)}
        if (state := checkpoints.load(checkpoint, run)) is not None:
            history = game.resume(state)
    hide: dict[str, bool] = {} if progress else {"disable": True}
    done = len(history.loss)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),  # manual_seed seeds all
        resting([model, critic], game.players.values()),
        tqdm(total=epochs, initial=done, **hide) as bar,
    ):
        for epoch in range(-pretrain if done == 0 else done, epochs):
            start = time.perf_counter()
            draws = generator(seed, epoch + pretrain)
            order = torch.randperm(len(train), generator=draws).to(place)
            torch.manual_seed(draws.initial_seed())
            game.slow(0.5 ** (max(epoch, 0) // halve_every))
            batches = [train[index] for index in order.split(batch_size)]
            if epoch < 0:
                game.pretrain(batches)
                continue
            told = game.epoch(batches)
            for name, number in told.items():
                getattr(history, name).append(number)
            history.seconds.append(time.perf_counter() - start)
            if observe is not None:
                observe(epoch, history)
            if checkpoint is not None:
                checkpoints.save(checkpoint, run, game.state(history))
            bar.set_postfix_str(history.verdict)
            bar.update()
    return history


def _tail(values: list[float]) -> float:
    some = values[-LOOK_BACK:]
    return sum(some) / len(some)


class _Game:
    """Both players, their optimizers, and what a batch does."""

    def __init__(
        self,
        model: nn.Module,
        critic: nn.Module,
        confidence: RunningConfidence,
        weights: dict[str, float],
        attack: dict[str, Any],
        rates: dict[str, float],
    ) -> None:
        self.model, self.critic, self.confidence = model, critic, confidence
        self.weights, self.attack, self.rates = weights, attack, rates
        self.players = {
            name: torch.optim.Adam(
                [p for p in part.parameters() if p.requires_grad],
                lr=rates[name],
                betas=(0.5, 0.999),
            )
            for name, part in (("model", model), ("critic", critic))
        }

    def slow(self, factor: float) -> None:
        for name, player in self.players.items():
            player.param_groups[0]["lr"] = self.rates[name] * factor

    def pretrain(self, batches: list[Split]) -> None:
        self.model.train()
        for batch in batches:
            self._step("model", functional.cross_entropy(self.model(batch.x), batch.y))

    def epoch(self, batches: list[Split]) -> dict[str, float]:
        """One pass; means over the images."""
        self.model.train()
        self.critic.train()
        total: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self._batch(batch.x, batch.y).items():
                total[name] = total.get(name, 0) + value.detach() * len(batch)
        count = sum(map(len, batches))
        means = dict(zip(total, (torch.stack([*total.values()]) / count).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            raise DivergenceError(f"the game diverged: {means}; lower the learning rates")
        return means

    def _batch(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), eval_mode(self.model):
            clean = self.model(x.clone())  # which a layer may change in place
        if not bool(clean.isfinite().all()):
            raise DivergenceError("the classifier's logits diverged; lower the learning rates")
        said, sure = clean.argmax(dim=1), self.confidence(clean)
        target = nearest_class(self.model, x, said)
        x_adv = unrolled(self.model, x, target, confidence=sure[target], **self.attack)
        with torch.no_grad(), eval_mode(self.model):
            taken = self.model(x_adv.clone()).argmax(dim=1)
        changed = taken != said
        told = self._criticize(x, y, x_adv.detach(), taken)

        logits = self.model(x.clone())
        told["loss"] = functional.cross_entropy(logits, y)
        told["fooling"] = fooling_loss(self.critic, x_adv, taken, changed)
        told["cycle"] = torch.zeros_like(told["loss"])
        if self.weights["cycle"]:
            told["cycle"] = cycle_loss(
                self.model,
                x,
                said,
                x_adv,
                confidence=clean.softmax(dim=1).amax(dim=1),
                counts=changed,
                **self.attack,
            )
        price = self.weights["weight"] * told["fooling"] + self.weights["cycle"] * told["cycle"]
        self._step("model", told["loss"] + price)
        return told | {
            "accuracy": (said == y).float().mean(),
            "confidence": clean.softmax(dim=1).amax(dim=1).mean(),
            "success": changed.float().mean(),
            "length": (x_adv.detach() - x).flatten(1).norm(dim=1).mean(),
        }

    def _criticize(self, x: Tensor, y: Tensor, x_adv: Tensor, taken: Tensor) -> dict[str, Tensor]:
        """One step of the critic; its fakes are all attacked images, changed or not."""
        loss = critic_loss(self.critic, x, y, x_adv, taken)
        slope = slope_penalty(self.critic, x, y) + slope_penalty(self.critic, x_adv, taken)
        with torch.no_grad(), eval_mode(self.critic):
            real = self.critic(x.clone()).gather(1, y[:, None]) > 0
            made = self.critic(x_adv.clone()).gather(1, taken[:, None]) < 0
        self._step("critic", loss + self.weights["penalty"] * slope)
        shares = {"real": real.float().mean(), "made": made.float().mean()}
        return {"critic": loss, "penalty": slope} | shares

    def _step(self, name: str, loss: Tensor) -> None:
        """Only the player's own parameters move, whoever else the loss leads to."""
        player = self.players[name]
        parameters = player.param_groups[0]["params"]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
        player.step()

    def told(self) -> dict[str, Any]:
        """Of the players, what a checkpoint's settings say."""
        rates = {"lr": self.rates["model"], "critic_lr": self.rates["critic"]}
        parts = {"model": self.model, "critic": self.critic}
        return rates | {name: checkpoints.described(part) for name, part in parts.items()}

    def state(self, history: Duel) -> dict[str, Any]:
        """All that an epoch leaves for the next."""
        state: dict[str, Any] = {name: p.state_dict() for name, p in self.players.items()}
        state |= {"weights": [part.state_dict() for part in self._parts()]}
        return state | {"history": asdict(history)}

    def resume(self, state: dict[str, Any]) -> Duel:
        """Go on where ``state`` was taken."""
        for part, weights in zip(self._parts(), state["weights"], strict=True):
            part.load_state_dict(weights)
        for name, player in self.players.items():
            player.load_state_dict(state[name])
        return Duel(**state["history"])

    def _parts(self) -> tuple[nn.Module, ...]:
        return self.model, self.critic, self.confidence
