r"""One Gaussian, a linear generator, and two kinds of attack: every answer in closed form.

The data are normal with mean $\mu$ and covariance $\Sigma=U\,\mathrm{diag}(\lambda)\,U^\top$; the
model that is attacked is a normal density, and its loss the negative log-likelihood $\ell$. An
attack moves a point $x=\mu+v$ by $Bu$ and pays $\frac L2\|u\|_2^2$ for it:

$$\max_u\ \ell(\mu+v+Bu;\mu,\Sigma)-\tfrac L2\|u\|_2^2.$$

With $B=I$ it moves pixels, with $B=W$, the decoder of probabilistic PCA, it moves the latent code.
Both have $BB^\top=U\,\mathrm{diag}(w)\,U^\top$ with **gains** $w_i\ge0$, so in the eigenbasis
nothing distinguishes them but the gains: $w_i=1$ for pixels (``w=None`` here), $w_i=\lambda_i
-\sigma^2$ for the $k$ leading directions of the decoder and 0 for the others (``gains``). All other
functions take spectra: tensors whose last axis counts eigenvalues; leading axes are batches.
Everything is calculated and returned in float64.

Source: "Disentangling Adversarial Robustness in Directions of the Data Manifold", section 4 and
appendix C; chapter ``gaussian``. E2 and the like are errata listed there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adv.geometry import Norm, dual_norm

__all__ = [
    "PPCA",
    "amplification",
    "attack",
    "augmented",
    "budget",
    "decoded",
    "displacement",
    "distribution_change",
    "excess_risk",
    "factors",
    "fit",
    "gains",
    "h",
    "linear_accuracy",
    "multiplier",
    "noise",
    "saddle",
    "saddle_budget",
    "saddle_multiplier",
]

Strategy = Literal[1, 2, 3]

# ----------------------------------------------------------------------------------- the generator


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class PPCA:
    r"""Probabilistic PCA, $x=Wz+\mu+e$ with independent normal $z\in\mathbb R^k$ and $e$.

    The code $z$ has covariance $I$, the noise $e$ has $\sigma^2I$. The model is given by the law of
    its data; $W$ and $\sigma^2$ are the maximum likelihood ones, $W=U_k(\Lambda_k-\sigma^2I)^{1/2}$
    and $\sigma^2$ the mean of the $d-k$ trailing eigenvalues (0 for $k=d$). Then
    $W^\top W+\sigma^2I=\Lambda_k$. What is given is kept in float64. Two models are equal only if
    they are one and the same object.

    Args:
        mu: (d,) mean.
        U: (d, d) orthonormal eigenvectors of the covariance, as columns.
        lam: (d,) its eigenvalues, in decreasing order.
        k: dimension of the latent space, 1 to d.

    Raises:
        ValueError: shapes that do not fit, ``U`` not orthonormal (1e-4), a mean that is not finite,
            eigenvalues that increase or are negative, a ``k`` out of range or larger than the
            covariance's rank.

    Source: section 4.1; Tipping and Bishop (1999).
    """

    mu: Float[Tensor, " d"]
    U: Float[Tensor, "d d"]
    lam: Float[Tensor, " d"]
    k: int

    def __post_init__(self) -> None:
        for name in ("mu", "U", "lam"):
            object.__setattr__(self, name, getattr(self, name).double())
        d = self.lam.shape[-1]
        if self.lam.ndim != 1 or self.mu.shape != (d,) or self.U.shape != (d, d):
            raise ValueError(
                f"mu, U and lam must be (d,), (d, d) and (d,), not {tuple(self.mu.shape)}, "
                f"{tuple(self.U.shape)} and {tuple(self.lam.shape)}"
            )
        _check_latent(self.lam, self.k)
        off = (self.U.T @ self.U - torch.eye(d).to(self.U)).abs().max()
        if not (off < 1e-4 and self.mu.isfinite().all()):
            raise ValueError("U must have orthonormal columns, and mu must be finite")
        if not self.lam[self.k - 1] > 0:
            raise ValueError(f"the data vary in fewer than k = {self.k} directions")

    @property
    def sigma2(self) -> float:
        r"""The noise variance $\sigma^2$."""
        return float(noise(self.lam, self.k))

    @cached_property
    def W(self) -> Float[Tensor, "d k"]:  # noqa: N802
        """The decoder's matrix."""
        return self.U[:, : self.k] * gains(self.lam, self.k)[: self.k].sqrt()

    @property
    def Sigma(self) -> Float[Tensor, "d d"]:  # noqa: N802
        r"""Covariance of the data; the model's own is $WW^\top+\sigma^2I$."""
        return (self.U * self.lam) @ self.U.T

    def encode(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B k"]:
        r"""The posterior mean $\Lambda_k^{-1}W^\top(x-\mu)$ of the latent code.

        Raises:
            ValueError: points that are not (B, d).
        """
        if x.ndim != 2 or x.shape[1] != len(self.mu):
            raise ValueError(f"x must be (B, {len(self.mu)}), not {tuple(x.shape)}")
        return (x.double() - self.mu) @ self.W / self.lam[: self.k]

    def decode(self, z: Float[Tensor, "B k"]) -> Float[Tensor, "B d"]:
        r"""The mean $Wz+\mu$ of the images of a code.

        Raises:
            ValueError: codes that are not (B, k).
        """
        if z.ndim != 2 or z.shape[1] != self.k:
            raise ValueError(f"z must be (B, {self.k}), not {tuple(z.shape)}")
        return z.double() @ self.W.T + self.mu

    def pass_through(
        self, x: Float[Tensor, "B d"], strategy: Strategy = 1, seed: int = 0
    ) -> Float[Tensor, "B d"]:
        r"""Encode and decode, in one of the three ways that the source considers.

        Args:
            x: (B, d) data.
            strategy: 1, the posterior's mean and its mean image; 2, a draw of $z\mid x$ and a draw
                of $x\mid z$; 3, a draw of $z$ from the prior and of $x\mid z$, whatever ``x`` is.
            seed: of the draws.

        Returns:
            (B, d) images. Their covariance has the eigenvalues ``decoded``.

        Raises:
            ValueError: another strategy, or points that are not (B, d).

        Source: Lemma 1.
        """
        _check_strategy(strategy)
        z = self.encode(x)
        if strategy == 1:
            return self.decode(z)
        draws = torch.Generator().manual_seed(seed)
        white = torch.randn(len(x), self.k, generator=draws, dtype=torch.float64).to(z)
        e = torch.randn(x.shape, generator=draws, dtype=torch.float64).to(z)
        sigma = math.sqrt(self.sigma2)
        z = white if strategy == 3 else z + sigma * white / self.lam[: self.k].sqrt()
        return self.decode(z) + sigma * e


def fit(x: Float[Tensor, "n d"], k: int) -> PPCA:
    r"""The maximum likelihood fit of probabilistic PCA.

    Args:
        x: (n, d) data, $n\ge2$.
        k: latent dimension.

    Returns:
        The model; its eigenvalues are those of the sample covariance $\frac1n\sum vv^\top$.

    Raises:
        ValueError: fewer than two points, values that are not finite, another shape, or a ``k``
            that the data do not allow.

    Source: Tipping and Bishop (1999), appendix A.
    """
    if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"x must be (n, d), n >= 2, of finite values, not {tuple(x.shape)}")
    x = x.double()
    mu = x.mean(dim=0)
    lam, U = torch.linalg.eigh((x - mu).T @ (x - mu) / len(x))
    lam = torch.where(lam > lam[-1] * len(lam) * torch.finfo(lam.dtype).eps, lam, 0)
    return PPCA(mu, U.flip(1), lam.flip(0), k)


