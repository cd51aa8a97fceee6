r"""Derivatives through an argmin, and a solver for one that is asked again and again.

For codes $z^*(x)=\arg\min_zl(z;x)$ and a gradient $v$ with respect to them, ``implicit_gradient``
solves the linear system of the implicit function theorem, ``neumann_gradient`` sums $T'$ terms of
its series, and ``unroll`` records $T'$ steps of plain gradient descent, which hands back the same.
``WarmStart`` solves for nearby inputs from its last answers. What makes models and attacks of these
is ``adaptive``. The inner loss $l$ and solvers are callables, so that nothing here knows a
particular defense; losses of different samples must not interact, and networks inside the callables
are in evaluation mode.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adv.attacks.common import (
    check_count,
    check_number,
    check_positive,
    check_whole,
    expand,
    plain,
    recording,
    settled,
)

__all__ = ["Implicit", "WarmStart", "implicit_gradient", "neumann_gradient", "unroll"]

Inner = Callable[[Tensor, Tensor], Tensor]
"""$l$: codes z (B, ...) and inputs x (B, ...) to (B,) losses of samples that don't interact."""
Refine = Callable[[Tensor, Tensor], Tensor]
"""Codes and inputs to better codes."""
Solver = Callable[[Tensor], Tensor]
"""Inputs to codes, by whatever means."""


def unroll(
    inner: Inner,
    z: Float[Tensor, "B ..."],
    x: Float[Tensor, "B ..."],
    *,
    steps: int,
    step_size: float,
) -> Float[Tensor, "B ..."]:
    r"""Plain gradient descent on the inner loss, recorded, so that the result knows of $x$.

    $z^{t+1}=z^t-\eta'\nabla_zl(z^t;x)$ from a constant $z^0$. Started at a minimizer nothing moves,
    and the derivative by $x$ is the Neumann series $\sum_{t<T'}BA^t$ of the implicit one. The
    memory grows with the number of steps.

    Args:
        inner: $l(z;x)$, codes and inputs to (B,), twice differentiable.
        z: (B, ...) first codes; where they come from is forgotten.
        x: (B, ...) inputs, in whatever graph they are.
        steps: $T'$, at least 0.
        step_size: $\eta'>0$; the series converges for $\eta'<2/\lambda_{\max}$ of the Hessian.

    Returns:
        (B, ...) codes $z^{T'}$, in the graph of ``x``.

    Raises:
        TypeError, ValueError: a negative number of steps, a step size that isn't positive.

    Source: Chen, Xie and Zhu (2020), (5) to (8) as corrected by E1 and E5; chapter ``generative``.
    """
    check_whole("steps", steps)
    check_positive("step_size", step_size)
    record = torch.is_grad_enabled() and x.requires_grad
    with recording():
        z, x = plain(z), x.clone() if x.is_inference() else x
        for _ in range(steps):
            z = z if z.requires_grad else z.requires_grad_()
            (g,) = torch.autograd.grad(inner(z, x).sum(), z, create_graph=record)
            z = z - step_size * g if record else (z - step_size * g).detach()
    return z


class Implicit(NamedTuple):
    """A gradient through an argmin, and how far to trust it.

    Args:
        gradient: (B, ...) with respect to the inputs.
        residual: (B,) what is left of the linear system, relative to its right side.
        curvature: (B,) the smallest curvature met; where it isn't positive, the codes are no
            strict minimum, and the solution was stopped there.
        products: how many products with the Hessian were made.
    """

    gradient: Tensor
    residual: Tensor
    curvature: Tensor
    products: int


