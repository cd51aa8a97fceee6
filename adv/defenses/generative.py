r"""Classifiers that ask a generative model first: DefenseGAN and analysis by synthesis.

Both solve an inner problem, $z^*(x)=\arg\min_zl(z;x)$, and decide by its solution. Each offers the
parts of that as functions, for attacks that differentiate through it (``adv.attacks.adaptive``):

| | ``DefenseGAN`` | ``AnalysisBySynthesis`` |
|---|---|---|
| codes $z$ | (B, k) | (B, K, k), one for each class |
| solver, without a graph | ``project(x)`` | ``infer(x)`` |
| ``inner(z, x)``, (B,) | $\Vert G(z)-x\Vert^2$ | $\sum_c\ell_c(z_c;x)$ |
| ``logits(z, x)``, (B, K) | $f(G(z))$ | $-\ell_c(z_c;x)$ |
| gradient of ``forward`` | none: it vanishes | exact where the solver converged |

All draws of a call come from ``seed`` and are the same for every image, so that an image's logits
do not depend on the batch it is in.
"""

import copy
import math
from collections.abc import Sequence
from typing import Protocol, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from adv.attacks.common import (
    check_count,
    check_number,
    check_whole,
    eval_mode,
    input_gradient,
)
from adv.attacks.common import generator as random

__all__ = ["AnalysisBySynthesis", "Decoder", "DefenseGAN"]

DECAY, DECAY_FROM = 0.1, 0.8
"""DefenseGAN's rate falls to a tenth after this share of its steps."""

ADAM = (0.9, 0.999, 1e-8)
KEPT = 0.9
"""Of the prior's draws, analysis by synthesis keeps this share: those of highest density."""
CHUNK = 500


class Decoder(Protocol):
    """A generative network: a ``VAE`` or ``WGAN`` of ``lab.models``, for instance.

    Its samples must not interact in evaluation mode.
    """

    latent: int

    def decode(self, z: Float[Tensor, "B k"]) -> Float[Tensor, "B ..."]:
        """Inputs of codes, differentiable in ``z``."""