def noise(lam: Float[Tensor, "... d"], k: int) -> Float[Tensor, "..."]:
    r"""$\sigma^2$, the mean of the trailing eigenvalues; 0 for $k=d$.

    Raises:
        ValueError: ``lam`` is not decreasing or negative, ``k`` is not in 1..d.

    Source: section 4.1.
    """
    _check_latent(lam, k)
    tail = lam.double()[..., k:]
    return tail.sum(dim=-1) / max(tail.shape[-1], 1)


def gains(lam: Float[Tensor, "... d"], k: int) -> Float[Tensor, "... d"]:
    r"""The gains of the decoder, $w_i=\lambda_i-\sigma^2$ for $i\le k$ and 0 for $i>k$.

    They are the eigenvalues of $WW^\top$.

    Args:
        lam: (..., d) eigenvalues of the data, decreasing.
        k: latent dimension.

    Raises:
        ValueError: as ``noise``.

    Source: section 4.1.
    """
    w = (lam.double() - noise(lam, k)[..., None]).clamp_min(0)
    return torch.where(torch.arange(lam.shape[-1], device=lam.device) < k, w, 0)


def decoded(lam: Float[Tensor, "... d"], k: int, strategy: Strategy) -> Float[Tensor, "... d"]:
    r"""Lemma 1: the eigenvalues $\lambda^{(j)}$ of what encoding and decoding makes of the data.

    Decoding the mean ($j=1$) leaves $(\lambda_i-\sigma^2)^2/\lambda_i$ and no tail; with draws
    ($j=2,3$, which are one and the same law, E1) it is $\lambda_i$ with the tail averaged.

    Args:
        lam: (..., d) eigenvalues of the data, decreasing.
        k: latent dimension.
        strategy: $j$.

    Returns:
        (..., d) eigenvalues; the eigenvectors are those of the data.

    Raises:
        ValueError: another strategy, and as ``noise``.

    Source: Lemma 1, (5).
    """
    _check_strategy(strategy)
    if strategy == 1:
        w = gains(lam, k)
        return torch.where(w > 0, w.square() / lam, 0)
    leading = torch.arange(lam.shape[-1], device=lam.device) < k
    return torch.where(leading, lam.double(), noise(lam, k)[..., None])


