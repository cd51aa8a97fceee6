"""Judges' answers and the committee, against counts by hand, Wilson's formula and scikit-learn."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import Stretch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import nn

from adv.lab import committee, data, zoo
from adv.lab.committee import UNKNOWN, Committee


def wilson(count, total, z):
    """The roots p of (share - p)^2 = z^2 p (1 - p) / n."""
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(count * (total - count) / total + z * z / 4)
    return centre - half, centre + half


@settings(max_examples=40)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_have_wilsons_interval(counts):
    got = committee.share(*counts)
    assert got.value == counts[0] / counts[1]
    assert (got.low, got.high) == pytest.approx(wilson(*counts, 1.959963984540054), abs=1e-12)
    assert 0 <= got.low <= got.value <= got.high <= 1


def test_the_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(40, 0.9, size=500)
    shares = [committee.share(int(k), 40, level=0.8) for k in draws]
    covered = np.mean([s.low <= 0.9 <= s.high for s in shares])
    assert 0.74 < covered < 0.87


@pytest.mark.parametrize("wrong", [(-1, 5), (6, 5), (0, 0)])
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValueError, match="no share"):
        committee.share(*wrong)
    with pytest.raises(ValueError, match="level"):
        committee.share(1, 2, level=1)


def test_answers_divide_into_three():
    answers = torch.tensor([3, 3, 7, UNKNOWN, 5, 7])
    y = torch.tensor([3, 3, 1, 1, 1, 3])
    target = torch.tensor([7, 1, 7, 7, 7, 7])
    got = committee.judge(answers, y, target)
    assert got.answers == 6
    assert [s.value for s in (got.change, got.no_change, got.rest)] == [2 / 6, 2 / 6, 2 / 6]
    frame = committee.table({"none": got, "other": committee.judge(y, y, target)})
    assert list(frame.index) == ["none", "other"]
    assert frame.loc["other", "no_change"] == 100
    assert frame.loc["other", "no_change low"] == pytest.approx(
        100 * wilson(6, 6, 1.959963984540054)[0]
    )
    assert frame.loc["none", ["change", "no_change", "rest"]].sum() == pytest.approx(100)
    assert str(got.change) == "33.3 % (9.7 to 70.0)"


def test_failed_attacks_and_shapes_are_refused():
    three = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="own class"):
        committee.judge(three, three, torch.tensor([2, 1, 3]))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        committee.judge(three[:2], three, three + 1)


def test_the_committee_says_what_more_than_half_say():
    g = torch.Generator().manual_seed(0)
    votes = torch.randint(3, (4, 1200), generator=g)
    members = {str(i): lambda x, i=i: votes[i, x[:, 0].long()] for i in range(4)}
    got = Committee(members).answers(torch.arange(1200.0)[:, None])
    for j in range(1200):
        (label, count), *_ = Counter(votes[:, j].tolist()).most_common()
        assert got[j] == (label if count > 2 else UNKNOWN)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_members_are_the_named_classifiers(digits):
    network = zoo.load("digits/cnn-trades")
    council = committee.assemble(digits.train, {"robust": network}, svm_samples=300)
    test = digits.test
    votes = council.votes(test.x)
    x, y = digits.train.x.flatten(1).numpy(), digits.train.y.numpy()
    near = KNeighborsClassifier(n_neighbors=5).fit(x, y).predict(test.x.flatten(1).numpy())
    machine = SVC(C=10.0).fit(x[:300], y[:300]).predict(test.x.flatten(1).numpy())
    assert votes["nearest neighbors"].tolist() == near.tolist()
    assert votes["support vector machine"].tolist() == machine.tolist()
    assert votes["robust"].equal(network(test.x).argmax(1))
    accuracy = council.accuracy(test)
    assert accuracy["all"] > 0.97
    assert accuracy["support vector machine"] == (machine == test.y.numpy()).mean()
    assert set(accuracy) == {*votes, "all"}


def test_small_perturbations_change_nothing_and_swaps_do(digits):
    council = committee.assemble(digits.train, {"robust": zoo.load("digits/cnn-trades")})
    test = digits.test.take(200)
    target = (test.y + 1) % 10
    noise = 0.05 * torch.randn(test.x.shape, generator=torch.Generator().manual_seed(1))
    unchanged = committee.judge(council.answers((test.x + noise).clamp(0, 1)), test.y, target)
    assert unchanged.no_change.low > 0.93
    rest = digits.test[200:]
    other = torch.stack([rest.x[rest.y == t][i % 10] for i, t in enumerate(target)])
    assert committee.judge(council.answers(other), test.y, target).change.low > 0.9


def test_networks_in_training_mode_are_refused(digits):
    moving = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="mine: in training mode"):
        committee.assemble(digits.train, {"mine": moving})
    moving.eval()[1].train()
    with pytest.raises(ValueError, match="mine: in training mode"):
        committee.assemble(digits.train, {"mine": moving})


def test_a_committee_has_members_and_leaves_images_as_they_are():
    with pytest.raises(ValueError, match="at least one member"):
        Committee({})
    digits = data.load("digits").train[:50]
    network = nn.Sequential(Stretch(in_place=True), nn.Flatten(), nn.Linear(64, 10)).eval()
    x = digits.x.clone()
    committee.assemble(digits, {"in place": network}).answers(x)
    assert torch.equal(x, digits.x)