class DefenseGAN(nn.Module):
    r"""Replace an input by the nearest one that a generator can make, then classify that.

    $$z^*(x)=\arg\min_z\|G(z)-x\|_2^2,\qquad f_{\mathrm{def}}(x)=f\big(G(z^*(x))\big).$$

    From each of R starts $z\sim\mathcal N(0,\sigma_0^2I)$ go L steps of gradient descent with
    momentum, $v\leftarrow\mu v-\eta\nabla_zl$, $z\leftarrow z+v$, the last fifth of them at a tenth
    of the rate; the start that ends nearest to the image is kept. All starts of all images are one
    batch: memory grows with R times B, time with L.

    The logits carry no gradient to $x$. An attack that climbs them finds zero everywhere, which
    says nothing about robustness.

    Args:
        generator: has ``latent`` and ``decode``; put into evaluation mode, as is the classifier.
        classifier: images to (B, K) logits.
        restarts: R.
        steps: L; 0 keeps the nearest of the starts.
        lr: $\eta$, for the squared error summed over the pixels; the released 10 for their mean is
            10/784 on MNIST.
        momentum: $\mu$ in [0, 1).
        spread: $\sigma_0$; the released code has $1/\sqrt k$.
        seed: of the starts.

    Raises:
        TypeError, ValueError: counts that are not whole or too small, numbers out of range.

    Source: Samangouei et al. (2018), section 4; "On Breaking Deep Generative Model-based Defenses",
    appendix; chapter ``generative``.
    """

    classifier: nn.Module

    def __init__(
        self,
        generator: Decoder,
        classifier: nn.Module,
        *,
        restarts: int = 10,
        steps: int = 200,
        lr: float = 0.05,
        momentum: float = 0.7,
        spread: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("restarts", restarts)
        check_whole("steps", steps)
        check_number("lr", lr)
        check_number("spread", spread)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is a number in [0, 1), not {momentum!r}")
        random(seed)
        self.generator, self.classifier = generator, classifier
        self.restarts, self.steps, self.seed = restarts, steps, seed
        self.lr, self.momentum, self.spread = lr, momentum, spread
        self.eval()

    @property
    def latent(self) -> int:
        """Size k of a code."""
        return self.generator.latent

    def decode(self, z: Float[Tensor, "B k"]) -> Float[Tensor, "B ..."]:
        """What the generator makes of codes, in evaluation mode."""
        with eval_mode(self.generator):  # type: ignore[arg-type]
            return self.generator.decode(z)

    def inner(self, z: Float[Tensor, "B k"], x: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        r"""The inner loss $l(z;x)=\|G(z)-x\|_2^2$, summed over the pixels."""
        made = self.decode(z)
        _check_made(made, x)
        return (made - x).flatten(1).square().sum(dim=1)

    def logits(self, z: Float[Tensor, "B k"], x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:  # noqa: ARG002
        r"""What is decided by a code: $f(G(z))$; ``x`` plays no part."""
        return self.classifier(self.decode(z))

    def project(
        self,
        x: Float[Tensor, "B ..."],
        *,
        start: Float[Tensor, "B k"] | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "B k"]:
        """Codes of the images' nearest neighbors among the generated ones; no graph is kept.

        Args:
            x: (B, ...) inputs.
            start: (B, k) codes to start from, such as those of an earlier ``x``, instead of the
                random ones.
            steps: L; by default the defense's own.

        Returns:
            (B, k) codes, detached.
        """
        steps = self.steps if steps is None else steps
        check_whole("steps", steps)
        starts = self._starts(x) if start is None else start.detach()[None]
        count = len(starts)
        images = x.detach().expand(count, *x.shape).flatten(0, 1)
        z = self._descend(starts.flatten(0, 1), images, steps)
        with torch.no_grad():
            reached = self.inner(z, images).unflatten(0, (count, len(x)))
        best = reached.nan_to_num(math.inf).argmin(dim=0)
        return z.unflatten(0, (count, len(x)))[best, torch.arange(len(x), device=x.device)]

    def purify(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The generated images that stand in for the inputs, detached."""
        z = self.project(x)
        with torch.no_grad():
            return self.decode(z)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """(B, ...) inputs to (B, K) logits, without a gradient to ``x``.

        Raises:
            ValueError: inputs of another shape than the generator's.
        """
        return self.logits(self.project(x), x)

    def reseeded(self, seed: int) -> Self:
        """The same defense, with copies of its networks and other random starts."""
        random(seed)
        other = copy.deepcopy(self)
        other.seed = seed
        return other

    def _starts(self, x: Tensor) -> Float[Tensor, "R B k"]:
        # A stream for each start, so that more of them contain the fewer.
        draws = [
            torch.randn(1, self.latent, generator=random(self.seed, r))
            for r in range(self.restarts)
        ]
        return (self.spread * torch.stack(draws)).to(x).expand(-1, len(x), -1)

    def _descend(self, z: Tensor, x: Tensor, steps: int) -> Tensor:
        z, speed = z.clone(), torch.zeros_like(z)
        for step in range(steps):
            rate = self.lr * (DECAY if step >= DECAY_FROM * steps else 1.0)
            _, gradient = input_gradient(lambda codes: self.inner(codes, x), z)
            speed = self.momentum * speed - rate * gradient
            z = z + speed
        return z


class AnalysisBySynthesis(nn.Module):
    r"""Classify by asking the decoder of each class how well it can make the image.

    $$\ell_c(z;x)=\|x-G_c(z)\|_2^2+\tfrac\beta2\|z\|_2^2,\qquad
    f_c(x)=-\min_{\|z\|\le r}\ell_c(z;x):$$

    up to a factor and constants, the lower bound on $\log p(x\mid c)$ of a VAE of this class, with
    the posterior $\mathcal N(z,I)$ that suits it best and the error taken at its mean $z$, where
    the bound has the expected error. Of N codes drawn once from the prior, each image starts from
    the best of each class and goes L steps of Adam, codes longer than $r$ being pulled back. The
    decoders of all classes are evaluated as one. Loading a state dictionary draws anew.

    The codes are constants of the gradient. By the envelope theorem,
    $\nabla_xf_c=-2(x-G_c(z_c^*))$ is the whole gradient where $z_c^*$ is a minimum inside the ball.

    Args:
        decoders: one for each class, all of one architecture; their weights are copied.
        beta: $\beta\ge0$, weight of the code's prior; that of the decoders' training.
        draws: N.
        steps: L; 0 keeps the best draws.
        lr: Adam's rate.
        radius: $r$, the largest length of a code.
        scale: $\alpha$ of ``confidence``; the released 440 for the mean over the pixels.
        offset: $\eta_0$ of ``confidence``.
        seed: of the draws.

    Raises:
        TypeError, ValueError: fewer than two decoders, counts that are not whole or too small,
            numbers out of range.

    Source: Schott et al. (2019), section 3; "On Breaking Deep Generative Model-based Defenses",
    appendix; chapter ``generative``.
    """

    codes: Float[Tensor, "N k"]
    images: Float[Tensor, "K N D"]
    offsets: Float[Tensor, "K N"]

    def __init__(
        self,
        decoders: Sequence[Decoder] | nn.ModuleList,
        *,
        beta: float = 1.0,
        draws: int = 8000,
        steps: int = 50,
        lr: float = 0.05,
        radius: float = 5.0,
        scale: float = 440 / 784,
        offset: float = 3.9e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(decoders) < 2:
            raise ValueError(f"decoders are two or more, one for each class, not {len(decoders)}")
        check_count("draws", draws)
        check_whole("steps", steps)
        numbers = {"beta": beta, "lr": lr, "radius": radius, "scale": scale, "offset": offset}
        for name, value in numbers.items():
            check_number(name, value)
        self.classes, self.latent = len(decoders), int(cast(Decoder, decoders[0]).latent)
        self.beta, self.draws, self.steps, self.lr = beta, draws, steps, lr
        self.radius, self.scale, self.offset, self.seed = radius, scale, offset, seed
        self._stack([_Decode(cast(Decoder, decoder)) for decoder in decoders])
        self.eval()
        self._draw()
        self.register_load_state_dict_post_hook(_redraw)

    def _stack(self, parts: "list[_Decode]") -> None:
        """Keep the weights of all decoders as one batch, and one decoder without weights."""
        states = [part.state_dict() for part in parts]
        if any(_layout(state) != _layout(states[0]) for state in states):
            raise ValueError("the decoders are not all of one architecture")
        self._names = {name: name.replace(".", "/") for name in states[0]}
        for name, known in self._names.items():
            self.register_buffer(known, torch.stack([state[name] for state in states]).detach())
        # In a tuple, so that it is no submodule: one without values can't be moved.
        self._pattern = (copy.deepcopy(parts[0]).to("meta").eval(),)

    @torch.no_grad()
    def _draw(self) -> None:
        """The prior's draws of highest density, and what every class makes of them."""
        weight = next(self.buffers())
        count = math.ceil(self.draws / KEPT)
        drawn = torch.randn(count, self.latent, generator=random(self.seed))
        codes = drawn[drawn.norm(dim=1).argsort(stable=True)[: self.draws]].to(weight)
        parts = [
            self.decode(part[:, None].expand(-1, self.classes, -1)).flatten(2).transpose(0, 1)
            for part in codes.split(CHUNK)
        ]
        images = torch.cat(parts, dim=1)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("images", images, persistent=False)
        prior = self.beta / 2 * codes.square().sum(dim=1)
        self.register_buffer("offsets", images.square().sum(dim=2) + prior, persistent=False)

    def decode(self, z: Float[Tensor, "B K k"]) -> Float[Tensor, "B K ..."]:
        """What each class's decoder makes of its codes, all classes in one pass."""
        state = {name: self.get_buffer(known) for name, known in self._names.items()}

        def one(state: dict[str, Tensor], codes: Tensor) -> Tensor:
            return functional_call(self._pattern[0], state, (codes,))

        return vmap(one, in_dims=(0, 1), out_dims=1)(state, z)

    def energies(
        self, z: Float[Tensor, "B K k"], x: Float[Tensor, "B ..."]
    ) -> Float[Tensor, "B K"]:
        r"""$\ell_c(z_c;x)$ of given codes: squared error and half $\beta$ times squared length."""
        made = self.decode(z)
        _check_made(made[:, 0], x)
        error = (made - x[:, None]).flatten(2).square().sum(dim=2)
        return error + self.beta / 2 * z.square().sum(dim=2)

    def inner(self, z: Float[Tensor, "B K k"], x: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        r"""The inner loss of all classes together, $\sum_c\ell_c(z_c;x)$."""
        return self.energies(z, x).sum(dim=1)

    def logits(self, z: Float[Tensor, "B K k"], x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        r"""What is decided by codes: $-\ell_c(z_c;x)$, with the gradient to ``x``."""
        return -self.energies(z, x)

    def infer(
        self,
        x: Float[Tensor, "B ..."],
        *,
        start: Float[Tensor, "B K k"] | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "B K k"]:
        """Each class's best code for each input; no graph is kept.

        Args:
            x: (B, ...) inputs.
            start: (B, K, k) codes to start from, instead of the best draws.
            steps: L; by default the defense's own.

        Returns:
            (B, K, k) codes of length ``radius`` at most, detached.
        """
        steps = self.steps if steps is None else steps
        check_whole("steps", steps)
        x = x.detach()
        z = self._clip(self._nearest(x) if start is None else start.detach())
        (first, second, small), m, v = ADAM, torch.zeros_like(z), torch.zeros_like(z)
        for step in range(1, steps + 1):
            _, gradient = input_gradient(lambda codes: self.inner(codes, x), z)
            m = first * m + (1 - first) * gradient
            v = second * v + (1 - second) * gradient.square()
            size = (v / (1 - second**step)).sqrt() + small
            z = self._clip(z - self.lr / (1 - first**step) * m / size)
        return z

    def losses(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        r"""$\min_z\ell_c(z;x)$ as far as the solver finds it, with the gradient to ``x``."""
        return self.energies(self.infer(x), x)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """(B, ...) inputs to (B, K) logits, the negative losses.

        Raises:
            RuntimeError: inputs of another size than the decoders'.
            ValueError: inputs of the same size and another shape.
        """
        return -self.losses(x)

    def confidence(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        r"""Probabilities of the classes, which become equal far away from all of them.

        $p(c\mid x)=u_c/\sum_{c'}u_{c'}$ with $u_c=e^{-\alpha\ell_c^*}+\eta_0$, Bayes'
        rule with a uniform prior and a small likelihood that every class gives to everything.

        Source: Schott et al. (2019), section 3.
        """
        # In logarithms: without an offset all likelihoods may be too small for a float.
        log_own = -self.scale * self.losses(x)
        return torch.logaddexp(log_own, log_own.new_tensor(self.offset).log()).softmax(dim=1)

    def reseeded(self, seed: int) -> Self:
        """The same defense with other draws from the prior."""
        random(seed)
        other = copy.deepcopy(self)
        other.seed = seed
        other._draw()
        return other

    def _nearest(self, x: Tensor) -> Float[Tensor, "B K k"]:
        r"""The best of the draws, by $\|G\|^2+\tfrac\beta2\|z\|^2-2\langle x,G\rangle$."""
        flat = x.flatten(1)
        energies = (
            torch.addmm(offset, flat, images.T, alpha=-2)
            for offset, images in zip(self.offsets, self.images, strict=True)
        )
        return torch.stack([self.codes[energy.argmin(dim=1)] for energy in energies], dim=1)

    def _clip(self, z: Tensor) -> Tensor:
        length = z.norm(dim=2, keepdim=True)
        return torch.where(length > self.radius, z * (self.radius / length), z)


class _Decode(nn.Module):
    """A decoder whose forward pass is ``decode``, as ``functional_call`` wants it."""

    def __init__(self, of: Decoder) -> None:
        super().__init__()
        self.of = of

    def forward(self, z: Tensor) -> Tensor:
        return self.of.decode(z)


def _layout(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _redraw(defense: nn.Module, _: object) -> None:
    """After other weights were loaded; a function of the module, so that it can be pickled."""
    cast(AnalysisBySynthesis, defense)._draw()


def _check_made(made: Tensor, x: Tensor) -> None:
    """Raise where the difference would be of other shapes, broadcast to one."""
    if made.shape != x.shape:
        raise ValueError(f"the generator makes {tuple(made.shape)}, but x is {tuple(x.shape)}")
