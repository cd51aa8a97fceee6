"""Which code makes a record: the names of functions whose versions it keeps.

A record without one of the ``steady`` names is of other code; one without some of those ``around``
was made before these were listed, and stands.
"""

from dataclasses import dataclass

from reproduce import versions
from reproduce.items import Settings

__all__ = ["GAMES", "Code", "of_attack", "of_training"]

# Networks that are trained by a game of two.
GAMES = ("wgan", "dc-gan")


@dataclass(frozen=True)
class Code:
    """Names for ``versions.digest``.

    Args:
        steady: the functions that settings name, and those that call them.
        around: the code between: loaders of data, and parts of the steps.
    """

    steady: list[str]
    around: list[str]

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.steady, *self.around]


def of_training(recipe: Settings) -> Code:
    """The code of a training, by all that it depends on (``Plan.recipe``)."""
    network, training = recipe["model"]["name"], recipe["training"]
    shared = ["adv.lab.models.build"]
    if "'manifold'" in str(recipe["loss"]):  # of this loss, or of one that it joins
        shared.append("adv.lab.generative.with_manifold")
    parts = ["_augmented"] if training.get("augment") else []
    if network in GAMES:
        parts.append("_game")
    else:
        parts += ["_duel"] if "critic" in recipe else ["_fit", "_loss"]
    return Code(_trained_by(recipe), _around(recipe["data"], shared, parts))


def of_attack(attack: Settings, dataset: str) -> Code:
    """The code of an attack and its measures, by all that they depend on (``Plan.attack``)."""
    shared = ["adv.lab.evaluation.counting"]
    shared += ["adv.lab.committee.assemble"] if "judges" in attack else []
    parts = ["vulnerable"] + ["_points"] * (attack.get("target") != "pair")
    return Code(_measured_by(attack), _around(dataset, shared, parts))


def _around(dataset: str, shared: list[str], parts: list[str]) -> list[str]:
    loader = f"adv.lab.data._LOADERS[{dataset}]"
    return [loader, *shared, *(f"reproduce.steps.{part}{versions.ALONE}" for part in parts)]


def _trained_by(recipe: Settings) -> list[str]:
    model = recipe["model"]
    names = [f"adv.lab.models._MODELS[{model['name']}]"]
    if model["name"] in GAMES:
        return [*names, "adv.lab.generative.fit_wgan"]
    if model["name"] == "vaes":
        names.append(f"adv.lab.models._MODELS[{model.get('kind', 'vae')}]")
    if "critic" in recipe:
        return [*names, "adv.lab.duel.fit_critic", "adv.lab.duel.new_critic"]
    names += [f"adv.{recipe['loss']['name']}"] if recipe["loss"] else []
    if "pairs" in recipe:
        call = recipe["pairs"].get("attack", {}).get("call")
        names += ["reproduce.pairs.training", *([f"adv.attacks.{call}"] if call else [])]
    names += ["adv.lab.training.mixed"] if recipe["training"].get("mixed") else []
    return [*names, "adv.lab.training.fit"]


def _measured_by(attack: Settings) -> list[str]:
    names = [f"reproduce.measures.{name}" for name in attack["measures"]]
    call = attack.get("call", "")
    peer = call.removeprefix("peers.") if call.startswith("peers.") else None
    if peer:
        names += ["adv.lab.peers.attack", f"adv.lab.peers.PEERS[{peer}]"]
    elif call:
        names.append(f"adv.attacks.{call}")
    if attack.get("target") == "pair":
        return [*names, "reproduce.pairs.attacked", "reproduce.steps.chosen"]
    if "defense" in attack:
        names.append(f"adv.defenses.generative.{attack['defense']['name']}")
        names += [f"reproduce.defended.{name}" for name in ("built", "adapted")]
        return [*names, "reproduce.steps.chosen"]
    way = "generated" if "uses" in attack else "perturbed"
    own = ("chosen", "radii", "compared" if peer else way)
    return names + [f"reproduce.steps.{name}" for name in own]
