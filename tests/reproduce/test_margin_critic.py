"""What Tables 3.1 to 4.2 of the thesis need: relative sizes, single steps, critics, judges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adv.attacks.gradient import fgsm
from adv.lab import committee, data, models
from adv.lab.annotate import Collection
from adv.lab.committee import Committee
from adv.lab.duel import fit_critic, new_critic
from adv.lab.models import MLP
from reproduce import judging, steps, summary
from reproduce.files import read
from reproduce.items import Network, Run
from reproduce.measures import MEASURES, Sample


def plane(d=4):
    """Class 1 where the sum of the values is larger than 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(d), torch.ones(d)]))
        model[1].bias.copy_(torch.tensor([0.0, -1.0]))
    return model.requires_grad_(False)


def test_relative_sizes_have_numpys_quartiles_and_tukeys_whiskers():
    x = torch.rand(60, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 8 + 0.01
    y = torch.zeros(60, dtype=torch.int64)
    push = torch.linspace(1.0, 2.0, 60)
    push[-1] = 12.0  # an outlier, beyond the whisker
    points = x + ((1 - x.flatten(1).sum(1)) / 4 * push)[:, None, None, None]
    points[:6] = x[:6]  # not fooled
    attacked = torch.ones(60, dtype=torch.bool)
    attacked[10] = False
    sample = Sample(plane(), x, y, attacked, [points[attacked]], None, {"norm": "l2"})
    got = MEASURES["relative"](sample)
    kept = attacked & (points.flatten(1).sum(1) > 1)
    ratios = ((points - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))[kept].numpy()
    q1, median, q3 = np.quantile(ratios, [0.25, 0.5, 0.75])
    inside = ratios[(ratios >= q1 - 1.5 * (q3 - q1)) & (ratios <= q3 + 1.5 * (q3 - q1))]
    assert got["found"] == pytest.approx(len(ratios) / 59)
    assert len(ratios) in (52, 53)
    assert got["rho"] == pytest.approx(ratios.mean())
    assert [got["q1"], got["median"], got["q3"]] == pytest.approx([q1, median, q3])
    assert [got["whisker-lo"], got["whisker-hi"]] == pytest.approx([inside.min(), inside.max()])
    assert got["whisker-hi"] < ratios.max()


def test_whiskers_are_of_one_and_a_half_ranges():
    """Sizes 10, 11, ..., 20 and two more, 1.45 interquartile ranges off the quartiles."""
    sizes = torch.cat([torch.linspace(10, 20, 11), torch.tensor([0.0, 0.0])])
    sizes[-2:] = torch.tensor([12 - 1.45 * 6, 18 + 1.45 * 6])
    q1, q3 = np.quantile(sizes.numpy(), [0.25, 0.75])
    assert (q1, q3) == pytest.approx((12, 18))
    x = torch.full((13, 1, 1, 1), 0.01)
    points = x + 0.01 * sizes.view(-1, 1, 1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -0.02]))
    y = torch.zeros(13, dtype=torch.int64)
    everyone = torch.ones(13, dtype=torch.bool)
    got = MEASURES["relative"](Sample(model, x, y, everyone, [points], None, {"norm": "l2"}))
    assert got["found"] == 1
    assert got["whisker-lo"] == pytest.approx(12 - 1.45 * 6, rel=1e-4)
    assert got["whisker-hi"] == pytest.approx(18 + 1.45 * 6, rel=1e-4)


def test_an_attack_that_found_nothing_has_no_sizes_and_no_judges():
    x, everyone = torch.full((5, 1, 2, 2), 0.1), torch.ones(5, dtype=torch.bool)
    council = Committee({"a": lambda x: x[0].new_zeros(len(x))})
    sample = Sample(plane(), x, 0 * everyone, everyone, [x], None, {"norm": "l2"})
    got = MEASURES["relative"](sample)
    assert got.pop("found") == 0
    assert got.keys() == {"rho", "q1", "median", "q3", "whisker-lo", "whisker-hi"}
    assert all(map(math.isnan, got.values()))
    told = MEASURES["judged"](replace(sample, settings={"norm": "l2", "committee": council}))
    assert told.pop("answers") == 0
    assert told.keys() == {"change", "no-change", "rest", "right-on-clean", "change-a"}
    assert all(map(math.isnan, told.values()))


