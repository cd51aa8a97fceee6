r"""Margin maximization: the hinge loss and a price for the sensitivity of the margin.

To first order a point's distance from the decision boundary is its margin over the dual norm of
the margin's gradient. The losses here keep the margins above 1 and these norms small. Each factory
returns a loss ``(model, x, y) -> scalar`` for ``adv.lab.training.fit``; the gradient of a network's
gradient is taken for one class of each sample only, the one that attains the maximum.

The losses are called at every step of a training and check no values: as with PyTorch's own, a
label out of range is an ``IndexError``, and the mean over an empty batch is NaN.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from adv.attacks.common import Loss as Values
from adv.attacks.common import Model, check_labels, check_number, leaf, margin, row_products
from adv.attacks.common import objective as named
from adv.geometry import Norm, dual_norm, exponent

__all__ = [
    "contractive",
    "double_backpropagation",
    "hinge",
    "margin_loss",
    "sensitivities",
    "sensitivity",
]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Form = Literal["surrogate", "linear"]

# So many gradients of a batch are held at once: the memory of a pass does not grow with K.
CLASSES_AT_ONCE = 16


# ------------------------------------------------------------------------------------ the margin


def hinge(model: Model, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    r"""Multiclass hinge loss of Crammer and Singer, mean of $(1+\max_{j\ne y}f_j-f_y)_+$.

    Args:
        model: ``(B, ...) -> (B, K)`` logits.
        x: (B, ...) inputs.
        y: (B,) labels.

    Returns:
        A scalar, 0 where every sample's margin is 1 at least.

    Source: Crammer and Singer (2001); Matyasko (2020), (3.19); chapter ``margin``.
    """
    return _hinge(model(x), y).mean()


def _hinge(logits: Tensor, y: Tensor) -> Tensor:
    return (1 - margin(logits, y)).clamp_min(0)


def margin_loss(
    weight: float,
    *,
    norm: Norm = "l2",
    power: Literal[1, 2] = 1,
    form: Form = "surrogate",
    loss: Literal["hinge", "ce"] | Values = "hinge",
) -> Loss:
    r"""Deep margin maximization: the hinge loss with a price on the largest gradient difference.

    With $a_j=1+f_j-f_y$, $n_j=\|\nabla_xf_y-\nabla_xf_j\|_q$ and $1/p+1/q=1$, the mean over the
    batch of

    - ``"surrogate"``: $(\max_{j\ne y}a_j)_++C\max_{j\ne y}n_j^s$, the objective of the source;
    - ``"linear"``: $\max_{j\ne y}(a_j+Cn_j)_+$, the hinge loss of the linearized model at the worst
      perturbation of norm $C$. It is never larger than the surrogate (at $s=1$), and asks nothing
      of samples whose linearized margin is 1 at distance $C$.

    Only with $s=1$ is $C$ a radius, in the units of ``x``. A ReLU network's gradient does not feel
    its biases, so the price never moves them.

    Attention's fused kernels have no second derivative: train such networks inside
    ``sdpa_kernel(SDPBackend.MATH)`` of ``torch.nn.attention``.

    Args:
        weight: $C\ge0$.
        norm: the norm $p$ of the *perturbation*: ``"l2"``, ``"linf"`` (which prices the l1 norm of
            the gradients), ``"l1"``, or any number $p\ge1$.
        power: $s$, 1 or 2; 2 is what the source's program does for ``"l2"``.
        form: which of the two.
        loss: of the surrogate, beside the price: ``"hinge"``, ``"ce"``, or a function
            ``(logits, y) -> (B,)``.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: a negative weight, an unknown norm, power, form or loss.

    Source: Matyasko (2020), (3.18)-(3.19) as corrected by E1, Theorem 3.4.2; chapter ``margin``.
    """
    check_number("weight", weight)
    exponent(norm)
    if power not in (1, 2):
        raise ValueError(f"power is 1 or 2, not {power!r}")
    if form not in ("surrogate", "linear"):
        raise ValueError(f"form is 'surrogate' or 'linear', not {form!r}")
    if form == "linear" and (power != 1 or loss != "hinge"):
        raise ValueError("the linear form has power=1 and loss='hinge'")
    value = _hinge if loss == "hinge" else named(loss)

    def surrogate(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if weight == 0:
            return value(model(x), y).mean()
        logits, z = _record(model, x)
        j = _lengths(logits, z, y, norm).argmax(dim=1)
        price = _length(logits, z, y, j, norm).pow(power)
        return (value(logits, y) + weight * price).mean()

    def linear(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, z = _record(model, x)
        short = 1 + logits - logits.gather(1, y[:, None])
        worth = short.detach() + weight * _lengths(logits, z, y, norm)
        j = worth.scatter(1, y[:, None], -torch.inf).argmax(dim=1)
        worst = short.gather(1, j[:, None]).squeeze(1) + weight * _length(logits, z, y, j, norm)
        return worst.clamp_min(0).mean()

    return surrogate if form == "surrogate" else linear


def sensitivity(
    model: Model, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"], norm: Norm = "l2"
) -> Float[Tensor, " B"]:
    r"""Margin sensitivity $\max_{j\ne y}\|\nabla_xf_y-\nabla_xf_j\|_q$, ready to be differentiated.

    All K gradients are taken in one vectorized pass that is not recorded; a second backward pass,
    recorded, gives the one difference that is largest. Where the largest is attained once, value
    and gradient are those of the maximum.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, samples not interacting.
        x: (B, ...) inputs.
        y: (B,) labels.
        norm: the norm $p$ of the perturbation; the gradients are measured in its dual.

    Returns:
        (B,) values with a graph to the model's parameters, also under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: an unknown norm; inputs or logits that are not finite; labels out of
            range, not int64 or not one for each sample; no logits (B, K) with K >= 2.

    Source: Matyasko (2020), section 3.4; chapter ``margin``.
    """
    exponent(norm)
    logits, z = _checked(model, x, y)
    return _length(logits, z, y, _lengths(logits, z, y, norm).argmax(dim=1), norm)


def sensitivities(
    model: Model, x: Float[Tensor, "B ..."], y: Int[Tensor, " B"], norm: Norm = "l2"
) -> Float[Tensor, "B K"]:
    r"""$\|\nabla_xf_y-\nabla_xf_j\|_q$ for every class $j$; 0 at $j=y$; not to be differentiated.

    Args:
        model: ``(B, ...) -> (B, K)`` logits, samples not interacting.
        x: (B, ...) inputs.
        y: (B,) labels.
        norm: the norm $p$ of the perturbation; the gradients are measured in its dual.

    Returns:
        (B, K) norms, in logits per unit of ``x``.

    Raises:
        TypeError, ValueError: an unknown norm; inputs or logits that are not finite; labels out of
            range, not int64 or not one for each sample; no logits (B, K) with K >= 2.

    Source: Matyasko (2020), (3.15)-(3.17); chapter ``margin``.
    """
    exponent(norm)
    return _lengths(*_checked(model, x, y), y, norm)


# ------------------------------------------------------------------------------------- baselines


def double_backpropagation(weight: float) -> Loss:
    r"""Double backpropagation: $\mathrm{CE}+\lambda\,\|\nabla_x\mathrm{CE}\|_2^2$, a batch mean.

    Args:
        weight: $\lambda\ge0$.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: a negative weight.

    Source: Drucker and LeCun (1992); chapter ``margin``.
    """
    check_number("weight", weight)

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, z = _record(model, x)
        with torch.enable_grad():
            value = functional.cross_entropy(logits, y, reduction="none")
            (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
            return (value + weight * gradient.to(value).square().flatten(1).sum(dim=1)).mean()

    return total


def contractive(weight: float) -> Loss:
    r"""Contractive penalty: $\mathrm{CE}+\lambda\,\|J\|_F^2$, $J=\partial f/\partial x$, a mean.

    All rows of $J$ are differentiated again, so that memory and time grow with the number of
    classes.

    Args:
        weight: $\lambda\ge0$.

    Returns:
        ``(model, x, y) -> scalar``.

    Raises:
        TypeError, ValueError: a negative weight.

    Source: Rifai et al. (2011), (1), of an encoder; here of the logits; chapter ``margin``.
    """
    check_number("weight", weight)

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, z = _record(model, x)
        rows = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        rows = rows[:, None].expand(-1, len(z), -1)
        squares = (
            row_products(logits, z, rows, create_graph=True).square().flatten(2).sum(dim=(0, 2))
        )
        return (functional.cross_entropy(logits, y, reduction="none") + weight * squares).mean()

    return total


# ------------------------------------------------------------------------------------- gradients


def _record(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (float32 or wider), and the leaf tensor to differentiate them with respect to."""
    with torch.enable_grad():
        z, given = leaf(x)
        logits = model(given)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"the model must return logits (B, K >= 2), not {tuple(logits.shape)}")
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), z


