r"""Linear encoders of sparse signals: what compressive sensing promises, and their attacks.

An encoder $\Phi$ maps $N$ coefficients to $M<N$ numbers. Sparse signals survive that, which
coherence, restricted isometries and l1 minimization make precise; dense perturbations collide with
anything. The attack that makes a source look like a target,

$$\min_\delta\ \|\Phi(x_s+\delta)-\Phi x_t\|_2^2
\quad\text{such that}\quad\|\delta\|_2\le\varepsilon,$$

has a closed form, $\delta=M_\Phi(x_t-x_s)$, one part of which hides the source and one of which
imitates the target. Here are the signals, the promises, and that attack; two layers with a ReLU
between them are in ``adv.theory.relu_encoder``. All of it is linear algebra in float64.

Source: "Understanding Adversarial Attacks on Autoencoders", sections 2 to 4; chapter ``sensing``.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import LinearConstraint, linprog, milp
from torch import Tensor

__all__ = [
    "FourierSignals",
    "LinearAttack",
    "coherence",
    "gaussian_encoder",
    "guaranteed_sparsity",
    "isometry",
    "linear_attack",
    "matched",
    "smallest_l1",
    "sparsest",
    "welch_bound",
]


# ------------------------------------------------------------------------------------- the signals


@dataclass(frozen=True)
class FourierSignals:
    r"""Images of a few cosines along the axes: the source's synthetic set.

    An image of ``size`` x ``size`` pixels is $Dx$ with the products
    $\cos(2\pi ui/n)\cos(2\pi vj/n)$, $0\le u,v\le n/2$, as the columns of $D$, orthogonal to each
    other. Only those that vary along one axis may occur, and only in certain combinations.

    Args:
        size: $n$, pixels of a side; even.
        active: $K$, frequencies of an image.
        patterns: how many combinations of frequencies occur.
        amplitudes: smallest and largest coefficient of an active frequency, drawn uniformly. The
            source leaves them open; positive ones are the only ones that fit its table.
        seed: of the combinations.

    Raises:
        ValueError: an odd or too small size, or more combinations than there are.
    """

    size: int = 28
    active: int = 5
    patterns: int = 200
    amplitudes: tuple[float, float] = (1.6, 4.8)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2:
            raise ValueError(f"size must be an even number of pixels, not {self.size}")
        if not 1 <= self.active <= self.size:
            raise ValueError(f"active must be in 1..{self.size}, not {self.active}")
        most = math.comb(self.size, self.active)
        if not 1 <= self.patterns <= most:
            raise ValueError(f"patterns must be in 1..{most}, not {self.patterns}")

    @cached_property
    def dictionary(self) -> Float[Tensor, "pixels N"]:
        """The columns of $D$, for the frequencies (u, v) in lexicographic order."""
        waves = torch.arange(self.size // 2 + 1, dtype=torch.float64)
        grid = torch.arange(self.size, dtype=torch.float64)
        cosine = torch.cos(2 * math.pi * grid[:, None] * waves / self.size)
        return torch.einsum("iu,jv->ijuv", cosine, cosine).reshape(self.size**2, -1)

    @cached_property
    def allowed(self) -> Int[Tensor, " size"]:
        """Indices of the frequencies that vary along exactly one axis."""
        side = self.size // 2 + 1
        waves = torch.arange(1, side)
        return torch.cat([waves, waves * side])

    @cached_property
    def supports(self) -> Int[Tensor, "patterns K"]:
        """The combinations that occur, distinct and drawn uniformly."""
        draws = torch.Generator().manual_seed(self.seed)
        found: dict[tuple[int, ...], None] = {}
        while len(found) < self.patterns:
            choice = torch.randperm(self.size, generator=draws)[: self.active]
            found[tuple(sorted(choice.tolist()))] = None
        return self.allowed[torch.tensor(list(found))]

    def sample(self, count: int, seed: int = 0) -> Float[Tensor, "count N"]:
        """Sparse coefficients of ``count`` independent signals, float64."""
        draws = torch.Generator().manual_seed(seed)
        low, high = self.amplitudes
        which = torch.randint(self.patterns, (count,), generator=draws)
        values = torch.rand(count, self.active, generator=draws, dtype=torch.float64)
        x = torch.zeros(count, self.dictionary.shape[1], dtype=torch.float64)
        return x.scatter_(1, self.supports[which], low + (high - low) * values)

    def images(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B 1 size size"]:
        """The images $Dx$ of coefficients; their values are not bounded."""
        return (x @ self.dictionary.to(x).T).reshape(-1, 1, self.size, self.size)


def gaussian_encoder(rows: int, columns: int, seed: int = 0) -> Float[Tensor, "M N"]:
    r"""A random encoder with independent entries $\mathcal N(0,1/M)$, float64.

    Args:
        rows: $M$, numbers of a code.
        columns: $N$, coefficients of a signal.
        seed: of the entries.
    """
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draws, dtype=torch.float64) / math.sqrt(rows)


# ------------------------------------------------------------------------------------ the promises


def coherence(phi: Float[Tensor, "... M N"]) -> Float[Tensor, "..."]:
    r"""$\mu(\Phi)=\max_{i\ne j}|\phi_i^\top\phi_j|/(\|\phi_i\|\|\phi_j\|)$, the largest cosine.

    Args:
        phi: (..., M, N) matrices with at least two columns, none of them zero.

    Returns:
        (...) values in [0, 1], float64.

    Raises:
        ValueError: fewer columns, a column of zeros, or values that are not finite.

    Source: section 2.
    """
    phi = phi.double()
    if not phi.isfinite().all():
        raise ValueError("phi must be finite")
    lengths = phi.norm(dim=-2, keepdim=True)
    if phi.shape[-1] < 2 or bool((lengths == 0).any()):
        raise ValueError("coherence needs two or more columns, none of them zero")
    unit = phi / lengths
    gram = (unit.mT @ unit).abs()
    itself = torch.eye(phi.shape[-1], dtype=torch.bool, device=phi.device)
    return gram.masked_fill(itself, 0).amax(dim=(-2, -1)).clamp_max(1)  # rounding may pass 1


def welch_bound(rows: int, columns: int) -> float:
    r"""The smallest coherence that any matrix of this shape can have, or less.

    $\mu\ge\sqrt{(N-M)/(M(N-1))}$ for $N\ge M$; 0 otherwise.

    Raises:
        ValueError: no rows or no columns.

    Source: Welch (1974).
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, not {rows} and {columns}")
    if columns <= rows:
        return 0.0
    return math.sqrt((columns - rows) / (rows * (columns - 1)))