def test_single_steps_leave_the_box_or_not():
    x = torch.tensor([[0.15, 0.15, 0.15, 0.15], [0.9, 0.9, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]])
    x, y = x[:, None, None, :], torch.tensor([0, 1, 1])
    model = plane()
    given = torch.ones(3, dtype=torch.bool)
    sample = Sample(model, x, y, given, [x], [0.2], {"norm": "linf"})
    got = MEASURES["single_step"](sample)
    # Outside: sums 1.4, 1.0 and 0.4 against the threshold 1 (a tie is no success).
    # Inside: 1.4, 1.4 (the zeros stay) and 0.4.
    assert got == {"outside": 1.0, "inside": pytest.approx(2 / 3)}


def test_judges_see_what_the_committee_says_of_fooled_images():
    x = torch.full((5, 1, 2, 2), 0.1)
    y = torch.zeros(5, dtype=torch.int64)
    points = torch.full_like(x, 0.4)
    points[4] = 0.1  # not fooled, and not asked about
    points[:, 0, 0, 0] += torch.tensor([0.0, 0.1, 0.2, 0.3, 0.0])
    said = {0.4: 1, 0.5: 1, 0.6: 0, 0.7: 1}

    def first(x):
        return torch.tensor([said.get(round(float(v), 1), 0) for v in x[:, 0, 0, 0]])

    def last(x):
        return torch.zeros(len(x), dtype=torch.int64)

    council = Committee({"a": first, "b": last, "c": first})
    given = {"norm": "l2", "committee": council}
    sample = Sample(plane(), x, y, torch.ones(5, dtype=torch.bool), [points], None, given)
    got = MEASURES["judged"](sample)
    assert (got["answers"], got["change"], got["no-change"], got["rest"]) == (4, 0.75, 0.25, 0)
    assert (got["change-a"], got["change-b"], got["right-on-clean"]) == (0.75, 0, 1)


