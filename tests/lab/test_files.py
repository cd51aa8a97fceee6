"""Files that are whole or not there."""

import pytest

from adv.lab.files import replacing


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "result.txt"
    with replacing(path) as draft:
        assert draft.parent == path.parent
        draft.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("first")

    def die():
        with replacing(str(path)) as draft:
            draft.write_text("sec")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_the_draft(tmp_path):
    path = tmp_path / "result.txt"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