def guaranteed_sparsity(mu: float) -> int:
    r"""The largest $K$ for which coherence $\mu$ proves that $K$-sparse signals are unique.

    $K<\frac12(1+1/\mu)$, strictly (E1). A coherence is known up to rounding only: what a right side
    smaller by a millionth would not prove is not claimed. Independent columns of coherence 0 prove
    any $K$: there it raises an error.

    Raises:
        ValueError: ``mu`` is not in (0, 1].

    Source: (2.2).
    """
    if not 0 < mu <= 1:
        raise ValueError(f"mu must be in (0, 1], not {mu}")
    return max(math.ceil((1 + 1 / mu) / 2 * (1 - 1e-6)) - 1, 0)


def isometry(
    phi: Float[Tensor, "M N"], supports: Int[Tensor, "S K"]
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    r"""How much $\|\Phi x\|^2/\|x\|^2$ varies over the signals of each support.

    Args:
        phi: (M, N) the encoder.
        supports: (S, K) indices of the active coefficients, distinct in a row.

    Returns:
        Smallest and largest squared singular value of the columns of each support. The restricted
        isometry constant of the set is the largest distance of any of them from 1.

    Source: section 2; a structured set of supports makes it the structured property.
    """
    columns = phi.T[supports].mT
    squares = torch.linalg.svdvals(columns).square()
    if columns.shape[-1] > columns.shape[-2]:
        return torch.zeros_like(squares[:, 0]), squares[:, 0]
    return squares[:, -1], squares[:, 0]


def smallest_l1(phi: Float[Tensor, "M N"], y: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
    r"""Basis pursuit: $\min\|x\|_1$ such that $\Phi x=y$, a linear program solved by HiGHS.

    Raises:
        ValueError: no ``x`` has this code.
    """
    a, b = (t.detach().double().cpu().numpy() for t in (phi, y))
    result = linprog(np.ones(2 * a.shape[1]), A_eq=np.hstack([a, -a]), b_eq=b, bounds=(0, None))
    if result.x is None:
        raise ValueError(f"no signal with this code was found: {result.message}")
    positive, negative = np.split(result.x, 2)
    return torch.from_numpy(positive - negative).to(phi)


def sparsest(
    phi: Float[Tensor, "M N"], y: Float[Tensor, " M"], *, bound: float, most: int | None = None
) -> Float[Tensor, " N"]:
    r"""$\min\|x\|_0$ such that $\Phi x=y$ and $\|x\|_\infty\le$ ``bound``, by integer programming.

    A binary variable for each coefficient says whether it may differ from zero. The problem is
    NP-hard: a few dozen columns are fine, hundreds are not.

    Args:
        phi: (M, N) the encoder.
        y: (M,) a code.
        bound: how large a coefficient may be. One below a millionth of it may be lost.
        most: how many coefficients may be nonzero at most, if that is known.

    Returns:
        (N,) a solution with the fewest nonzero coefficients; those the program forbids are exactly
        zero.

    Raises:
        ValueError: there is none, HiGHS stopped without a proof, or what it found has another code
            because of coefficients too small for the bound; a bound that is not positive.

    Source: (2.1).
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, not {bound}")
    a, b = (t.detach().double().cpu().numpy() for t in (phi, y))
    n = a.shape[1]
    eye = np.eye(n)
    limit = n if most is None else most
    result = milp(
        np.r_[np.zeros(n), np.ones(n)],
        integrality=np.r_[np.zeros(n), np.ones(n)],
        bounds=(np.r_[-np.ones(n), np.zeros(n)], np.ones(2 * n)),  # of x / bound, and binaries
        constraints=[
            LinearConstraint(np.hstack([a, 0 * a]), b / bound, b / bound),
            LinearConstraint(np.hstack([eye, -eye]), -np.inf, 0),
            LinearConstraint(np.hstack([eye, eye]), 0, np.inf),
            LinearConstraint(np.r_[np.zeros(n), np.ones(n)], 0, limit),
        ],
    )
    if not result.success:
        raise ValueError(f"no sparsest signal was proved: {result.message}")
    active = result.x[n:] > 0.5
    x = np.zeros(n)
    x[active] = np.linalg.lstsq(a[:, active], b, rcond=None)[0]  # without the solver's tolerances
    # The solver's binaries are right to 1e-6: a small coefficient can pass for zero.
    if np.abs(a @ x - b).max() > 1e-6 * np.abs(b).max():
        raise ValueError(
            f"coefficients below 1e-6 of the bound {bound} were lost; give a tighter one"
        )
    return torch.from_numpy(x).to(phi)


# -------------------------------------------------------------------------------------- the attack


class LinearAttack(NamedTuple):
    r"""The best perturbation of a linear encoder, and its two parts.

    Args:
        delta: (B, N) the perturbation, ``source + target``.
        source: (B, N) $\delta_s=-M_\Phi x_s$, which hides the source.
        target: (B, N) $\delta_t=M_\Phi x_t$, which imitates the target.
        lam: (B,) the multiplier $\lambda$; 0 where the budget is not needed.
    """

    delta: Float[Tensor, "B N"]
    source: Float[Tensor, "B N"]
    target: Float[Tensor, "B N"]
    lam: Float[Tensor, " B"]


def matched(phi: Float[Tensor, "M N"], lam: float) -> Float[Tensor, "N N"]:
    r"""$M_\Phi=(\Phi^\top\Phi+\lambda I)^{-1}\Phi^\top\Phi$, the part of a change that is made.

    Symmetric with eigenvalues $\sigma_i^2/(\sigma_i^2+\lambda)$; for $\lambda=0$, as its limit,
    the projection onto the rows of $\Phi$.

    Raises:
        ValueError: ``lam`` is negative or not finite.

    Source: (3.5).
    """
    _check_lam(lam)
    squares, v = _spectrum(phi)
    return (v * _weights(squares, phi.new_tensor(lam))) @ v.T


def linear_attack(
    phi: Float[Tensor, "M N"],
    x_s: Float[Tensor, "B N"],
    x_t: Float[Tensor, "B N"],
    *,
    eps: float | None = None,
    lam: float | None = None,
) -> LinearAttack:
    r"""The attack in closed form, under a budget or with a given multiplier.

    With $d=x_t-x_s$, $\Phi=U\Sigma V^\top$ and $c=V^\top d$, the multiplier of a budget solves the
    secular equation $\sum_i(\sigma_i^2/(\sigma_i^2+\lambda))^2c_i^2=\varepsilon^2$, by Newton's
    method on $1/\|\delta(\lambda)\|$, all pairs at once. Where the projection of $d$ onto the rows
    of $\Phi$ is within the budget, it is the attack, and the codes collide.

    Args:
        phi: (M, N) the encoder, best in float64.
        x_s: (B, N) sources, of the encoder's dtype and device.
        x_t: (B, N) targets, likewise.
        eps: l2 budget of each perturbation, positive.
        lam: the multiplier instead, the same for all pairs, zero or more.

    Returns:
        The perturbations, their parts, and the multipliers.

    Raises:
        ValueError: both or neither of ``eps`` and ``lam``, shapes, dtypes or devices that don't
            fit, integers, or values that can't be.

    Source: (3.1) to (3.6), with the square in (3.3) (E6) and the case of $\lambda=0$ (E7).
    """
    if (eps is None) == (lam is None):
        raise ValueError("give either eps, the budget, or lam, the multiplier")
    if x_s.shape != x_t.shape or x_s.ndim != 2 or x_s.shape[1] != phi.shape[1]:
        raise ValueError(
            f"sources and targets must be (B, {phi.shape[1]}), not {tuple(x_s.shape)} and "
            f"{tuple(x_t.shape)}"
        )
    if not all(bool(t.isfinite().all()) for t in (phi, x_s, x_t)):
        raise ValueError("the encoder, sources and targets must be finite")
    if not phi.is_floating_point() or any(
        t.dtype != phi.dtype or t.device != phi.device for t in (x_s, x_t)
    ):
        given = ", ".join(f"{t.dtype} on {t.device}" for t in (phi, x_s, x_t))
        raise ValueError(
            "the encoder, sources and targets must have one floating-point dtype and one device, "
            f"not {given}"
        )
    squares, v = _spectrum(phi)
    if lam is not None:
        _check_lam(lam)
        multiplier = x_s.new_full((len(x_s),), lam)
    else:
        if eps is None or not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite, not {eps}")
        multiplier = _secular(squares, (x_t - x_s) @ v, eps)
    shrink = _weights(squares, multiplier[:, None])
    source, target = -(shrink * (x_s @ v)) @ v.T, (shrink * (x_t @ v)) @ v.T
    return LinearAttack(source + target, source, target, multiplier)


def _check_lam(lam: float) -> None:
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and not negative, not {lam}")


def _spectrum(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values and right singular vectors, of those that are not zero."""
    _, sigma, vh = torch.linalg.svd(phi, full_matrices=False)
    rank = int((sigma > sigma.max() * max(phi.shape) * torch.finfo(phi.dtype).eps).sum())
    return sigma[:rank].square(), vh[:rank].T


def _weights(squares: Tensor, lam: Tensor) -> Tensor:
    return squares / (squares + lam)


def _secular(
    squares: Float[Tensor, " r"], c: Float[Tensor, "B r"], eps: float
) -> Float[Tensor, " B"]:
    """The multipliers: Newton's steps, halving the bracket where one would leave it."""
    if not len(squares):
        return c.new_zeros(len(c))
    gradient = (squares * c).norm(dim=1)
    low, high = (gradient / eps - squares.max()).clamp_min(0), gradient / eps
    lam, slack = torch.zeros_like(gradient), c.norm(dim=1) <= eps
    for _ in range(100):
        w = _weights(squares, lam[:, None])
        q = (w * c).norm(dim=1)
        error = q - eps
        low = torch.where(error > 0, torch.maximum(low, lam), low)
        high = torch.where(error > 0, high, torch.minimum(high, lam))
        if bool(((error.abs() <= 1e-14 * eps) | slack).all()):
            break
        fall = ((w * c).square() / (squares + lam[:, None])).sum(dim=1) / q
        step = lam + q / fall * error / eps
        lam = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    return torch.where(slack, torch.zeros_like(lam), lam)
