r"""Table 1 of the autoencoders' paper: ``python -m reproduce.distillation``.

A new encoder $\Psi$ with a deconvolution network is trained on adversarial inputs of a random
linear encoder $\Phi$, each with its *target* image as the answer, and is then asked for the codes
of clean signals. A recipe takes a minute or so a seed, so the chapter ``sensing`` reads
``results/autoencoders-1.json``. What the paper leaves open (amplitudes, the multiplier, the size of
the initial weights, the training) is stated in ``RECIPES``; rows whose recipe and code are those of
today are kept.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adv.lab.files import held
from adv.lab.training import DivergenceError
from adv.theory.sensing import FourierSignals, gaussian_encoder, matched
from reproduce.files import read, write_json
from reproduce.options import friendly, listed, refuse_unknown
from reproduce.origin import provenance
from reproduce.plan import ROOT
from reproduce.versions import digest, files, same

__all__ = ["COLUMNS", "RECIPES", "Recipe", "distill", "main", "run"]

FILE = ROOT / "reproduce" / "results" / "autoencoders-1.json"
CODE = "reproduce.distillation.distill"
COLUMNS = ("c1", "c2", "c3", "c4", "c5")


@dataclass(frozen=True)
class Recipe:
    r"""What a new encoder is trained on, and how.

    Args:
        inputs: ``"pairs"``: $x_{adv}$ with $x_t$; ``"targets"``: $\delta_t$ with $x_t$;
            ``"shuffled"``: $x_{adv}$ with an unrelated signal, which nothing can be learnt from.
        amplitudes: smallest and largest coefficient of an active frequency.
        lam: the multiplier $\lambda$ of the attack, for all pairs.
        scale: of the initial weights of $\Psi$, times those of $\Phi$.
        steps: of Adam.
        batch: pairs a step, drawn afresh.
        lr: learning rate.
    """

    inputs: Literal["pairs", "targets", "shuffled"] = "pairs"
    amplitudes: tuple[float, float] = (1.6, 4.8)
    lam: float = 7.0
    scale: float = 0.5
    steps: int = 1500
    batch: int = 64
    lr: float = 1e-3


RECIPES = {
    "table": Recipe(),
    "strong attack": Recipe(amplitudes=(1.5, 3.0), lam=1.0, scale=0.6),
    "zero mean": Recipe(amplitudes=(-4.8, 4.8)),
    "targets only": Recipe(inputs="targets"),
    "shuffled": Recipe(inputs="shuffled", steps=500),
}


def decoder(rows: int) -> nn.Module:
    """The smallest deconvolution network from codes to images of 28 x 28."""
    return nn.Sequential(
        nn.Linear(rows, 32 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    )


def distill(recipe: Recipe, seed: int, *, rows: int = 50, tested: int = 20000) -> dict[str, Any]:
    r"""Train a new encoder and its decoder by a recipe, and measure both on new signals.

    Args:
        recipe: what to train on.
        seed: of $\Phi$, of the initial weights and of all signals.
        rows: $M$, numbers of a code.
        tested: pairs to measure on.

    Returns:
        ``values`` of the table's columns c1 to c5 (mean lengths of codes), ``constant``: the length
        of the mean of $\Psi(x-M_\Phi x)$, and ``error``: mean squared error of the images decoded
        from x_adv, clean and delta_t inputs, relative to the variance of the images.
    """
    signals = FourierSignals(amplitudes=recipe.amplitudes)
    phi = gaussian_encoder(rows, 225, seed)
    m = matched(phi, recipe.lam).float()
    psi = (recipe.scale * gaussian_encoder(rows, 225, seed + 1000)).float().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decode = decoder(rows)
    adam = torch.optim.Adam([psi, *decode.parameters()], lr=recipe.lr)
    for step in range(recipe.steps):
        x_s, x_t, other = signals.sample(3 * recipe.batch, 10**6 * seed + step).float().chunk(3)
        x = x_t @ m if recipe.inputs == "targets" else x_s + (x_t - x_s) @ m
        wanted = signals.images(other if recipe.inputs == "shuffled" else x_t)
        loss = (decode(x @ psi.T) - wanted).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    if not bool(loss.isfinite()):
        raise DivergenceError(f"the training of {recipe} diverged")
    return _measure(signals, m, psi.detach(), decode, tested, 10**6 * seed + recipe.steps)


@torch.no_grad()
def _measure(
    signals: FourierSignals, m: Tensor, psi: Tensor, decode: nn.Module, tested: int, seed: int
) -> dict[str, Any]:
    x_s, x_t = signals.sample(2 * tested, seed).float().chunk(2)
    target = x_t @ m
    x_adv = x_s - x_s @ m + target
    inputs = (x_s - x_s @ m, target, x_t - target, x_adv - x_t, x_s - x_t)
    lengths = [float((x @ psi.T).norm(dim=1).mean()) for x in inputs]
    some = slice(2000)
    images = signals.images(x_t[some])
    spread = float((images - images.mean(dim=0)).square().mean())
    errors = {
        name: float((decode(x[some] @ psi.T) - images).square().mean()) / spread
        for name, x in (("adversarial", x_adv), ("clean", x_t), ("delta_t", target))
    }
    return {
        "values": {key: round(v, 4) for key, v in zip(COLUMNS, lengths, strict=True)},
        "constant": round(float((inputs[0] @ psi.T).mean(dim=0).norm()), 4),
        "error": {key: float(f"{value:.3g}") for key, value in errors.items()},
    }


def run(recipes: Sequence[str], seeds: int, results: Path) -> None:
    """Compute the rows that are missing or of other recipes or code; write the file after each.

    Args:
        recipes: names in ``RECIPES``.
        seeds: how many, from 0.
        results: the file.

    Raises:
        ValueError: an unknown recipe.
    """
    refuse_unknown(recipes, RECIPES, "recipe")
    made = provenance(sorted(files(CODE)), place=torch.device("cpu"))
    origin = {"code": {CODE: digest(CODE)}} | made
    for name in recipes:
        recipe = asdict(RECIPES[name])
        recipe["amplitudes"] = list(recipe["amplitudes"])
        for seed in range(seeds):
            key = {"recipe": name, "settings": recipe, "seed": seed}
            if any(key.items() <= row.items() for row in _stored(results)):
                continue
            start = time.process_time()
            measured = distill(RECIPES[name], seed)
            seconds = {"seconds": round(time.process_time() - start, 1)}
            with held(results.parent):  # another process may have added rows meanwhile
                rows = _stored(results)
                rows = [row for row in rows if (row["recipe"], row["seed"]) != (name, seed)]
                rows.append(key | measured | seconds)
                write_json(results, origin | {"rows": rows})
            print(name, seed, measured["values"], measured["error"], flush=True)


def _stored(results: Path) -> list[dict[str, Any]]:
    """The rows that today's code computed."""
    stored = read(results) or {}
    return stored["rows"] if same(CODE, (stored.get("code") or {}).get(CODE)) else []


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.distillation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="how many, from 0")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="separated by commas")
    parser.add_argument("--results", type=Path, default=FILE, help="the file to write")
    given = parser.parse_args(arguments)
    with friendly("reproduce.distillation"):
        run(listed(given.recipes), given.seeds, given.results)


if __name__ == "__main__":
    main()
