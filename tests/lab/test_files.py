"""Files that are whole or not there, and changed by one at a time."""

import hashlib
import threading

import pytest

from adv.lab.files import held, replacing, sha256


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


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    folder, got = tmp_path / "new", threading.Event()

    def other():
        with held(folder):
            got.set()

    thread = threading.Thread(target=other)
    with held(folder):
        thread.start()
        assert not got.wait(0.3)
    thread.join(timeout=20)
    assert got.is_set()


def test_a_digest_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"adversarial" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"adversarial" * 1000).hexdigest()