def _checked(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_record``, of inputs and labels that make sense."""
    check_labels(x, y)
    logits, z = _record(model, x)
    known = (y >= 0) & (y < logits.shape[1])
    finite = torch.cat([x.flatten(1), logits], dim=1).isfinite().all(dim=1)
    if not bool((known & finite).all()):
        if bool(known.all()):
            raise ValueError("x or the model's logits are not finite")
        first, last = int(y.min()), int(y.max())
        raise ValueError(f"labels lie in 0..{logits.shape[1] - 1}, but y spans {first}..{last}")
    return logits, z


def _lengths(logits: Tensor, z: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """(B, K) dual norms of all gradient differences, as constants."""
    unit = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    parts = []
    for some in unit.split(CLASSES_AT_ONCE):
        differences = row_products(logits, z, unit[y] - some[:, None])
        parts.append(dual_norm(differences.flatten(0, 1), norm).view(len(some), -1))
    return torch.cat(parts).T


def _length(logits: Tensor, z: Tensor, y: Tensor, j: Tensor, norm: Norm) -> Tensor:
    """(B,) dual norms of the gradient differences with classes ``j``, recorded."""
    with torch.enable_grad():
        lead = logits.gather(1, y[:, None]) - logits.gather(1, j[:, None])
        (gradient,) = torch.autograd.grad(lead.sum(), z, create_graph=True)
        return dual_norm(gradient, norm)