def implicit_gradient(
    inner: Inner,
    z: Float[Tensor, "B ..."],
    x: Float[Tensor, "B ..."],
    v: Float[Tensor, "B ..."],
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    damping: float = 0.0,
) -> Implicit:
    r"""Pull a gradient with respect to $z^*$ back to the inputs, by the implicit function theorem.

    $-M^\top u$ with $(H+\tau I)u=v$, where $H=\nabla^2_{zz}l$ and $M=\partial^2l/\partial z\partial
    x$: conjugate gradients on Hessian-vector products, each of them one backward pass through the
    same graph, so that the memory does not grow with their number.

    Args:
        inner: $l(z;x)$, codes and inputs to (B,), twice differentiable.
        z: (B, ...) minimizers $z^*(x)$.
        x: (B, ...) inputs.
        v: (B, ...) gradients with respect to the codes, shaped like ``z``.
        iterations: at most; in exact arithmetic as many as a code has entries suffice.
        tolerance: a sample is done when its residual is this small, relative to ``v``.
        damping: $\tau\ge0$.

    Returns:
        Gradient, residual, smallest curvature met, and number of products.

    Raises:
        TypeError, ValueError: no iterations, a negative tolerance or damping, ``v`` of another
            shape than ``z``.

    Source: Chen, Xie and Zhu (2020), (1); chapter ``generative``.
    """
    check_count("iterations", iterations)
    check_number("tolerance", tolerance)
    check_number("damping", damping)
    graph = _Graph(inner, z, x, v)
    # Squares of small gradients would underflow. By a power of two nothing is rounded.
    top = v.flatten(1).abs().amax(dim=1)
    scale = torch.where(top > 0, top / (2 * top.frexp().mantissa), 1.0)
    v = v / expand(scale, v)
    u, r, p = torch.zeros_like(v), v.clone(), v.clone()
    size, rr = _dot(v, v), _dot(v, v)
    active = rr > 0
    curvature, products = torch.full_like(rr, math.inf), 0
    for step in range(iterations):
        if settled(~active, step):
            break
        hp, pp = graph.product(p) + damping * p, _dot(p, p)
        products += 1
        bend = _dot(p, hp)
        curvature = torch.where(active, torch.minimum(curvature, bend / pp), curvature)
        if step == 0:  # where the first direction bends down, it is all there is to follow
            u = torch.where(expand(bend > 0, u), u, v)
        active = active & (bend > 0)
        length = torch.where(active, rr / bend, 0.0)
        u, r = u + expand(length, p) * p, r - expand(length, hp) * hp
        new = _dot(r, r)
        active = active & (new > tolerance**2 * size)
        p = torch.where(expand(active, p), r + expand(new / rr, p) * p, p)
        rr = torch.where(active, new, rr)
    residual = _dot(r, r).sqrt() / size.sqrt().where(size > 0, 1.0)
    return Implicit(graph.pull(expand(scale, u) * u), residual, curvature, products)


def neumann_gradient(
    inner: Inner,
    z: Float[Tensor, "B ..."],
    x: Float[Tensor, "B ..."],
    v: Float[Tensor, "B ..."],
    *,
    steps: int,
    step_size: float,
) -> Float[Tensor, "B ..."]:
    r"""What ``unroll`` from a minimizer hands back to the inputs, in constant memory.

    $u_{k+1}=u_k+\eta'(v-Hu_k)$ from $u_0=0$, then $-M^\top u_{T'}$. In the eigenbasis of $H$ the
    inverse $1/\lambda$ has become $(1-(1-\eta'\lambda)^{T'})/\lambda$.

    Args:
        inner: $l(z;x)$, codes and inputs to (B,), twice differentiable.
        z: (B, ...) minimizers $z^*(x)$.
        x: (B, ...) inputs.
        v: (B, ...) gradients with respect to the codes, shaped like ``z``.
        steps: $T'$, at least 0.
        step_size: $\eta'>0$.

    Returns:
        (B, ...) gradients with respect to the inputs.

    Raises:
        TypeError, ValueError: a negative number of steps, a step size that isn't positive, ``v`` of
            another shape than ``z``.

    Source: Chen, Xie and Zhu (2020), Theorem 1 as corrected by E1 to E3; chapter ``generative``.
    """
    check_whole("steps", steps)
    check_positive("step_size", step_size)
    graph, u = _Graph(inner, z, x, v), torch.zeros_like(v)
    for _ in range(steps):
        u = u + step_size * (v - graph.product(u))
    return graph.pull(u)