# -------------------------------------------------------------------------------------- the attack


def attack(
    v: Float[Tensor, "B d"],
    Sigma: Float[Tensor, "d d"],
    L: float,
    W: Float[Tensor, "d k"] | None = None,
) -> Float[Tensor, "B m"]:
    r"""Lemma 2: the perturbation that maximizes $\ell-\frac L2\|u\|_2^2$.

    $u=B^\top(L\Sigma-BB^\top)^{-1}v$.

    Args:
        v: (B, d) points minus the model's mean.
        Sigma: (d, d) covariance of the model that is attacked.
        L: multiplier of the squared length, the same for all points.
        W: $B$, a decoder, for an attack on the latent code; None moves pixels, $B=I$.

    Returns:
        (B, m) changes of the code, $m=k$; or of the pixels, $m=d$.

    Raises:
        ValueError: shapes that do not fit, values that are not finite; or an ``L`` at which the
            problem has no maximum, because $L\Sigma-BB^\top$ is not positive definite.

    Source: Lemma 2; its forms with $W^\top\Sigma^{-1}W$ inside are equal to this one.
    """
    v, Sigma = v.double(), Sigma.double()
    d = v.shape[-1]
    if v.ndim != 2 or Sigma.shape != (d, d) or (W is not None and W.shape[0] != d):
        raise ValueError(
            "v and Sigma must be (B, d) and (d, d), W must be (d, k); v and Sigma are "
            f"{tuple(v.shape)} and {tuple(Sigma.shape)}"
        )
    B = torch.eye(d, dtype=Sigma.dtype, device=Sigma.device) if W is None else W.double()
    if not (math.isfinite(L) and all(t.isfinite().all() for t in (v, Sigma, B))):
        raise ValueError(f"v, Sigma, W and L must be finite; L is {L}")
    factor, failed = torch.linalg.cholesky_ex(L * Sigma - B @ B.T)
    if failed:
        raise ValueError(f"L = {L} is too small: a perturbation of any size pays, without a limit")
    return torch.cholesky_solve(v.T, factor).T @ B


def factors(
    lam: Float[Tensor, "... d"], L: float | Tensor, w: Float[Tensor, "... d"] | None = None
) -> Float[Tensor, "... d"]:
    r"""What the attack multiplies the coordinates of $v$ by, $A_i=L\lambda_i/(L\lambda_i-w_i)$.

    Args:
        lam: (..., d) eigenvalues of the covariance of the *model* that is attacked, positive. A
            singular covariance is to be restricted to its support (E9).
        L: multiplier, one number or (...).
        w: (..., d) gains; None for pixels.

    Returns:
        (..., d) factors, 1 where the gain is 0.

    Raises:
        ValueError: negative or infinite values, or an ``L`` not above the threshold
            $\max_iw_i/\lambda_i$, below which no perturbation is the best.

    Source: Lemma 2.
    """
    return 1 + _added(lam, L, w)


def _added(lam: Tensor, L: float | Tensor, w: Tensor | None) -> Tensor:
    r"""$A_i-1=w_i/(L\lambda_i-w_i)$, the share that the attack adds to a coordinate."""
    lam, w = _positive_pair(lam, w)
    return w / (_above(L, lam, w) * lam - w)


