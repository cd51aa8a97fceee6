r"""The Jacobian as an operator that is never stored, and the quadratic problems on top of it.

The output of a linearized model is farthest from a target where $\|r+J\delta\|_2^2$ is largest.
Over an l2 ball that is an eigenvalue problem, over the corners of a box one of signs, NP-hard in
general. The solvers here take an operator, so that inputs and outputs may be of any size, or small
matrices; ``regression`` makes attacks of them.
"""

import math
import sys
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adv.attacks.common import (
    Best,
    Model,
    Observe,
    check_count,
    check_number,
    check_range,
    drawn,
    eval_mode,
    expand,
    generator,
    leaf,
    row_products,
    settled,
)
from adv.geometry import norm as norm_of
from adv.geometry import steepest

__all__ = [
    "Jacobian",
    "Singular",
    "ascend",
    "best_signs",
    "flip_search",
    "greedy_signs",
    "sign_bound",
    "singular",
    "trust_region",
]

CHUNK = 2**20
"""Numbers in a block of Jacobian columns: 4 MB in float32; the layers between take a multiple."""
FINITE = (-sys.float_info.max, sys.float_info.max)
"""Bounds of points that have none."""


# ----------------------------------------------------------------------------------- the Jacobian


class Jacobian:
    r"""The Jacobian of each sample as an operator: products with $J$ and $J^\top$, never $J$.

    The model runs once, in evaluation mode, and its graph is kept: $J^\top w$ is a backward pass.
    Being linear in $w$ it can be differentiated by $w$, and $J u$ is that derivative: no layer
    needs a forward mode. Layers have to be twice differentiable, which fused attention is not (let
    ``torch.nn.attention`` use its backend ``MATH``). Memory is that of the graph, a small multiple
    of the activations.

    Args:
        model: ``(B, ...) -> (B, ...)``, of any output shape, samples not interacting.
        x: (B, ...) points.

    Attributes:
        x: the points, (B, ...).
        value: $f(x)$, (B, ...).

    Raises:
        TypeError: no function, points or outputs that are not floating-point tensors.
        ValueError: no points, NaN, or not one output for each point. So do the methods and
            functions below for what does not fit in type or shape.
        RuntimeError: a layer that cannot be differentiated twice.

    Source: Balda et al. (2018), section 3; chapter ``regression``.
    """

    def __init__(self, model: Model, x: Float[Tensor, "B ..."]) -> None:
        if not callable(model):
            raise TypeError(f"model is a function of points (B, ...), not {type(model).__name__}")
        check_range(x, FINITE)
        with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
            self.x, given = leaf(x.detach().clone())
            self._out = _outputs(model(given), len(x))
            self._w = torch.zeros_like(self._out).requires_grad_()
            self._pulled = row_products(self._out, self.x, self._w[None], create_graph=True)[0]
        self.value = self._out.detach()
        self._size = self.x[0].numel(), self._out[0].numel()

    @classmethod
    def of(cls, matrix: "Float[Tensor, 'B K d'] | Jacobian") -> "Jacobian":
        """The operator of given matrices; an operator stays what it is."""
        if isinstance(matrix, Jacobian):
            return matrix
        _check_matrices(matrix)
        start = torch.zeros_like(matrix[:, 0])
        return cls(lambda z: torch.einsum("bkd,bd->bk", matrix.detach().clone(), z), start)

    def jvp(self, u: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """$J u$, shaped like the output; ``u`` is shaped like the input, or flat."""
        _check_like("u", u, self.x, flat=True)
        return row_products(self._pulled, self._w, u.reshape(1, *self.x.shape))[0]

    def vjp(self, w: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        r"""$J^\top w$, shaped like the input; ``w`` is shaped like the output, or flat."""
        _check_like("w", w, self.value, flat=True)
        return row_products(self._out, self.x, w.reshape(1, *self._out.shape))[0]

    def gram(self, u: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        r"""$J^\top J u$, shaped like the input."""
        return self.vjp(self.jvp(u))

    @property
    def chunk(self) -> int:
        """How many columns or rows are computed at a time."""
        return max(1, CHUNK // (len(self.x) * max(self._size)))

    def columns(self, indices: Int[Tensor, " n"] | Int[Tensor, "B n"]) -> Float[Tensor, "B K n"]:
        """The columns of some inputs, the same for all samples or others for each."""
        return self._columns(self._indices(indices, self._size[0]))

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "B n d"]:
        """The rows of some outputs."""
        return self._rows(self._indices(indices, self._size[1]))

    def dense(self) -> Float[Tensor, "B K d"]:
        """The whole matrix, by rows or by columns, whichever are fewer; for small problems."""
        d, K = self._size
        return self._rows(self._count(K)) if d > K else self._columns(self._count(d))

    @cached_property
    def column_squares(self) -> Float[Tensor, "B d"]:
        r"""$\|J_i\|_2^2$ of each column, from min(d, K) products, summed without storing them."""
        d, K = self._size
        if d > K:
            blocks = self._count(K).split(self.chunk, dim=1)
            return torch.stack([self._rows(block).square().sum(1) for block in blocks]).sum(0)
        blocks = self._count(d).split(self.chunk, dim=1)
        return torch.cat([self._columns(block).square().sum(1) for block in blocks], dim=1)

    def _columns(self, indices: Int[Tensor, "B n"]) -> Float[Tensor, "B K n"]:
        parts = [
            self._units(self._pulled, self._w, part) for part in indices.split(self.chunk, dim=1)
        ]
        return torch.cat(parts).permute(1, 2, 0)

    def _rows(self, indices: Int[Tensor, "B n"]) -> Float[Tensor, "B n d"]:
        parts = [self._units(self._out, self.x, part) for part in indices.split(self.chunk, dim=1)]
        return torch.cat(parts).transpose(0, 1)

    def _count(self, n: int) -> Int[Tensor, "B n"]:
        return torch.arange(n, device=self.x.device).expand(len(self.x), -1)

    def _indices(self, indices: Tensor, size: int) -> Int[Tensor, "B n"]:
        """Indices for each sample, of so many columns or rows."""
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            raise TypeError(f"indices are an int64 tensor (n,) or (B, n), not {_kind(indices)}")
        if not indices.numel() or indices.shape[:-1] not in ((), (1,), (len(self.x),)):
            raise ValueError(
                f"indices have shape (n,) or ({len(self.x)}, n), not {tuple(indices.shape)}"
            )
        if indices.device != self.x.device:
            raise ValueError(
                f"indices are on {indices.device}, but the operator on {self.x.device}"
            )
        # Checked here: out of range on a GPU they would end the process's use of it.
        first, last = (int(value) for value in indices.aminmax())
        if first < 0 or last >= size:
            raise ValueError(f"indices lie in 0..{size - 1}, but they span {first}..{last}")
        return indices.expand(len(self.x), -1)

    def _units(self, outputs: Tensor, inputs: Tensor, indices: Int[Tensor, "B n"]) -> Tensor:
        """Products (n, B, m) with the unit vectors of the ``indices``."""
        units = outputs.new_zeros(indices.shape[1], len(indices), outputs[0].numel())
        units.scatter_(2, indices.T[:, :, None], 1.0)
        return row_products(outputs, inputs, units.reshape(-1, *outputs.shape)).flatten(2)


def _outputs(out: Any, count: int) -> Tensor:
    """A model's outputs, if they are a batch of so many."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(f"the model returns a floating-point tensor (B, ...), not {_kind(out)}")
    if out.shape[:1] != (count,) or not out.numel():
        raise ValueError(
            f"the model returns ({count}, ...) for {count} points, not {tuple(out.shape)}"
        )
    return out


def _check_matrices(matrix: Any, shape: str = "(B, K, d)") -> None:
    """Raise unless this is a batch of finite matrices."""
    if not isinstance(matrix, Tensor) or matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected float32 or float64 matrices {shape}, got {_kind(matrix)}")
    if matrix.ndim != 3 or not matrix.numel():
        raise ValueError(f"expected matrices {shape}, got shape {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrices have entries that are not finite")


def _check_like(name: str, values: Any, like: Tensor, flat: bool = False) -> None:
    """Raise unless there is one vector for each sample, shaped like another batch, or flat."""
    if not isinstance(values, Tensor) or values.dtype != like.dtype:
        raise TypeError(f"{name} is a {like.dtype} tensor, not {_kind(values)}")
    if values.shape != like.shape and not (flat and values.shape == like.flatten(1).shape):
        hint = ", or that flat," if flat else ","
        raise ValueError(f"{name} has shape {tuple(like.shape)}{hint} not {tuple(values.shape)}")
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device}, but the operator on {like.device}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


# ------------------------------------------------------- the quadratic problem in the l2 ball


class Singular(NamedTuple):
    r"""Leading right singular vector, singular value, and $\|J^\top Jv-\sigma^2v\|/\sigma^2$."""

    vector: Tensor
    value: Tensor
    residual: Tensor


def singular(
    jacobian: Jacobian | Float[Tensor, "B K d"],
    *,
    steps: int = 200,
    tol: float = 1e-3,
    seed: int = 0,
    observe: Observe | None = None,
) -> Singular:
    r"""Power iteration $v\leftarrow J^\top Jv/\|J^\top Jv\|$ from a random start.

    The tangent of the angle to the leading singular vector shrinks by $(\sigma_2/\sigma_1)^2$ at
    each step.

    Args:
        jacobian: operator, or matrices (B, K, d).
        steps: products with $J^\top J$ at most.
        tol: the iteration ends where no vector moves by more than this.
        seed: of the start.
        observe: ``(step, state)``, called at each step, as by ``ascend``.

    Returns:
        ``vector`` (B, ...), of length 1, its sign arbitrary, 0 where $J=0$; ``value`` (B,),
        $\|Jv\|$; and the ``residual`` (B,) of the eigenvalue equation.

    Source: Balda et al. (2018), (14); chapter ``regression``.
    """
    J = Jacobian.of(jacobian)
    start = drawn(torch.randn, J.x.shape, J.x, generator(seed))
    unit = partial(steepest, kind="l2")
    v = ascend(J, None, unit(start), unit, steps=steps, tol=tol, observe=observe)
    image = J.jvp(v)
    value = norm_of(image, "l2")
    square = expand(torch.where(value > 0, value.square(), 1.0), v)
    return Singular(v, value, norm_of(J.vjp(image) / square - v, "l2"))


def ascend(
    jacobian: Jacobian | Float[Tensor, "B K d"],
    offset: Float[Tensor, "B ..."] | None,
    start: Float[Tensor, "B ..."],
    oracle: Callable[[Tensor], Tensor],
    *,
    steps: int = 200,
    tol: float = 1e-3,
    observe: Observe | None = None,
) -> Float[Tensor, "B ..."]:
    r"""Steps $\delta\leftarrow\arg\max_u\,u^\top J^\top(r+J\delta)$ until none moves by ``tol``.

    The square $\|r+J\delta\|^2$ is convex, hence above its tangent, which the step maximizes: it
    never falls, in any norm and box that the ``oracle`` knows. In the l2 ball, from a start that
    along no singular vector has the sign opposite to $b=J^\top r$, such as $b$ or the leading
    vector $v$ with $b^\top v\ge0$, no $\delta$ has it, and the limit solves
    $(\mu I-J^\top J)\delta=b$ with $\mu\ge\sigma_i^2$ wherever it has a share of vector $i$. From
    $v$ that is the global maximum; from $b$, too, but for the hard case of ``trust_region``.

    Args:
        jacobian: operator, or matrices (B, K, d).
        offset: (B, ...) $r$, shaped like the output; None for 0.
        start: (B, ...) first $\delta$, shaped like the input.
        oracle: the maximizer of $\langle g,u\rangle$ over the feasible $u$, for a batch of $g$:
            ``geometry.linear_oracle``, or ``steepest`` for the unit ball.
        steps: products with $J^\top J$ at most.
        tol: the iteration ends where no $\delta$ moves by more than this share of its length.
        observe: ``(step, state)``, called at each step with ``delta`` and ``moved`` (B,), that
            share.

    Returns:
        (B, ...) the last $\delta$.

    Source: Balda et al. (2018), E14; chapter ``regression``.
    """
    J, delta = Jacobian.of(jacobian), start
    check_count("steps", steps)
    check_number("tol", tol)
    _check_like("start", start, J.x)
    if offset is not None:
        _check_like("offset", offset, J.value)
    if not callable(oracle):
        raise TypeError(f"oracle is a function of directions (B, ...), not {_kind(oracle)}")
    for step in range(steps):
        image = J.jvp(delta) if offset is None else offset + J.jvp(delta)
        ahead = oracle(J.vjp(image))
        _check_like("the oracle's direction", ahead, J.x)
        size = norm_of(ahead, "l2")
        moved = norm_of(ahead - delta, "l2") / torch.where(size > 0, size, 1.0)
        delta = ahead
        if observe is not None:
            observe(step, {"delta": delta, "moved": moved})
        if settled(moved <= tol, step):
            break
    return delta


def trust_region(
    jacobian: Float[Tensor, "B K d"], b: Float[Tensor, "B d"], eps: float
) -> Float[Tensor, "B d"]:
    r"""Exact maximizer of $2b^\top\delta+\|J\delta\|_2^2$ over $\|\delta\|_2\le\varepsilon$.

    $(\mu I-J^\top J)\delta=b$ with $\mu\ge\sigma_1^2$ and $\|\delta\|_2=\varepsilon$: by an
    eigendecomposition of $J^\top J$ and a bisection for $\mu-\sigma_1^2$. In the hard case, $b$
    orthogonal to the leading singular vector $v$ and too small, $\mu=\sigma_1^2$ and a multiple of
    $v$ fills the ball.

    Args:
        jacobian: matrices (B, K, d).
        b: (B, d), $J^\top(f(x)-y)$ for the regression problem.
        eps: radius, >= 0.

    Returns:
        (B, d) of length ``eps``.

    Raises:
        TypeError, ValueError: matrices or ``b`` that don't fit or aren't finite, a radius that is
            negative, over 1e30 or NaN.

    Source: Balda et al. (2018), (12), which has no solver there; chapter ``regression``.
    """
    check_number("eps", eps)
    J = jacobian.dense() if isinstance(jacobian, Jacobian) else jacobian
    _check_matrices(J)
    _check_like("b", b, J[:, 0])
    if not bool(b.isfinite().all()):
        raise ValueError("b has entries that are not finite")
    values, vectors = torch.linalg.eigh(J.transpose(1, 2) @ J)
    gap = values[:, -1:] - values
    c = torch.einsum("bij,bi->bj", vectors, b)

    def at(nu: Tensor) -> Tensor:
        bottom = nu + gap
        return torch.where(bottom > 0, c / bottom, 0.0)

    radius = max(eps, 1e-30)
    low, high = c[:, -1:].abs() / radius, norm_of(c, "l2")[:, None] / radius
    for _ in range(200 if c.dtype == torch.float64 else 100):
        middle = (low + high) / 2
        long = norm_of(at(middle), "l2")[:, None] > eps
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    z = at(high)[:, :-1]
    rest = eps * (1 - (z / radius).square().sum(1, keepdim=True)).clamp_min(0).sqrt()
    z = torch.cat([z, torch.where(c[:, -1:] < 0, -rest, rest)], dim=1)
    return torch.einsum("bij,bj->bi", vectors, z) * (eps > 0)


# ------------------------------------------------------------------ the quadratic problem of signs


def greedy_signs(
    jacobian: Jacobian | Float[Tensor, "B K Z"], offset: Float[Tensor, "B ..."] | None = None
) -> Float[Tensor, "B Z"]:
    r"""Signs for a large $\|r+\sum_z\rho_zJ_z\|_2$, one after the other, large columns first.

    $\rho_z=\operatorname{sign}\big((r+\sum_{j<z}\rho_jJ_j)^\top J_z\big)$ with
    $\operatorname{sign}(0)=1$. Every step adds $\|J_z\|^2$ at least, so that without $r$ the value
    is at least $\operatorname{tr}J^\top J$, the mean over random signs, and at least $1/Z$ of the
    maximum.

    Args:
        jacobian: matrices (B, K, Z), or an operator, whose columns are computed in blocks.
        offset: (B, ...) $r$, shaped like the output; 0 by default.

    Returns:
        (B, Z) of 1 and -1.

    Source: Balda et al. (2018), (20), with an offset and the guarantee; chapter ``regression``.
    """
    J = Jacobian.of(jacobian)
    order = J.column_squares.argsort(dim=1, descending=True, stable=True)
    total = torch.zeros_like(J.value) if offset is None else offset
    _check_like("offset", total, J.value)
    total, signs = total.flatten(1).clone(), torch.empty_like(order, dtype=J.value.dtype)
    for part in order.split(J.chunk, dim=1):
        for z, column in zip(part.unbind(1), J.columns(part).unbind(2), strict=True):
            rho = torch.where((total * column).sum(1, keepdim=True) < 0, -1.0, 1.0)
            total += rho * column
            signs.scatter_(1, z[:, None], rho.to(signs.dtype))
    return signs


def flip_search(
    jacobian: Jacobian | Float[Tensor, "B K Z"],
    signs: Float[Tensor, "B Z"],
    offset: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, "B Z"]:
    r"""Flip one sign at a time, the one that gains most, while $\|r+J\rho\|_2$ grows.

    Flipping $\rho_k$ changes the square by $4(\|J_k\|^2-\rho_kw_k)$, $w=J^\top(r+J\rho)$; a flip
    costs one product with $J^\top J$.

    Args:
        jacobian: matrices (B, K, Z), or an operator.
        signs: (B, Z) where to start.
        offset: (B, ...) $r$, shaped like the output; 0 by default.

    Returns:
        (B, Z) signs that no single flip improves, or what 4 Z flips led to.

    Source: chapter ``regression``.
    """
    J = Jacobian.of(jacobian)
    _check_like("signs", signs, J.x.flatten(1))
    if not bool((signs.abs() == 1).all()):
        raise ValueError("signs are 1 or -1, and some are not")
    if offset is not None:
        _check_like("offset", offset, J.value)
    squares, image = J.column_squares, J.jvp(signs)
    slope = J.vjp(image if offset is None else image + offset).flatten(1)
    rounding = 100 * torch.finfo(slope.dtype).eps * slope.abs().amax(dim=1, keepdim=True)
    for step in range(4 * signs.shape[1]):
        gain, k = (squares - signs * slope).max(dim=1, keepdim=True)
        better = gain > rounding
        if settled(~better[:, 0], step):
            break
        turn = torch.where(better, -2 * signs.gather(1, k), 0.0)
        flip = torch.zeros_like(signs).scatter(1, k, turn)
        signs, slope = signs + flip, slope + J.gram(flip).flatten(1)
    return signs


def best_signs(
    columns: Float[Tensor, "B K Z"], offset: Float[Tensor, "B K"] | None = None
) -> Float[Tensor, "B Z"]:
    r"""The signs with the largest $\|r+J\rho\|_2$, by trying all $2^Z$ of them.

    Args:
        columns: (B, K, Z) matrices, Z <= 20.
        offset: (B, K) $r$; 0 by default, and then the first sign is 1.

    Returns:
        (B, Z) of 1 and -1, the first among equals.

    Raises:
        ValueError: more than 20 columns.

    Source: Balda et al. (2018), (19); chapter ``regression``.
    """
    _check_matrices(columns, "(B, K, Z)")
    if offset is not None:
        _check_like("offset", offset, columns[:, :, 0])
    Z = columns.shape[2]
    if Z > 20:
        raise ValueError(f"best_signs() tries all sign vectors of at most 20 columns, not {Z}")
    gram = columns.transpose(1, 2) @ columns
    b = None if offset is None else torch.einsum("bkz,bk->bz", columns, offset)
    bits = torch.arange(Z, device=columns.device)
    best = Best(torch.ones_like(columns[:, 0]))
    for numbers in torch.arange(2 ** (Z - (b is None)), device=columns.device).split(2**12):
        signs = 1 - 2 * ((numbers[:, None] >> bits.flip(0)) & 1).to(columns.dtype)
        value = torch.einsum("pz,bzy,py->bp", signs, gram, signs)
        if b is not None:
            value = value + 2 * b @ signs.T
        top, index = value.max(dim=1)
        best.update(signs[index], -top)
    return best.x_adv


def sign_bound(gram: Float[Tensor, "B Z Z"], *, steps: int = 500) -> Float[Tensor, " B"]:
    r"""An upper bound of $\max_{\rho\in\{\pm1\}^Z}\rho^\top G\rho$, close to the semidefinite one.

    The relaxation $\max\operatorname{tr}GX$, $X\succeq0$, $X_{ii}=1$ is climbed with $X=VV^\top$,
    $V\leftarrow$ the rows of $GV$ at length 1. Its $\lambda_i=(GV)_i\cdot V_i$, raised until
    $\operatorname{diag}\lambda-G\succeq0$, are feasible for the dual whatever $V$: up to rounding
    the bound holds after any number of steps.

    Args:
        gram: (B, Z, Z) positive semidefinite matrices, best in float64.
        steps: of the climb.

    Returns:
        (B,) bounds; the maximum is at least $2/\pi$ of the semidefinite one.

    Source: Nesterov (1998) for the factor; chapter ``regression``.
    """
    _check_matrices(gram, "(B, Z, Z)")
    check_count("steps", steps)
    Z = gram.shape[-1]
    if gram.shape[1] != Z or not torch.allclose(gram, gram.mT, atol=1e-5 * float(gram.abs().max())):
        raise ValueError(f"expected symmetric matrices (B, Z, Z), got shape {tuple(gram.shape)}")
    rank = math.isqrt(2 * Z) + 2
    V = drawn(torch.randn, (len(gram), Z, rank), gram, generator(0))
    for _ in range(steps):
        V = torch.nn.functional.normalize(gram @ V, dim=2)
    lam = (gram @ V * V).sum(2)
    lowest = torch.linalg.eigvalsh(torch.diag_embed(lam) - gram)[:, 0]
    return lam.sum(1) + Z * (-lowest).clamp_min(0)
