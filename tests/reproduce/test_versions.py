"""A digest changes with the code that a function uses, and with nothing else."""

import ast
import shutil

import pytest

from reproduce import versions
from reproduce.files import write_json
from reproduce.items import Network, Run

MAIN = '''
"""A module."""
from adv.tools import scale as times
from adv import tools

LIMIT = 3
TABLE = {"a": first, "b": second}

def first(x):
    """What it does."""
    return times(x) + LIMIT  # plus

def second(x):
    return tools.shift(x)

def within(x):
    from adv.tools import shift as moved

    return moved(x)

class Third:
    def go(self):
        return first(self)
'''
TOOLS = "def scale(x):\n    return 2 * x\n\ndef shift(x):\n    return x + 1\n"


@pytest.fixture
def digests(tmp_path, monkeypatch):
    (tmp_path / "adv").mkdir()
    (tmp_path / "adv" / "__init__.py").write_text("")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    names = ("first", "second", "within", "Third", "TABLE[a]")

    def get(main=MAIN, tools=TOOLS):
        (tmp_path / "adv" / "main.py").write_text(main)
        (tmp_path / "adv" / "tools.py").write_text(tools)
        clear()
        return {name: versions.digest(f"adv.main.{name}") for name in names}

    yield get
    clear()


clear = versions._forget


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_words_and_neighbors_do_not_count(digests):
    before = digests()
    assert before == digests(MAIN.replace("What it does.", "It does more.").replace("  # plus", ""))
    assert before == digests(MAIN + "\ndef fourth(x):\n    return x\n")
    assert len(set(before.values())) == 5


def test_how_an_object_describes_itself_does_not_count(digests):
    told = MAIN + "\n    def extra_repr(self):\n        return str(LIMIT)\n"
    assert digests() == digests(told)
    assert changed(digests(), digests(told.replace("extra_repr", "size"))) == {"Third"}


def test_empty_fields_that_a_newer_python_adds_do_not_count():
    node = ast.parse("def f(x):\n    return f'{x}'").body[0]

    class FunctionDef(ast.FunctionDef):
        _fields = (*ast.FunctionDef._fields, "newer", "older")

    fields = {name: getattr(node, name) for name in node._fields}
    assert versions._shape(FunctionDef(**fields, newer=[], older=None)) == versions._shape(node)
    used = FunctionDef(**fields, newer=[ast.Name("T")], older=None)
    assert versions._shape(used) != versions._shape(node)


def test_none_and_an_empty_list_are_told_apart_from_nothing():
    shapes = [versions._shape(ast.parse(f"return {text}")) for text in ("", "None", "[]", "[None]")]
    assert len(set(map(repr, shapes))) == 4


def test_what_is_used_counts_however_far_away(digests):
    before = digests()
    after = digests(tools=TOOLS.replace("2 * x", "3 * x"))
    assert changed(before, after) == {"first", "Third", "TABLE[a]"}
    assert changed(before, digests(tools=TOOLS.replace("x + 1", "x - 1"))) == {
        "second",
        "within",
    }
    assert changed(before, digests(MAIN.replace("LIMIT = 3", "LIMIT = 4"))) == {
        "first",
        "Third",
        "TABLE[a]",
    }
    assert changed(before, digests(MAIN.replace("first(self)", "self"))) == {"Third"}


def test_a_constant_is_all_that_is_assigned_to_it(digests):
    grown = MAIN.replace("LIMIT = 3", "LIMIT = 3\nLIMIT += 1")
    assert changed(digests(), digests(grown)) == {"first", "Third", "TABLE[a]"}
    assert changed(digests(grown), digests(grown.replace("+= 1", "+= 2")))


def test_a_definition_alone_is_itself(digests):
    def alone(tools=TOOLS, **changed):
        digests(tools=tools, **changed)
        return versions.digest("adv.main.first (alone)")

    before = alone()
    assert before == alone(TOOLS.replace("2 * x", "3 * x"))
    assert before != alone(main=MAIN.replace("times(x) +", "times(x) -"))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the code, and what to call to edit it."""
    for folder in versions.PACKAGES:
        shutil.copytree(
            versions.ROOT / folder,
            tmp_path / "code" / folder,
            ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".py")],
        )
    monkeypatch.setattr(versions, "ROOT", tmp_path / "code")

    def edit(file, find, replace):
        path = tmp_path / "code" / file
        text = path.read_text()
        assert text.count(find) == 1
        path.write_text(text.replace(find, replace))
        clear()

    clear()
    yield edit
    clear()


STEPS, DATA = "reproduce/steps.py", "adv/lab/data.py"
EDITS = [
    (STEPS, "stages += [(settings[", "stages += [(1 + settings[", {"train"}),
    (STEPS, "return function if is_loss else", "return function if not is_loss else", {"train"}),
    (STEPS, "(torch.rand(len(x)) < 0.5)", "(torch.rand(len(x)) < 0.4)", {"train"}),
    (STEPS, "for eps in sorted(grid or ()):", "for eps in grid or ():", {"pgd", "own"}),
    (STEPS, "return success(model, some.x, some.y, targeted=True)", "return None", {"pgd", "own"}),
    (
        DATA,
        "bunch.images[:, None]).float() / 16",
        "bunch.images[:, None]).float() / 15",
        {"train", "pgd", "own"},
    ),
    ("adv/lab/committee.py", "SVC(C=penalty)", "SVC(C=2 * penalty)", {"own"}),
    ("adv/lab/models.py", "nn.init.xavier_uniform_(", "nn.init.xavier_normal_(", {"train"}),
]


@pytest.mark.parametrize(("file", "find", "replace", "outdated"), EDITS)
def test_code_between_the_functions_counts_for_records_that_list_it(
    bench, copied, file, find, replace, outdated
):
    bench.content["networks"]["fcnn"]["training"]["augment"] = True
    bench.content["attacks"]["own"] = {"measures": ["error"], "judges": "fcnn"}
    bench.write()
    plan, network = bench.plan(), Network("convex", "digits", "fcnn", "none", 0)
    subjects = {"train": network} | {name: Run(network, name) for name in ("pgd", "own")}
    code = {name: plan.versions(subject) for name, subject in subjects.items()}

    def older(lists):
        for name, subject in subjects.items():
            content = {"settings": {}, "weights": "w", "code": lists(name)}
            write_json(plan.record(subject), content)
        return {name for name, subject in subjects.items() if plan.older(subject)}

    assert older(code.get) == set()
    copied(file, find, replace)
    assert older(code.get) == outdated
    # Records of before that list less, and stand; but not without what was listed always.
    basis = {name: plan.code(subject).steady for name, subject in subjects.items()}
    assert older(lambda name: {key: code[name][key] for key in basis[name]}) == set()
    assert older(lambda name: {}) == set(subjects)


def test_the_files_are_those_of_the_code():
    names = {path.name for path in versions.files("adv.attacks.boundary.deepfool")}
    assert names >= {"boundary.py", "common.py", "geometry.py"}
    assert "convex.py" not in names


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no 'nothing' in adv\.geometry"):
        versions.digest("adv.geometry.nothing")
    with pytest.raises(ValueError, match=r"no module adv\.nowhere"):
        versions.digest("adv.nowhere.nothing")
    with pytest.raises(ValueError, match="no entry 'vgg'"):
        versions.digest("adv.lab.models._MODELS[vgg]")