def displacement(
    lam: Float[Tensor, "... d"],
    L: float | Tensor,
    w: Float[Tensor, "... d"] | None = None,
    var: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... d"]:
    r"""Mean square of what the attack adds to the input, in each direction.

    $\mathbb E(Bu)_i^2=w_i^2\lambda^{(j)}_i/(L\lambda_i-w_i)^2$.

    Args:
        lam: (..., d) eigenvalues of the model that is attacked.
        L: multiplier.
        w: (..., d) gains; None for pixels.
        var: (..., d) variances $\lambda^{(j)}$ of the points that are attacked; by default ``lam``.

    Returns:
        (..., d) mean squares, in pixels also for a latent attack.

    Raises:
        ValueError: as ``factors``; or a negative variance.

    Source: section 4.3; the chapter's figure of where the budget goes.
    """
    return _added(lam, L, w).square() * _variance(lam, var)


def budget(
    lam: Float[Tensor, "... d"],
    L: float | Tensor,
    w: Float[Tensor, "... d"] | None = None,
    var: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "..."]:
    r"""The mean square of the attack, in the coordinates it moves.

    $\mathbb E\|u\|_2^2=\sum_iw_i\lambda^{(j)}_i/(L\lambda_i-w_i)^2$.

    Args:
        lam: (..., d) eigenvalues of the model that is attacked.
        L: multiplier.
        w: (..., d) gains; None for pixels.
        var: (..., d) variances of the points that are attacked; by default ``lam``.

    Returns:
        (...) values $\epsilon^2$, which fall from infinity to 0 as ``L`` grows. The inverse is
        ``multiplier``.

    Raises:
        ValueError: as ``displacement``.

    Source: (4) and (6), with the mean square for which a constant multiplier is exact (E7, E8).
    """
    lam, w = _positive_pair(lam, w)
    L = _above(L, lam, w)
    return (w * _variance(lam, var) / (L * lam - w).square()).sum(dim=-1)


def multiplier(
    lam: Float[Tensor, "... d"],
    eps: float | Tensor,
    w: Float[Tensor, "... d"] | None = None,
    var: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "..."]:
    r"""The multiplier $L$ of a budget $\epsilon$ for the attack on a given model.

    With ``var`` the squares of one point's coordinates $v_i$, of shape (B, d), it is the multiplier
    of the constraint $\|u\|_2\le\epsilon$ for each point.

    Args:
        lam: (..., d) eigenvalues of the model that is attacked.
        eps: root mean square $\epsilon$ of the perturbation, positive, a number or (...).
        w: (..., d) gains; None for pixels.
        var: (..., d) variances of the points that are attacked; by default ``lam``.

    Returns:
        (...) multipliers, above the threshold $t=\max_iw_i/\lambda_i$. The budget depends on $L-t$,
        of which a large one leaves $L$ few digits: ``budget`` gives $\epsilon^2$ back only up to a
        share of about $10^{-15}L/(L-t)$.

    Raises:
        ValueError: a budget that is not positive, or so large that its multiplier can't be told
            from the threshold; spectra as in ``displacement``; or no variance in the direction of
            the threshold, where no linear attack uses up a large budget.

    Source: Lemma 2.
    """
    lam, w = _positive_pair(lam, w)
    rates = w / lam
    top = rates.amax(dim=-1, keepdim=True)
    c = (w * _variance(lam, var)).sqrt() / lam
    if not ((c > 0) & (rates == top)).any(dim=-1).all():
        raise ValueError("multiplier needs variance where w / lam is largest")
    size = _positive(eps, "eps", lam)
    # |u_i| = c_i / (L - w_i/lam_i) in the root mean square. The unknown is L - top, which keeps its
    # digits near the threshold; one direction alone needs at least low, all at the threshold high.
    low, high = (c / size - (top - rates)).amax(dim=-1, keepdim=True), _length(c) / size
    slack = _bisect(lambda s: _length(c / (s + top - rates)) > size, low, high)
    found = top + slack
    if (found <= top).any():
        raise ValueError(f"eps is too large, {float(size.max()):g}: L rounds to its threshold")
    return found[..., 0]


def excess_risk(
    lam: Float[Tensor, "... d"],
    L: float | Tensor,
    w: Float[Tensor, "... d"] | None = None,
    var: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "..."]:
    r"""By how much the attack raises the risk, $\frac12\sum_i(A_i^2-1)\lambda^{(j)}_i/\lambda_i$.

    For $\lambda^{(j)}=\lambda$ and $w=\lambda$ on $k$ directions (a decoder without noise) this is
    $\frac k2\frac{2L-1}{(L-1)^2}\approx k/L$; for pixels it is
    $\frac12\sum_ig(L\lambda_i)$, $g(t)=\frac2{t-1}+\frac1{(t-1)^2}$, so about
    $\mathrm{tr}\,\Sigma^{-1}/L$. The source prints $L^{-2}$ in both (E4, E5).

    Args:
        lam: (..., d) eigenvalues of the model that is attacked.
        L: multiplier.
        w: (..., d) gains; None for pixels.
        var: (..., d) variances of the points that are attacked; by default ``lam``.

    Returns:
        (...) mean loss after the attack minus before, in nats.

    Raises:
        ValueError: as ``displacement``.

    Source: Theorems 2 and 4, Corollary 3.
    """
    s = _added(lam, L, w)  # A^2 - 1 = s (2 + s), where A - 1 may be tiny
    return (s * (2 + s) * _variance(lam, var) / lam).sum(dim=-1) / 2


def distribution_change(
    lam: Float[Tensor, "... d"], var: Float[Tensor, "... d"]
) -> Float[Tensor, "..."]:
    r"""What passing through the generator changes the risk by, before any attack.

    $\frac12(\sum_i\lambda^{(j)}_i/\lambda_i-d)$.

    The source adds a ratio of determinants, which does not belong there (E2). The sign is either.

    Args:
        lam: (..., d) eigenvalues of the model and of the data, positive.
        var: (..., d) those of the decoded data, ``decoded``.

    Returns:
        (...) differences of mean losses, in nats.

    Raises:
        ValueError: an eigenvalue that is not positive, or a negative variance.

    Source: Theorem 2, corrected.
    """
    lam, _ = _positive_pair(lam, None)
    return (_variance(lam, var) / lam - 1).sum(dim=-1) / 2


# --------------------------------------------------------------------------------- the saddle point


def h(lam: Float[Tensor, "..."], a: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
    r"""The root $\lambda'\ge a$ of $(\lambda'-a)^2=\lambda\lambda'$, behind both saddle points.

    $h(\lambda,a)=\big(\frac{\sqrt\lambda+\sqrt{\lambda+4a}}2\big)^2$.

    Args:
        lam: variances, not negative.
        a: what is added, not negative, of a shape that fits.

    Returns:
        Values between $\lambda+a$ and $\lambda+2a$.

    Raises:
        ValueError: a negative argument or one that is not finite.

    Source: Theorems 5 and 6 in one.
    """
    lam, a = lam.double(), torch.as_tensor(a, dtype=torch.float64, device=lam.device)
    if not (_valid(lam) and _valid(a)):
        raise ValueError("h needs finite values that are not negative")
    return ((lam.sqrt() + (lam + 4 * a).sqrt()) / 2).square()


def saddle(
    var: Float[Tensor, "... d"], L: float | Tensor, w: Float[Tensor, "... d"] | None = None
) -> Float[Tensor, "... d"]:
    r"""Adversarial training's solution: eigenvalues $\lambda'_i=h(\lambda^{(j)}_i,w_i/L)$.

    They minimize the risk under the best attack over *all* means and covariances; mean and
    eigenvectors are those of the data. With eigenvalues of a sample covariance and the gains of its
    PPCA fit this is the solution for finite samples as well.

    Args:
        var: (..., d) variances $\lambda^{(j)}$ of the points that are attacked. Where one is 0 and
            so is its gain, so is the result: then there is no minimum, only an infimum (E10).
        L: multiplier at the saddle point; any positive number. It is not the multiplier of the
            same budget for the attack on the data's own law.
        w: (..., d) gains; None for pixels.

    Returns:
        (..., d) eigenvalues, the variances of the attacked points as well.

    Raises:
        ValueError: a multiplier that is not positive, or negative values.

    Source: Theorem 5 (latent), 6 (pixels), 9 (finite samples).
    """
    var, w = _pair(var, w)
    return h(var, w / _positive(L, "L", var))


def saddle_budget(
    var: Float[Tensor, "... d"], L: float | Tensor, w: Float[Tensor, "... d"] | None = None
) -> Float[Tensor, "..."]:
    r"""Mean square of the best attack at the saddle point, $\sum_iw_i/(L^2\lambda'_i)$.

    Args:
        var: (..., d) variances of the points that are attacked.
        L: multiplier at the saddle point.
        w: (..., d) gains; None for pixels.

    Returns:
        (...) values $\epsilon^2$, which fall as ``L`` grows; the inverse is ``saddle_multiplier``.

    Raises:
        ValueError: as ``saddle``.

    Source: follows from Theorems 5 and 6.
    """
    var, w = _pair(var, w)
    L = _positive(L, "L", var)
    return torch.where(w > 0, w / (L.square() * h(var, w / L)), 0).sum(dim=-1)


def saddle_multiplier(
    var: Float[Tensor, "... d"], eps: float | Tensor, w: Float[Tensor, "... d"] | None = None
) -> Float[Tensor, "..."]:
    r"""The multiplier at the saddle point of adversarial training with a budget $\epsilon$.

    Args:
        var: (..., d) variances of the points that are attacked.
        eps: root mean square $\epsilon$ of the perturbation, positive, a number or (...).
        w: (..., d) gains, not all zero; None for pixels.

    Returns:
        (...) multipliers, positive.

    Raises:
        ValueError: a budget that is not positive, gains that are all zero, or negative values.

    Source: follows from Theorems 5 and 6.
    """
    var, w = _pair(var, w)
    if not (w > 0).any(dim=-1).all():
        raise ValueError("saddle_multiplier needs a positive gain")
    size = _positive(eps, "eps", var)
    # One direction alone would need a = 1/L = eps^2 + eps sqrt(var/w); d of them need less, but no
    # less than a/d, since what each uses grows faster than a.
    alone = size.square() + size * torch.where(w > 0, var / w, math.inf).sqrt()
    high = alone.amin(dim=-1, keepdim=True)

    def short(a: Tensor) -> Tensor:
        return saddle_budget(var, 1 / a[..., 0], w)[..., None] < size.square()

    return 1 / _bisect(short, high / w.shape[-1], high)[..., 0]


def amplification(
    lam: Float[Tensor, "... d"],
    L: float | Tensor,
    w: Float[Tensor, "... d"] | None = None,
    var: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... d"]:
    r"""By what adversarial training multiplies each eigenvalue, $\lambda'_i/\lambda_i$.

    Args:
        lam: (..., d) eigenvalues of the data, positive.
        L: multiplier at the saddle point.
        w: (..., d) gains; None for pixels.
        var: (..., d) variances of the points that are attacked; by default ``lam``.

    Returns:
        (..., d) ratios.

    Raises:
        ValueError: as ``saddle``, or an eigenvalue that is not positive (E9).

    Source: remarks after Theorems 5 and 6.
    """
    lam, _ = _positive_pair(lam, w)
    return saddle(_variance(lam, var), L, w) / lam


def augmented(lam: Float[Tensor, "... d"], k: int, n: float, m: float) -> Float[Tensor, "... d"]:
    r"""Data augmentation: eigenvalues after training on ``n`` samples and ``m`` generated ones.

    The PPCA fit of the samples generates. The leading $k$ stay, the others move towards their mean:
    $\lambda^{da}_i=\frac n{n+m}\lambda_i+\frac m{n+m}\sigma^2$ for $i>k$.

    Args:
        lam: (..., d) eigenvalues of the sample covariance, decreasing.
        k: latent dimension.
        n: weight of the samples, positive.
        m: weight of the generated ones, 0 to infinity (which gives the PPCA model itself).

    Raises:
        ValueError: a weight out of range; spectra as in ``noise``.

    Source: Theorem 8, appendix C.
    """
    if not (0 < n < math.inf and m >= 0):
        raise ValueError(f"n must be positive and m at least 0, not {n} and {m}")
    share = 1.0 if m == math.inf else m / (n + m)
    return (1 - share) * lam.double() + share * decoded(lam, k, 3)


# ---------------------------------------------------------------------------------- the classifier


def linear_accuracy(
    c: Float[Tensor, " d"],
    mu: Float[Tensor, " d"],
    Sigma: Float[Tensor, "d d"],
    *,
    eps: float = 0.0,
    norm: Norm = "l2",
    W: Float[Tensor, "d k"] | None = None,
) -> float:
    r"""Accuracy of $\mathrm{sgn}\,c^\top x$ on the mixture $x\mid y\sim\mathcal N(y\mu,\Sigma)$.

    Every point is attacked in the worst direction for the decision: the accuracy is
    $\Phi\big((c^\top\mu-\epsilon\|B^\top c\|_q)/\sqrt{c^\top\Sigma c}\big)$, with the normal
    distribution function $\Phi$ and the dual exponent $q$ of ``norm``.

    Args:
        c: (d,) the rule, not zero.
        mu: (d,) mean of the class 1; that of the class -1 is ``-mu``.
        Sigma: (d, d) covariance of a class; for a latent attack that of the decoded points.
        eps: budget of each point, zero or more.
        norm: of the budget, p >= 1.
        W: $B$, the decoder, for an attack on the latent code; None moves pixels, $B=I$.

    Returns:
        A probability in [0, 1].

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a negative or infinite
            ``eps``, a norm without a dual one, or no variance along ``c``.

    Source: not in the source; follows from its Theorems 5 and 6. Chapter ``gaussian``.
    """
    c, mu, Sigma = c.double(), mu.double(), Sigma.double()
    d = len(c)
    if mu.shape != (d,) or Sigma.shape != (d, d) or (W is not None and len(W) != d):
        raise ValueError(f"c, mu, Sigma and W must be (d,), (d,), (d, d) and (d, k); c is ({d},)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, not {eps}")
    if not all(t.isfinite().all() for t in (c, mu, Sigma, *([] if W is None else [W]))):
        raise ValueError("c, mu, Sigma and W must be finite")
    spread = c @ Sigma @ c
    if not spread > 0:
        raise ValueError("c must have variance: is it zero, or outside the data's support?")
    steep = c if W is None else c @ W.double()
    shift = eps * dual_norm(steep[None], norm)[0]
    return float(torch.special.ndtr((c @ mu - shift) / spread.sqrt()))


# ------------------------------------------------------------------------------------------ checks


def _check_strategy(strategy: int) -> None:
    if strategy not in (1, 2, 3):
        raise ValueError(f"strategy must be 1, 2 or 3, not {strategy!r}")


def _check_latent(lam: Tensor, k: int) -> None:
    if not isinstance(k, Integral) or not 1 <= k <= lam.shape[-1]:
        raise ValueError(f"k must be an integer in 1..{lam.shape[-1]}, not {k}")
    if not _valid(lam) or (lam.diff(dim=-1) > 0).any():
        raise ValueError("lam must be finite, not negative, and in decreasing order")


def _valid(values: Tensor) -> bool:
    return bool((values.isfinite() & (values >= 0)).all())


def _positive(value: float | Tensor, name: str, like: Tensor) -> Tensor:
    """The value with an axis for the eigenvalues, float64."""
    value = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if not (value > 0).all() or not value.isfinite().all():
        raise ValueError(f"{name} must be positive and finite, not {value.tolist()}")
    return value[..., None]


def _pair(lam: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two spectra of one shape, float64; gains of 1 where none are given."""
    lam = lam.double()
    w = torch.ones_like(lam) if w is None else w.double()
    if lam.ndim == 0 or lam.shape[-1:] != w.shape[-1:]:
        raise ValueError(f"spectra must agree, not {tuple(lam.shape)} and {tuple(w.shape)}")
    lam, w = torch.broadcast_tensors(lam, w)
    if not (_valid(lam) and _valid(w)):
        raise ValueError("eigenvalues and gains must be finite and not negative")
    return lam, w


def _variance(lam: Tensor, var: Tensor | None) -> Tensor:
    return lam.double() if var is None else _pair(var, lam)[0]


def _positive_pair(lam: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    lam, w = _pair(lam, w)
    if not (lam > 0).all():
        raise ValueError("eigenvalues must be positive: restrict a singular law to its support")
    return lam, w


def _above(L: float | Tensor, lam: Tensor, w: Tensor) -> Tensor:
    """The multiplier with an axis for the eigenvalues, if the attack has a maximum there."""
    L = _positive(L, "L", lam)
    if not (L * lam > w).all():
        raise ValueError(f"L must exceed max(w / lam), here up to {float((w / lam).max()):.6g}")
    return L


def _length(values: Tensor) -> Tensor:
    return values.norm(dim=-1, keepdim=True)


def _bisect(
    below: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 60
) -> Tensor:
    """Where ``below`` turns from true to false, to float64's precision."""
    low, high = torch.broadcast_tensors(low, high)
    for _ in range(steps):
        middle = (low + high) / 2
        inside = below(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (low + high) / 2
