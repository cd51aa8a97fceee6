"""A digest changes with the code that a function uses, and with nothing else."""

import pytest

from reproduce import versions

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

    def clear():
        versions.digest.cache_clear()
        versions._source.cache_clear()
        versions._closure.cache_clear()

    yield get
    clear()


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_words_and_neighbors_do_not_count(digests):
    before = digests()
    assert before == digests(MAIN.replace("What it does.", "It does more.").replace("  # plus", ""))
    assert before == digests(MAIN + "\ndef fourth(x):\n    return x\n")
    assert len(set(before.values())) == 5


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
