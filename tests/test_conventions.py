"""The conventions that hold across the module: import direction, docstrings, attacks' manners."""

import ast
import inspect
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EPS, attacks, call, has_goal, lengths, make_scene

import adv
from adv.geometry import norm as length
from adv.geometry import pixels

PACKAGE = Path(adv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


# ------------------------------------------------------------------------------- import direction

METHODS = ("adv.geometry", "adv.theory", "adv.attacks", "adv.defenses")
# What each part may import of adv; a part not named here has no place in the plan.
MAY_IMPORT = {
    "adv": (),
    "adv.geometry": (),
    "adv.theory": ("adv.geometry", "adv.theory"),
    "adv.attacks": ("adv.geometry", "adv.attacks"),
    "adv.defenses": METHODS,
    "adv.lab": (),
    "adv.lab.claims": (),
    "adv.lab.data": (),
    "adv.lab.figures": (),
    "adv.lab.models": (),
    "adv.lab.checkpoints": ("adv.lab.files",),
    "adv.lab.files": (),
    "adv.lab.annotate": (*METHODS, "adv.lab"),
    "adv.lab.committee": (*METHODS, "adv.lab"),
    "adv.lab.duel": (*METHODS, "adv.lab"),
    "adv.lab.evaluation": (*METHODS, "adv.lab"),
    "adv.lab.generative": (*METHODS, "adv.lab"),
    "adv.lab.peers": (*METHODS, "adv.lab"),
    "adv.lab.training": (*METHODS, "adv.lab"),
    "adv.lab.zoo": (*METHODS, "adv.lab"),
    "adv.__main__": ("adv",),
}


def within(module, parts):
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def imports(path):
    """All modules of adv that a file imports, also inside functions."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                f"{source}.{alias.name}" if _is_module(f"{source}.{alias.name}") else source
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if within(name, ["adv"]))


def _is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def place(module):
    """The most specific part of the plan that a module belongs to."""
    parts = [part for part in MAY_IMPORT if within(module, [part])]
    part = max(parts, key=len)
    packages = ("adv.theory", "adv.attacks", "adv.defenses")
    return part if part == module or part in packages else None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    module = module_name(path)
    part = place(module)
    assert part, f"{module} has no place in the plan: name it in MAY_IMPORT"
    for name in imports(path):
        assert within(name, MAY_IMPORT[part]), f"{module} must not import {name}"


def test_the_import_rule_sees_what_it_should(tmp_path, monkeypatch):
    file = PACKAGE / "attacks" / "invented.py"
    code = (
        "import adv.lab.zoo\ndef f():\n    from ..lab import data\n    from adv import geometry\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: code)
    assert set(imports(file)) >= {"adv.lab.zoo", "adv.geometry"}
    assert any(name.startswith("adv.lab") for name in list(imports(file))[1:])
    assert place("adv.lab.invented") is None
    assert place("adv.attacks.invented") == "adv.attacks"


# ------------------------------------------------------------------------------------- docstrings


def public_functions():
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if any("overload" in ast.unparse(d) for d in node.decorator_list):
                    continue
                yield pytest.param(module_name(path), node, id=f"{module_name(path)}.{node.name}")


def parameters(node):
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return [arg.arg for arg in every if arg is not None]


FUNCTIONS = list(public_functions())
TRIO = ["model", "x", "y"]  # of a loss: the same everywhere


def described(node):
    """The Args section, or for a variant such as ``prox_l1`` that of the dispatcher ``prox``."""
    text = ast.get_docstring(node) or ""
    if "Args:" in text:
        return text.split("Args:")[1]
    stem = node.name.split("_")[0]
    general = [f.values[1] for f in FUNCTIONS if f.values[1].name == stem != node.name]
    return described(general[0]) if general else ""


@pytest.mark.parametrize(("module", "node"), FUNCTIONS)
def test_docstrings_say_what_each_parameter_is(module, node):
    text = ast.get_docstring(node) or ""
    assert text, "no docstring"
    assert text.splitlines()[0].strip()[-1] in ".:", "the first line is a sentence"
    section = described(node)
    names = parameters(node)
    if module == "adv.__main__" or (not section and (len(names) <= 2 or names == TRIO)):
        return  # a sentence is enough for two parameters; the command line has its own help
    missing = [
        name for name in names if f"{name}:" not in section and not re.search(rf"\b{name}\b", text)
    ]
    assert not missing, f"not described: {', '.join(missing)}"


# ---------------------------------------------------------------------------------------- attacks


ATTACKS = list(attacks())
CONVENTION = {"targeted": False, "bounds": (0.0, 1.0), "seed": 0, "observe": None}


@pytest.mark.parametrize("attack", ATTACKS)
def test_signature(attack):
    given = inspect.signature(attack).parameters
    kinds = [p.kind for p in given.values()]
    positional = [name for name, p in given.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3, "all after the third argument is keyword-only"
    assert positional[1] == "x"
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert {"bounds", "seed", "observe"} <= set(given)
    assert {"eps", "steps"} & set(given)
    for name, default in CONVENTION.items():
        if name in given:
            assert given[name].default == default, name
    assert all(p.annotation is not p.empty for p in given.values())
    assert "Source:" in inspect.getdoc(attack)


@pytest.fixture(params=["module", "function"])
def scene(request):
    """Networks in training mode, seen by an attack as modules or inside functions."""
    return make_scene(request.param)


def state(scene):
    parameters = list(scene.networks.parameters())
    tensors = [*parameters, *scene.networks.buffers(), *(p.grad for p in parameters), scene.x]
    flags = [m.training for m in scene.networks.modules()] + [p.requires_grad for p in parameters]
    generators = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    x = scene.x
    return [t.tolist() for t in tensors], flags, generators, x.requires_grad, x.grad is None


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_attacks_leave_everything_as_it_was(attack, scene):
    before, x = state(scene), scene.x
    x_adv = call(attack, scene)
    assert state(scene) == before
    assert x_adv.shape == x.shape
    assert (x_adv.dtype, x_adv.device) == (x.dtype, x.device)
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr(), "the result must not share memory with the input"
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_attacks_repeat_themselves_also_without_gradients(attack, scene):
    first = call(attack, scene)
    torch.rand(3)  # the global state plays no part
    with torch.no_grad():
        assert torch.equal(call(attack, scene), first)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_radius_is_kept_and_observe_is_called(attack, scene):
    seen, x = [], scene.x
    x_adv = call(attack, scene, observe=lambda step, state: seen.append(state))
    assert seen
    assert all(isinstance(entry, dict) and entry for entry in seen)
    given = inspect.signature(attack).parameters
    if "eps" in given and "norm" in given:
        kind, plane = given["norm"].default, scene.networks["plane"].eval()
        with torch.no_grad():  # of a latent attack the radius is the code's
            delta = plane.code(x_adv) - plane.encode(x) if "manifold" in given else x_adv - x
        distance = pixels(delta) if kind == "l0" else length(delta, kind)
        assert distance.max() <= EPS + 1e-5


CHANGES = {
    "bounds": (lambda x, y: (x + 1, y), ValueError),
    "nan": (lambda x, y: (x * math.nan, y), ValueError),
    "integers": (lambda x, y: ((10 * x).long(), y), TypeError),
    "numpy": (lambda x, y: (x.numpy(), y), TypeError),
    "count": (lambda x, y: (x, y[:2]), ValueError),
    "target": (lambda x, y: (x, y + (math.nan if y.is_floating_point() else 3)), ValueError),
    "target type": (lambda x, y: (x, y.long() if y.is_floating_point() else y.float()), TypeError),
}
OF_A_GOAL = ("count", "target", "target type")


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        pytest.param(attack.values[0], name, id=f"{attack.id} {name}")
        for attack in ATTACKS
        for name in CHANGES
        if has_goal(attack.values[0]) or name not in OF_A_GOAL
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_refused(attack, name):
    change, error = CHANGES[name]
    with pytest.raises(error):
        call(attack, make_scene(), change)


WRONG = [{"norm": "l9"}, {"norm": 0.5}, {"eps": -0.1}, {"steps": 0}, {"seed": -1}]


@pytest.mark.parametrize(
    ("attack", "wrong"),
    [
        pytest.param(attack.values[0], wrong, id=f"{attack.id} {wrong}")
        for attack in ATTACKS
        for wrong in WRONG
        if set(wrong) <= set(inspect.signature(attack.values[0]).parameters)
    ],
)
def test_bad_settings_are_refused(attack, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        call(attack, make_scene(), **wrong)


# ---------------------------------------------------------------------------------------- devices

# What is run on both devices besides the defaults, and besides targeted attacks.
VARIANTS = {
    "deepfool": [{"norm": "linf"}, {"norm": "linf", "targeted": True}],
    "distortion_search": [{"update": "sign"}],
    "fgsm": [{"norm": "l2"}, {"norm": "l1"}],
    "gnm": [{"norm": norm, "steps": 4, "dither": 0.2} for norm in ("linf", "l2", "l1")],
    "high_confidence": [{"norm": "linf"}],
    "latent_pgd": [{"norm": "l2", "restarts": 2}],
    "linear": [{"norm": norm, "accumulate": False} for norm in ("linf", "l2", "l1")],
    "match": [{"norm": "linf", "restarts": 2}],
    "pdpgd": [{"norm": norm, "steps": 60} for norm in ("linf", "l2", "l1", "l0")],
    "pgd": [{"norm": norm, "restarts": 2} for norm in ("linf", "l2", "l1")],
    "quadratic": [{"norm": "linf"}, {"norm": "l1"}],
    "random_noise": [{"norm": "l2", "draws": 3}, {"norm": "l1", "draws": 3}],
    "subset": [{"count": 2, "kind": "quadratic"}],
    "successive_linearization": [{"norm": "l2", "dither": 0.2}],
}


def variants():
    for attack in ATTACKS:
        function = attack.values[0]
        own = VARIANTS.get(function.__name__, [])
        targeted = [{"targeted": True}] * ("targeted" in inspect.signature(function).parameters)
        for settings in ({}, *own, *targeted):
            yield pytest.param(function, settings, id=f"{attack.id} {settings}")


@pytest.mark.cuda
@pytest.mark.parametrize(("attack", "settings"), list(variants()))
@pytest.mark.filterwarnings("ignore")
def test_devices_agree(attack, settings):
    move = {"steps": 20} if "steps" in inspect.signature(attack).parameters else {}
    change = lambda x, y: (x, (y + 1) % 3 if settings.get("targeted") else y)  # noqa: E731
    here, there = (
        call(attack, make_scene(device=place, dtype=torch.float64), change, **move | settings)
        for place in ("cpu", "cuda")
    )
    assert there.device.type == "cuda"
    if attack.__name__ == "pdpgd":  # of points that are equally near either may be found
        x = make_scene(dtype=torch.float64).x
        assert np.allclose(lengths(here - x, 2.0), lengths(there.cpu() - x, 2.0), rtol=1e-4)
    else:
        assert torch.allclose(here, there.cpu(), atol=1e-6)