class _Graph:
    """The graph of the inner gradient at one point: products with $H$ and $-M^T$."""

    def __init__(self, inner: Inner, z: Tensor, x: Tensor, v: Tensor) -> None:
        if v.shape != z.shape:
            raise ValueError(f"v is shaped like z, {tuple(z.shape)}, not {tuple(v.shape)}")
        with recording():
            self.z = plain(z).requires_grad_()
            self.x = plain(x).requires_grad_()
            (self.g,) = torch.autograd.grad(inner(self.z, self.x).sum(), self.z, create_graph=True)

    def product(self, p: Tensor) -> Tensor:
        return self._back(self.z, p)

    def pull(self, u: Tensor) -> Tensor:
        return -self._back(self.x, u)

    def _back(self, to: Tensor, p: Tensor) -> Tensor:
        if not self.g.requires_grad:
            return torch.zeros_like(to)
        (result,) = torch.autograd.grad(self.g, to, p, retain_graph=True, allow_unused=True)
        return torch.zeros_like(to) if result is None else result


class WarmStart:
    r"""An inner solver with a memory: the full one first, then a few steps from the last answer.

    An attack asks for $z^*$ at hundreds of points close to one another. As long as each input is
    near where it was at the last call, or back near where it was at the first one, the solver
    starts at the better of the last answer and the first one. Several copies of the batch, as
    ``nes`` asks for, start there too and are forgotten: points in opposite pairs, so that their
    mean over the copies is the last input. Any others are a new batch, solved in full. (A look at
    the distances stops a GPU once a call.)

    Args:
        solve: the full solver, inputs to codes; networks in it are in evaluation mode.
        refine: a few steps of it, codes and inputs to better codes.
        inner: $l(z;x)$, by which an answer is the better one.
        reach: how far the mean of an input's copies may be from the input, as a root mean square
            over its values: rounding, and more where the defense clips the points before.
        far: how far an input may move and still be the same one, as a root mean square over its
            values, in the units of the inputs. Steps of attacks are shorter on [0, 1], and two
            images farther apart; infinity takes any batch of as many inputs for the last one.

    Raises:
        TypeError, ValueError: a reach or ``far`` that is no number or negative.

    Source: Chen, Xie and Zhu (2020), appendix D; chapter ``generative``.
    """

    def __init__(
        self,
        solve: Solver,
        refine: Refine,
        inner: Inner,
        *,
        reach: float = 1e-3,
        far: float = 0.05,
    ) -> None:
        check_number("reach", reach)
        check_number("far", far, math.inf)
        self.solve, self.refine, self.inner, self.reach, self.far = solve, refine, inner, reach, far
        self.start: Tensor | None = None
        self.x: Tensor | None = None
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    def reset(self) -> None:
        """Forget all answers."""
        self.start = self.x = self.first = self.last = None

    def __call__(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The codes of inputs, outside any graph."""
        x, first, last, copies = x.detach(), self.first, self.last, self._copies(x)
        if first is None or last is None or not copies:
            self.start = self.x = x.clone()
            self.last = self.first = self.solve(x).detach()
            return self.first.clone()
        first, last = (z.repeat(copies, *[1] * (z.ndim - 1)) for z in (first, last))
        with torch.no_grad():
            better = self.inner(first, x) < self.inner(last, x)
        z = self.refine(torch.where(expand(better, first), first, last), x).detach()
        if copies == 1:
            self.x, self.last = x.clone(), z.clone()
        return z

    def _copies(self, x: Tensor) -> int:
        """How many copies of the last batch the inputs are; 0 for none."""
        if self.x is None or self.start is None:
            return 0
        if x.shape[1:] != self.x.shape[1:] or len(x) % len(self.x):
            return 0
        copies = len(x) // len(self.x)
        if copies == 1:  # the same inputs a step later, or at the start of another round
            moved, most = torch.minimum(_spread(x - self.x), _spread(x - self.start)), self.far
        else:
            moved, most = _spread(x.unflatten(0, (copies, -1)).mean(dim=0) - self.x), self.reach
        return copies if bool(moved.max() <= most**2) else 0


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, " B"]:
    return (a * b).flatten(1).sum(dim=1)


def _spread(shift: Tensor) -> Float[Tensor, " B"]:
    """The mean square of each sample's values."""
    return shift.flatten(1).square().mean(dim=1)
