"""The conventions that hold across the module: import direction, docstrings, attacks' manners."""

import ast
import importlib
import inspect
import math
import pkgutil
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import adv
import adv.attacks
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


def attacks():
    """Public functions of the families that take a model, inputs and what to aim at.

    A function of the inputs alone is noise, not an attack.
    """
    for info in pkgutil.iter_modules(adv.attacks.__path__):
        module = importlib.import_module(f"adv.attacks.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            given = list(inspect.signature(function).parameters)
            if {"bounds", "seed"} <= set(given) and given[0] != "x":
                yield pytest.param(function, id=f"{info.name}.{name}")


CONVENTION = {"targeted": False, "bounds": (0.0, 1.0), "seed": 0, "observe": None}


@pytest.mark.parametrize("attack", list(attacks()))
def test_signature(attack):
    given = inspect.signature(attack).parameters
    kinds = [p.kind for p in given.values()]
    positional = [name for name, p in given.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3, "all after the third argument is keyword-only"
    assert positional[1] == "x"
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert {"bounds", "seed", "observe"} <= set(given)
    assert {"eps", "steps", "queries"} & set(given)
    for name, default in CONVENTION.items():
        if name in given:
            assert given[name].default == default, name
    assert all(p.annotation is not p.empty for p in given.values())
    assert "Source:" in inspect.getdoc(attack)


def callable_plainly(attack):
    """Whether (model, x, y) and a radius are all that an attack needs."""
    given = inspect.signature(attack).parameters
    needed = {name for name, p in given.items() if p.default is p.empty}
    return list(given)[:3] == ["model", "x", "y"] and needed <= {"model", "x", "y", "eps"}


PLAIN = [param for param in attacks() if callable_plainly(param.values[0])]
EPS = 0.3


@pytest.fixture
def scene():
    """A network with every kind of state an attack could disturb, and inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(12, 3),
        )
        x = torch.rand(5, 1, 4, 4)
        model.train()
        model(torch.rand(64, 1, 4, 4))  # running statistics unlike the defaults
    model[4].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model[1].weight.requires_grad_(False)
    was = [module.training for module in model.modules()]
    y = model.eval()(x).argmax(dim=1)
    for module, flag in zip(model.modules(), was, strict=True):
        module.training = flag
    return model, x, y


def regression(attack):
    """Whether the targets are outputs, which have a default, and not labels."""
    return inspect.signature(attack).parameters["y"].default is None


def aim(attack, y):
    """The labels, or for regression what the scene's network would return for them."""
    return nn.functional.one_hot(y, 3).float() if regression(attack) else y


def settings_for(attack):
    given = inspect.signature(attack).parameters
    small = {"steps": 3, "queries": 20}
    chosen = {name: value for name, value in small.items() if name in given}
    return chosen | ({"eps": EPS} if "eps" in given else {})


def state(model, x):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), x]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    generators = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    return [t.tolist() for t in tensors], flags, generators, x.requires_grad, x.grad is None


@pytest.mark.parametrize("attack", PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_attacks_leave_everything_as_it_was(attack, scene):
    model, x, y = scene[0], scene[1], aim(attack, scene[2])
    before = state(model, x)
    x_adv = attack(model, x, y, **settings_for(attack))
    assert state(model, x) == before
    assert x_adv.shape == x.shape
    assert (x_adv.dtype, x_adv.device) == (x.dtype, x.device)
    assert not x_adv.requires_grad
    assert x_adv.data_ptr() != x.data_ptr(), "the result must not share memory with the input"
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize("attack", PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_attacks_repeat_themselves_also_without_gradients(attack, scene):
    model, x, y = scene[0], scene[1], aim(attack, scene[2])
    first = attack(model, x, y, **settings_for(attack))
    torch.rand(3)  # the global state plays no part
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, **settings_for(attack)), first)


@pytest.mark.parametrize("attack", PLAIN)
@pytest.mark.filterwarnings("ignore")
def test_radius_is_kept_and_observe_is_called(attack, scene):
    model, x, y = scene[0], scene[1], aim(attack, scene[2])
    seen = []
    x_adv = attack(
        model, x, y, observe=lambda step, state: seen.append(state), **settings_for(attack)
    )
    assert seen
    assert all(isinstance(entry, dict) and entry for entry in seen)
    given = inspect.signature(attack).parameters
    if "eps" in given and "norm" in given:
        kind = given["norm"].default
        distance = pixels(x_adv - x) if kind == "l0" else length(x_adv - x, kind)
        assert distance.max() <= EPS + 1e-5


@pytest.mark.parametrize("attack", PLAIN)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, y: (x + 1, y), ValueError),
        (lambda x, y: (x * math.nan, y), ValueError),
        (lambda x, y: ((10 * x).long(), y), TypeError),
        (lambda x, y: (x, y[:2]), ValueError),
        (lambda x, y: (x, y + (math.nan if y.is_floating_point() else 3)), ValueError),
        (lambda x, y: (x, y.long() if y.is_floating_point() else y.float()), TypeError),
        (lambda x, y: (x.numpy(), y), TypeError),
    ],
    ids=["bounds", "nan", "integers", "count", "target", "target type", "numpy"],
)
def test_bad_input_is_refused(attack, scene, change, error):
    model, x, y = scene[0], scene[1], aim(attack, scene[2])
    with pytest.raises(error):
        attack(model, *change(x, y), **settings_for(attack))


WRONG = [{"norm": "l9"}, {"norm": 0.5}, {"eps": -0.1}, {"steps": 0}, {"seed": -1}]


@pytest.mark.parametrize(
    ("attack", "wrong"),
    [
        pytest.param(attack.values[0], wrong, id=f"{attack.id} {wrong}")
        for attack in PLAIN
        for wrong in WRONG
        if set(wrong) <= set(inspect.signature(attack.values[0]).parameters)
    ],
)
def test_bad_settings_are_refused(attack, wrong, scene):
    model, x, y = scene[0], scene[1], aim(attack, scene[2])
    with pytest.raises(ValueError, match=next(iter(wrong))):
        attack(model, x, y, **settings_for(attack) | wrong)