def test_convincing_are_images_that_network_and_committee_name_alike_and_wrong():
    """Three members that know the sum of the values; points at sums on both sides of 1."""
    x = torch.tensor([0.1, 0.2, 0.7, 0.9]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    y = torch.tensor([0, 0, 1, 1])
    near = torch.tensor([0.1, 0.3, 0.2]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    far = torch.tensor([0.3, 0.4, 0.1]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    attacked = torch.tensor([True, True, True, False])

    def strict(z):  # says 1 above a sum of 1.5 only
        return torch.where(z.flatten(1).sum(1) > 1.5, 1, 0)

    council = Committee(dict.fromkeys("abc", strict))
    given = {"committee": council}
    got = MEASURES["convincing"](Sample(plane(), x, y, attacked, [near, far], [0.1, 0.2], given))
    assert got["eps"] == [0.1, 0.2]
    assert got["fooled"] == pytest.approx([2 / 3, 1])
    assert got["convincing"] == pytest.approx([1 / 3, 2 / 3])


def test_a_tie_convinces_nobody():
    """As for every other measure: equal logits of the own class and another are no success."""
    x = torch.full((2, 1, 2, 2), 0.25)  # both logits are 0
    y, everyone = torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool)
    council = Committee({"a": lambda x: torch.zeros(len(x), dtype=torch.int64)})
    given = {"committee": council}
    got = MEASURES["convincing"](Sample(plane(), x, y, everyone, [x], [0.1], given))
    assert (got["fooled"], got["convincing"]) == ([0], [0])


def test_portraits_are_of_each_class_the_first_image(thesis):
    thesis.content["attacks"]["shown"] = thesis.content["attacks"]["own"] | {
        "images": 60,
        "measures": ["portraits"],
    }
    del thesis.content["attacks"]["shown"]["judges"]
    thesis.content["figures"] = {
        "controls-1": {
            "cell": {"model": "fcnn", "attack": "shown"},
            "images": {
                "clean": {"defense": "none", "value": "picture-source"},
                "plain": {"defense": "none", "value": "picture-input"},
                "dropout": {"defense": "dropout", "value": "picture-input"},
            },
        }
    }
    thesis.write()
    plan = thesis.plan()
    run = Run(Network("convex", "digits", "fcnn", "none", 0), "shown")
    steps.train(plan, run.network)
    steps.attack(plan, run)
    steps.measure(plan, run)
    content = summary.figure(plan, plan.items["convex-figure-controls-1"])
    assert [row["label"] for row in content["rows"]] == ["clean", "plain"]
    assert [entry["curve"] for entry in content["missing"]] == ["dropout"]
    clean, plain = content["rows"]
    some = data.load("digits").test[torch.arange(60) * 400 // 60]
    first = [some.y.tolist().index(k) for k in range(10)]
    assert clean["said"] == list("0123456789")
    shown = np.stack(summary.strip(clean["png"])) / 255
    assert np.abs(shown - some.x[first, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    points, model = (
        torch.load(plan.points(run), weights_only=True),
        steps._network(plan, run.network),
    )
    where = {int(i): n for n, i in enumerate(points["attacked"].nonzero()[:, 0])}
    want = torch.stack([points["points"][0][where[i]] if i in where else some.x[i] for i in first])
    shown = np.stack(summary.strip(plain["png"])) / 255
    assert np.abs(shown - want[:, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    assert plain["said"] == list(map(str, model(want).argmax(1).tolist()))
    fooled = [a != b for a, b in zip(plain["said"], clean["said"], strict=True)]
    assert sum(fooled) >= 8
    assert summary.draw(content)[:4] == b"\x89PNG"


@pytest.fixture
def thesis(bench):
    """A small version of the settings: a dropout variant, a critic, judges."""
    networks = bench.content["networks"]
    # Not what fit_critic takes where nothing is said.
    networks["fcnn"]["training"] |= {"batch_size": 50}
    networks["robust"] = networks["fcnn"] | {
        "seeds": 1,
        "loss": {"name": "defenses.adversarial.trades", "eps": 0.1, "steps": 2},
    }
    bench.content["defenses"] |= {
        "dropout": {"model": {"dropout": 0.5}},
        "critic": {"critic": {"sizes": [64, 16, 10], "weight": 0.5, "halve_every": 2, "steps": 2}},
    }
    own = {"call": "confidence.high_confidence", "norm": "l2", "confidence": None, "steps": 50}
    own |= {"max_step": 0.3, "judges": "robust", "images": 200, "measures": ["relative", "judged"]}
    bench.content["attacks"]["own"] = own
    bench.content["tables"]["3"]["columns"] = {"rho1": {"attack": "own", "value": "rho"}}
    bench.content["tables"]["3"]["rows"] = {
        name: {"model": "fcnn", "defense": name} for name in ("none", "dropout", "critic")
    }
    bench.write()
    return bench


def test_judges_are_trained_first_and_belong_to_the_record(thesis):
    plan = thesis.plan()
    run = Run(Network("convex", "digits", "fcnn", "none", 0), "own")
    judge = Network("convex", "digits", "robust", "none", 0)
    assert plan.used(run) == judge
    assert plan.attack(run)["judges"]["robust"]["loss"]["name"] == "defenses.adversarial.trades"
    tasks = [task.subject for task in plan.tasks([plan.items["convex-3"]])]
    assert tasks.index(judge) < tasks.index(run)
    assert "reproduce.steps.perturbed" in plan.versions(run)
    for network in (judge, run.network):
        steps.train(plan, network)
    steps.attack(plan, run)
    steps.measure(plan, run)
    values, record = read(plan.record(run))["values"], read(plan.record(run))
    assert record["used"] == read(plan.record(judge))["weights"]
    assert plan.fault(run) is None
    # The same once more, by hand.
    source = data.load("digits")
    member = steps._network(plan, judge)
    council = committee.assemble(source.train, {"robust network": member})
    points = torch.load(plan.points(run), weights_only=True)
    some = source.test[torch.arange(200) * 2]
    y = some.y[points["attacked"]]
    target = steps._network(plan, run.network)(points["points"][0]).argmax(1)
    fooled = target != y
    want = committee.judge(council.answers(points["points"][0][fooled]), y[fooled], target[fooled])
    assert values["change"] == pytest.approx(want.change.value)
    assert values["no-change"] == pytest.approx(want.no_change.value)
    assert values["answers"] == want.answers > 100
    assert values["change-robust network"] > 0
    thesis.content["networks"]["robust"]["loss"]["eps"] = 0.2
    thesis.write()
    assert "judges.robust" in thesis.plan().fault(run)


def test_people_get_the_images_of_the_networks_that_are_here(thesis, tmp_path):
    plan, out = thesis.plan(), tmp_path / "images.npz"
    with pytest.raises(ValueError, match="no weights"):
        judging.images(plan, plan.items["convex-3"], 10)
    run = Run(Network("convex", "digits", "fcnn", "dropout", 0), "own")
    steps.train(plan, run.network)
    folders = [f"--{n}={thesis.folder / n}" for n in ("settings", "results", "work")]
    judging.main(["convex-3", str(out), "--samples", "40", "--datasets=digits", *folders])
    got, model = Collection.load(out), steps._network(plan, run.network)
    assert set(got.defense) == {"dropout"}
    assert (model(got.images).argmax(1) == got.target).double().mean() > 0.95  # rounded to bytes
    test = data.load("digits").test[torch.arange(40) * 10]
    right = (model(test.x).argmax(1) == test.y).sum()
    assert 0.9 * right <= len(got.y) <= right


def test_a_network_that_was_not_fooled_is_left_out_of_what_people_see(thesis, monkeypatch, capsys):
    plan = thesis.plan()
    for defense in ("none", "dropout"):
        steps.train(plan, Network("convex", "digits", "fcnn", defense, 0))
    whole, kept = judging.collect, {"none"}

    def some(networks, x, y, attack, **given):
        lazy = set(networks) - kept
        return whole(networks, x, y, (lambda model, x, y, **_: x) if lazy else attack, **given)

    monkeypatch.setattr(judging, "collect", some)
    got = judging.images(plan, plan.items["convex-3"], 20)
    assert set(got.defense) == {"none"}
    assert "dropout is left out: the attack fooled none" in capsys.readouterr().err
    kept.clear()
    with pytest.raises(ValueError, match="no row of convex-3 has images"):
        judging.images(plan, plan.items["convex-3"], 20)


def test_a_critic_s_classifier_is_that_of_fit_critic(thesis):
    plan, network = thesis.plan(), Network("convex", "digits", "fcnn", "critic", 1)
    steps.train(plan, network)
    record = read(plan.record(network))
    assert record["settings"]["training"]["critic"]["weight"] == 0.5
    assert record["settings"]["training"]["training"] == {"epochs": 3, "batch_size": 50}
    assert record["values"]["epochs"] == 3
    assert record["values"]["verdict"]
    assert {"adv.lab.duel.fit_critic", "adv.lab.duel.new_critic"} <= record["code"].keys()
    assert not list(plan.weights(network).parent.glob("checkpoint*"))
    model = models.build("mlp", sizes=[64, 16, 10], seed=1)
    critic = new_critic(1, sizes=(64, 16, 10))
    options = {"weight": 0.5, "halve_every": 2, "steps": 2, "epochs": 3, "batch_size": 50}
    fit_critic(model, critic, data.load("digits").train, seed=1, progress=False, **options)
    x = data.load("digits").test.x[:20]
    assert steps._network(plan, network)(x).equal(model(x))


def test_only_the_critic_s_training_has_the_precision_that_it_asks_for(thesis, monkeypatch):
    thesis.content["defenses"]["critic"]["critic"]["products"] = "medium"
    thesis.write()
    plan, network = thesis.plan(), Network("convex", "digits", "fcnn", "critic", 1)
    seen = []

    def watched(*args, **options):
        seen.append(torch.get_float32_matmul_precision())
        return fit_critic(*args, **options)

    monkeypatch.setattr(steps, "fit_critic", watched)
    before = torch.get_float32_matmul_precision()
    steps.train(plan, network)
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == before == "highest"
    assert read(plan.record(network))["settings"]["training"]["critic"]["products"] == "medium"


def test_a_defense_may_change_the_network(thesis):
    plan = thesis.plan()
    plain, dropped = (
        plan.recipe(Network("convex", "digits", "fcnn", d, 0)) for d in ("none", "dropout")
    )
    assert dropped["model"] == plain["model"] | {"dropout": 0.5}
    network = steps.models.build(**dropped["model"])
    assert isinstance(network, MLP)
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 1


def test_fgsm_s_own_bounds_are_what_single_step_means():
    model, x = plane(), torch.full((1, 1, 1, 4), 0.05)
    assert fgsm(model, x, torch.tensor([1]), eps=0.2, bounds=(-0.2, 1.2)).min() < -0.1
