r"""Attacks on an encoder of two layers, taken apart in closed form.

The encoder is $\Phi\,\mathrm{ReLU}(D^\top x)$. A perturbation $\delta_0$ that makes a source's code
like a target's is found numerically; once it is known which hidden units are on, the adversarial
input is a sum of two linear pieces, one that depends on the target alone (informative) and one on
the source (nuisance). That is exact in two settings: an attack that is optimal in the hidden space,
which is a convex problem (``hidden_attack``), and one that is optimal in the input, with a term for
units that rest at the kink of the ReLU (``input_attack``). Shapes: ``d`` (n, m) has the atoms as
columns, ``phi`` is (M, m), an input (n,), a hidden vector (m,), a code (M,). All have one dtype,
float64 where results are to be right to more than about six digits, and one device; the attacks are
outside any graph.

Source: "Understanding Adversarial Attacks on Autoencoders", section 5 and appendix A, with the
corrections E8 to E18; chapter ``autoencoders``.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize, nnls
from torch import Tensor

__all__ = ["HiddenAttack", "InputAttack", "encode", "hidden_attack", "input_attack"]

SHARPNESS = (5.0, 20.0, 100.0, 500.0, 3000.0)
"""Of the softplus that stands for the ReLU, one after the other."""
NEAR = tuple(10.0**-k for k in range(1, 7))
"""How near to its kink, relative to the largest, a unit is tried as being at it."""
ROUNDING = 1e-9
"""What counts as zero of the forces at a kink, relative to 1 and to themselves."""


class HiddenAttack(NamedTuple):
    """An attack that is optimal in the hidden space, made in the input.

    Args:
        delta: (n,) the perturbation of the input, the shortest that does it.
        hidden: (m,) the hidden vector it leads to.
        on: (m,) which units are on there.
        slack: (m,) how far below its kink each other unit is; 0 for those that are on.
        informative: (n,) the piece that depends on the target.
        nuisance: (n,) the piece that depends on the source; the two add up to the adversarial
            input.
    """

    delta: Float[Tensor, " n"]
    hidden: Float[Tensor, " m"]
    on: Bool[Tensor, " m"]
    slack: Float[Tensor, " m"]
    informative: Float[Tensor, " n"]
    nuisance: Float[Tensor, " n"]


class InputAttack(NamedTuple):
    """An attack that is optimal in the input, within its pattern of active units.

    Args:
        delta: (n,) the perturbation of the input.
        on: (m,) which units are on.
        kink: (m,) which are exactly at their kink.
        informative: (n,) the piece that depends on the target.
        nuisance: (n,) the piece that depends on the source; the two add up to the adversarial
            input.
        value: the objective there.
    """

    delta: Float[Tensor, " n"]
    on: Bool[Tensor, " m"]
    kink: Bool[Tensor, " m"]
    informative: Float[Tensor, " n"]
    nuisance: Float[Tensor, " n"]
    value: float


def encode(
    d: Float[Tensor, "n m"], phi: Float[Tensor, "M m"], x: Float[Tensor, "... n"]
) -> Float[Tensor, "... M"]:
    r"""The code $\Phi\,\mathrm{ReLU}(D^\top x)$ of inputs.

    Args:
        d: (n, m) atoms.
        phi: (M, m) the second layer.
        x: (..., n) inputs.

    Returns:
        (..., M) codes.
    """
    return torch.relu(x @ d) @ phi.T


def hidden_attack(
    d: Float[Tensor, "n m"],
    phi: Float[Tensor, "M m"],
    x_s: Float[Tensor, " n"],
    x_t: Float[Tensor, " n"],
    *,
    lam: float,
) -> HiddenAttack:
    r"""Move the hidden vector as well as possible, then find an input that does that.

    First $\min_{h\ge0}\|\Phi h-Y_t\|^2+\lambda\|h-\Gamma_s\|^2$, nonnegative least squares. Then
    the shortest $\delta_0$ with $D^\top(x_s+\delta_0)=h-\xi$, where the slack $\xi\ge0$ is zero for
    the units that are on: least squares again. The pieces are those of (5.4),

    $$x_s+\delta_0=M_DE_IM_I\Phi\Gamma_t+\big(x_s-M_D(D^\top x_s-E_I(\Gamma_s[I]-M_I\Phi_I
    \Gamma_s[I])+\xi)\big).$$

    Args:
        d: (n, m) atoms, linearly independent.
        phi: (M, m) the second layer.
        x_s: (n,) source.
        x_t: (n,) target.
        lam: weight of the change of the hidden vector, positive.

    Returns:
        The attack, its active units and its pieces.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, dependent atoms, or ``lam``
            not positive.

    Source: (5.1) to (5.4), (A.1) to (A.16), corrected by E9 to E17.
    """
    d, phi, x_s, x_t = _plain(d, phi, x_s, x_t, lam)
    if torch.linalg.matrix_rank(d) < d.shape[1]:
        raise ValueError("the atoms must be linearly independent: not every h can be reached")
    gamma_s, code = torch.relu(x_s @ d), encode(d, phi, x_t)
    root = math.sqrt(lam)
    rows = torch.cat([phi, root * torch.eye(len(gamma_s)).to(phi)])
    hidden = _nonnegative(rows, torch.cat([code, root * gamma_s]))
    on = hidden > 0
    m_d = torch.linalg.pinv(d.T)  # the shortest input for given values of the atoms
    wanted, slack = hidden - x_s @ d, torch.zeros_like(hidden)
    slack[~on] = _nonnegative(m_d[:, ~on], m_d @ wanted)
    delta = m_d @ (wanted - slack)

    phi_on = phi[:, on]
    ridge = phi_on.T @ phi_on + lam * torch.eye(phi_on.shape[1]).to(phi)
    m_on = torch.linalg.solve(ridge, phi_on.T)
    lift = m_d[:, on]  # M_D E_I
    informative = lift @ (m_on @ code)
    kept = lift @ (gamma_s[on] - m_on @ (phi_on @ gamma_s[on]))
    nuisance = x_s - m_d @ (x_s @ d) + kept - m_d @ slack
    return HiddenAttack(delta, hidden, on, slack, informative, nuisance)


def input_attack(
    d: Float[Tensor, "n m"],
    phi: Float[Tensor, "M m"],
    x_s: Float[Tensor, " n"],
    x_t: Float[Tensor, " n"],
    *,
    lam: float,
    starts: int = 4,
    seed: int = 0,
) -> InputAttack:
    r"""Minimize $\|\Phi\,\mathrm{ReLU}(D^\top w)-Y_t\|^2+\lambda\|w-x_s\|^2$ over inputs $w$.

    L-BFGS with a softplus that is sharpened step by step, from ``x_s`` and points around it. Where
    it ends, units are read off as on, off or at their kink, and the quadratic program of that
    pattern is solved: with $A=\Phi_{on}D_{on}^\top$, $H=A^\top A+\lambda I$ and the projection
    $\Pi=I-H^{-1}D_Z(D_Z^\top H^{-1}D_Z)^{-1}D_Z^\top$ that holds the units $Z$ at their kinks,

    $$w=\lambda\,\Pi H^{-1}x_s+\Pi H^{-1}A^\top Y_t.$$

    A pattern counts only if its solution has it and no unit at a kink could gain by leaving.

    Args:
        d: (n, m) atoms.
        phi: (M, m) the second layer.
        x_s: (n,) source.
        x_t: (n,) target.
        lam: weight of the change of the input, positive.
        starts: how many starts, the first at ``x_s``.
        seed: of the others.

    Returns:
        The best local minimum found. The problem is not convex, so a better one may exist.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, or ``lam`` not positive.
        RuntimeError: no start led to a consistent pattern.

    Source: the corrected form of section 5 and appendix A (E12, E14).
    """
    d, phi, x_s, x_t = _plain(d, phi, x_s, x_t, lam)
    if starts < 1:
        raise ValueError(f"starts must be at least 1, not {starts}")
    code, draws = encode(d, phi, x_t), torch.Generator().manual_seed(seed)
    best: InputAttack | None = None
    for k in range(starts):
        noise = torch.randn(len(x_s), generator=draws, dtype=x_s.dtype).to(x_s.device)
        w = _descend(d, phi, x_s, code, lam, x_s + (0.3 if k else 0.0) * noise)
        for near in NEAR:
            found = _pattern(d, phi, x_s, code, lam, w, near)
            if found is not None and (best is None or found.value < best.value):
                best = found
    if best is None:
        raise RuntimeError(
            "no consistent pattern of active units was found; try more starts, or inputs that do "
            "not leave all units at their kinks, as 0 does"
        )
    return best


def _descend(d: Tensor, phi: Tensor, x_s: Tensor, code: Tensor, lam: float, w: Tensor) -> Tensor:
    """A local minimum of the smoothed objective, as sharp as it gets."""
    for sharpness in SHARPNESS:

        def objective(v: np.ndarray, beta: float = sharpness) -> tuple[float, np.ndarray]:
            z = torch.from_numpy(v).to(x_s)
            pre = z @ d
            rest = torch.nn.functional.softplus(pre, beta=beta) @ phi.T - code
            slope = 2 * d @ (torch.sigmoid(beta * pre) * (rest @ phi)) + 2 * lam * (z - x_s)
            return float(rest @ rest + lam * (z - x_s) @ (z - x_s)), slope.cpu().numpy()

        result = minimize(objective, w.cpu().numpy(), jac=True, method="L-BFGS-B", tol=1e-14)
        w = torch.from_numpy(result.x).to(w)
    return w


def _pattern(
    d: Tensor, phi: Tensor, x_s: Tensor, code: Tensor, lam: float, w: Tensor, near: float
) -> InputAttack | None:
    """The minimum within the pattern of ``w``, or None where the two don't agree."""
    pre = w @ d
    scale = float(pre.abs().max())
    kink = pre.abs() <= near * scale
    on = (pre > 0) & ~kink
    a, d_z = phi[:, on] @ d[:, on].T, d[:, kink]
    h = a.T @ a + lam * torch.eye(len(x_s)).to(x_s)
    pieces = torch.linalg.solve(h, torch.stack([lam * x_s, a.T @ code], dim=1))
    if d_z.shape[1]:
        if torch.linalg.matrix_rank(d_z) < d_z.shape[1]:
            return None
        across = torch.linalg.solve(h, d_z)
        pieces = pieces - across @ torch.linalg.solve(d_z.T @ across, d_z.T @ pieces)
    nuisance, informative = pieces.unbind(dim=1)
    point = nuisance + informative
    pre = point @ d
    if bool((pre[on] <= 0).any() or (pre[~on & ~kink] >= 0).any()):
        return None
    rest = a @ point - code
    if d_z.shape[1]:
        # At a kink, the slope towards off is the force that holds the unit there; towards on it is
        # the unit's own pull less this force. Where one is negative, the unit gains by leaving.
        force = torch.linalg.lstsq(d_z, -(a.T @ rest + lam * (point - x_s))[:, None]).solution[:, 0]
        pull = phi[:, kink].T @ rest
        slack = ROUNDING * (1 + force.abs() + pull.abs())
        if bool(((force < -slack) | (force > pull + slack)).any()):
            return None
    value = float(rest @ rest + lam * (point - x_s) @ (point - x_s))
    return InputAttack(point - x_s, on, kink, informative, nuisance, value)


def _nonnegative(rows: Tensor, target: Tensor) -> Tensor:
    if not rows.shape[1]:
        return rows.new_zeros(0)
    return torch.from_numpy(nnls(rows.cpu().numpy(), target.cpu().numpy())[0]).to(rows)


def _plain(
    d: Tensor, phi: Tensor, x_s: Tensor, x_t: Tensor, lam: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four outside any graph, if they fit."""
    n, m = d.shape
    if phi.ndim != 2 or phi.shape[1] != m or x_s.shape != (n,) or x_t.shape != (n,):
        raise ValueError(
            f"with atoms (n, m) = {(n, m)}, phi must be (M, {m}) and inputs ({n},), not "
            f"{tuple(phi.shape)}, {tuple(x_s.shape)} and {tuple(x_t.shape)}"
        )
    if not 0 < lam < math.inf:
        raise ValueError(f"lam must be positive and finite, not {lam}")
    if not all(bool(t.isfinite().all()) for t in (d, phi, x_s, x_t)):
        raise ValueError("atoms, phi and inputs must be finite")
    if any(t.dtype != d.dtype or t.device != d.device for t in (phi, x_s, x_t)):
        given = ", ".join(f"{t.dtype} on {t.device}" for t in (d, phi, x_s, x_t))
        raise ValueError(f"atoms, phi and inputs must have one dtype and one device, not {given}")
    return d.detach(), phi.detach(), x_s.detach(), x_t.detach()
