"""The steps one by one, in this process, against direct computations."""

import functools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adv.attacks.boundary import deepfool
from adv.attacks.gradient import pgd
from adv.lab import data, models, peers
from adv.lab.claims import compare
from adv.lab.evaluation import psnr
from adv.lab.files import sha256
from adv.lab.training import fit
from reproduce import steps, summary
from reproduce.files import dumps, read, write_json
from reproduce.items import Network, Run
from reproduce.measures import MEASURES, Sample
from reproduce.plan import Plan


@pytest.fixture
def network():
    return Network("convex", "digits", "fcnn", "none", 0)


def make(plan, *runs):
    for run in runs:
        if not plan.whole(run.network):
            steps.train(plan, run.network)
        steps.attack(plan, run)
        steps.measure(plan, run)
        plan.points(run).unlink()


def trained(plan, network):
    model = models.build("mlp", sizes=[64, 16, 10])
    model.load_state_dict(load_file(plan.weights(network)))
    return model.eval()


def test_a_record_holds_value_settings_and_origin(bench, network):
    plan, run = bench.plan(), Run(network, "pgd")
    make(plan, run)
    record = read(plan.record(run))
    assert record["settings"]["training"]["training"] == {
        "epochs": 3,
        "batch_size": 100,
        "lr": 0.01,
    }
    assert record["settings"]["attack"]["eps"] == [0.05, 0.1]
    assert record["seed"] == 0
    assert (
        record["weights"] == sha256(plan.weights(network)) == read(plan.record(network))["weights"]
    )
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"]["type"] in ("cpu", "cuda", "mps")
    assert record["code"].keys() >= {"adv.attacks.gradient.pgd", "reproduce.measures.fooling"}
    assert record["images"] == 60
    assert record["of"] == 400
    assert record["complete"] is True
    assert record["seconds"] > 0
    assert record["commit"] is None or len(record["commit"]) == 40
    assert plan.fault(run) is plan.fault(network) is None


def test_fooling_ratio_is_that_of_the_attack_called_directly(bench, network):
    plan = bench.plan()
    make(plan, Run(network, "pgd"), Run(network, "deepfool"), Run(network, "clean"))
    model, test = trained(plan, network), data.load("digits").test
    everywhere = (model(test.x).argmax(1) != test.y).double().mean()
    clean = read(plan.record(Run(network, "clean")))
    assert clean["values"]["error"] == pytest.approx(float(everywhere), abs=1e-12)
    some = [400 * i // 60 for i in range(60)]
    x, y = test.x[some], test.y[some]
    correct = model(x).argmax(1) == y
    x, y = x[correct], y[correct]
    ratios = [
        float((model(pgd(model, x, y, eps=eps, steps=3)).argmax(1) != y).double().mean())
        for eps in (0.05, 0.1)
    ]
    assert read(plan.record(Run(network, "pgd")))["values"] == {
        "eps": [0.05, 0.1],
        "fooling": ratios,
    }
    r = (deepfool(model, x, y, norm="linf") - x).abs().flatten(1).amax(1)
    values = read(plan.record(Run(network, "deepfool")))["values"]
    assert values["rho1"] == pytest.approx(float((r / x.flatten(1).amax(1)).mean()), rel=1e-5)
    shares = [float((r <= eps * (1 + 1e-6)).double().mean()) for eps in (0.05, 0.1)]
    assert values["fooling"] == shares
    beyond = [eps for eps in sorted(r.tolist()) if float((r <= eps).double().mean()) > 0.99]
    assert values["eps99"] == pytest.approx(beyond[0], rel=1e-5)


def test_a_color_pixel_counts_once_as_a_pixel_and_once_for_each_channel_as_values():
    class Total(torch.nn.Module):
        def forward(self, x):
            total = x.flatten(1).sum(1)
            return torch.stack([1 - total, total - 1], 1)

    x, everyone = torch.zeros(4, 3, 2, 2), torch.ones(4, dtype=torch.bool)
    points = x.clone()
    points[0, :, 0, 1] = 1.0  # one pixel, three values
    points[1, 0, 0, 0] = points[1, 1, 1, 1] = 1.0  # two pixels, two values
    points[2, 2, 1, 0] = 0.5  # does not fool, so it does not count
    y = torch.zeros(4, dtype=torch.long)
    sample = Sample(Total().eval(), x, y, everyone, [points], None, {})
    assert MEASURES["counts"](sample) == {"values": 2.5, "pixels": 1.5, "found": 0.5}


def test_rho2_of_a_linear_model_is_the_distance_to_its_boundary():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 2, dtype=torch.float64)
    ).eval()
    x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    y = model(x).argmax(1)
    everyone = torch.ones(5, dtype=torch.bool)
    sample = Sample(model, x, y, everyone, [x], None, {"norm": "linf"})
    (w1, w2), gap = model[1].weight.detach(), model(x).detach().diff(dim=1).abs().flatten()
    expected = gap / (w1 - w2).abs().sum()
    values = MEASURES["radius"](sample)
    assert values["rho2"] == pytest.approx(float(expected.mean()), rel=1e-12)
    assert values["rho2-nearest"] == pytest.approx(float(expected.mean()), rel=1e-12)
    assert values["rho2-median"] == pytest.approx(float(expected.median()), rel=1e-12)


def test_eps99_is_infinite_where_the_attack_fails_too_often():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.zero_()
    x = torch.full((100, 1, 1, 1), 0.5)
    y, everyone = torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.bool)
    points = -x
    for failing, expected in ((0, 1.0), (1, math.inf)):
        points[:failing] = x[:failing]
        sample = Sample(model, x, y, everyone, [points], None, {"norm": "linf"})
        values = MEASURES["minimal"](sample)
        assert values["eps99"] == expected
        assert values["found"] == pytest.approx(1 - failing / 100)


@pytest.mark.parametrize("count", [1, 10, 99, 101, 150, 200, 250])
def test_eps99_is_the_smallest_radius_that_fools_more_than_99_percent(count):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.zero_()
    x = torch.full((count, 1, 1, 1), 0.5, dtype=torch.float64)
    sizes = 0.6 + torch.randperm(count, generator=torch.Generator().manual_seed(0)) / 1024
    y, everyone = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
    points = x - sizes.double()[:, None, None, None]
    sample = Sample(model, x, y, everyone, [points], None, {"norm": "linf"})
    enough = [r for r in sizes.tolist() if 100 * int((sizes <= r).sum()) > 99 * count]
    assert MEASURES["minimal"](sample)["eps99"] == pytest.approx(min(enough), abs=1e-9)


@pytest.mark.parametrize("size", [64, 203, 215])
def test_eigenvalues_are_stored_first_all_then_every_fifth(size):
    draws = torch.Generator().manual_seed(0)
    points = torch.rand(600, size, generator=draws) * torch.linspace(1, 2, size)
    x, y = points.reshape(600, 1, 1, size), torch.arange(600) % 2
    everyone = torch.ones(600, dtype=torch.bool)
    values = MEASURES["spectra"](Sample(torch.nn.Identity(), x, y, everyone, [x], None, {}))
    expected = [*range(1, min(200, size) + 1), *(i for i in (205, 210, 215) if i <= size)]
    assert values["index"] == expected
    for label in (0, 1):
        covariance = points[y == label].double().T.cov()
        largest = torch.linalg.eigvalsh(covariance).flip(0)[[i - 1 for i in expected]]
        assert values[f"spectrum-{label}"] == pytest.approx(largest.tolist(), rel=1e-3)


@pytest.mark.parametrize("best", [True, False, None])
def test_images_are_held_out_only_for_the_best_epoch(bench, network, monkeypatch, best):
    """Without ``best`` the last epoch's weights are what the paper's recipe asks for."""
    if best is not None:
        bench.content["networks"]["fcnn"]["training"]["best"] = best
    bench.write()
    seen = []

    def watched(model, train, **settings):
        seen.append((train, settings["val"]))
        return fit(model, train, **settings)

    monkeypatch.setattr(steps, "fit", watched)
    steps.train(bench.plan(), network)
    ((train, val),) = seen
    source = data.load("digits")
    assert len(train) == len(source.train)
    if best:
        assert torch.equal(val.x, source.val.x)
    else:
        assert val is None


def test_a_training_is_that_of_its_recipe_and_seed(bench):
    plan, network = bench.plan(), Network("convex", "digits", "fcnn", "none", 1)
    steps.train(plan, network)
    model = models.build("mlp", sizes=[64, 16, 10], seed=1)
    train = data.load("digits").train
    history = fit(model, train, epochs=3, batch_size=100, lr=0.01, seed=1, progress=False)
    stored = load_file(plan.weights(network))
    assert all(bool((stored[name] == value).all()) for name, value in model.state_dict().items())
    record = read(plan.record(network))
    assert record["values"] == {"loss": history.loss[-1], "epochs": 3}
    assert record["parameters"] == 64 * 16 + 16 + 16 * 10 + 10


def test_psnr_of_an_autoencoder_that_halves_its_input():
    model = torch.nn.Identity().eval()
    model.forward = lambda x: x / 2
    x = torch.full((4, 1, 2, 2), 0.5)
    points, everyone = [x + 0.1, x - 0.01], torch.ones(4, dtype=torch.bool)
    sample = Sample(model, x, everyone.long(), everyone, points, [0.1, 0.01], {"target": "input"})
    values = MEASURES["noise_ratio"](sample)
    assert values["input"] == pytest.approx([20, 40], abs=1e-4)
    assert values["clean"] == pytest.approx(-20 * math.log10(0.25))
    outputs = [-20 * math.log10(0.2), -20 * math.log10(0.255)]
    assert values["output"] == pytest.approx(outputs, abs=1e-4)
    values = MEASURES["noise_ratio"](replace(sample, settings={"target": "output"}))
    assert values["clean"] == math.inf
    assert values["output"] == pytest.approx(
        [-20 * math.log10(0.05), -20 * math.log10(0.005)], abs=1e-4
    )


def test_norms_and_robust_accuracy_are_those_of_the_perturbations():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        model[1].bias.zero_()
    x = torch.full((5, 2, 1, 1), 0.25)
    y = torch.tensor([0, 0, 0, 0, 1])  # the last one is misclassified as it is
    attacked = y == 0
    points = x[attacked].clone()
    points[0] -= 0.3
    points[1] -= 0.5
    points[2, 0] = -0.5
    settings = {"norm": "linf", "measured_at": [0.1, 0.3, 0.6, 1.0]}
    sample = Sample(model, x, y, attacked, [points], None, settings)
    values = MEASURES["norms"](sample)
    assert values["mean"] == pytest.approx((0.3 + 0.5 + 0.75) / 3)
    assert values["median"] == pytest.approx(0.5)
    assert values["found"] == 0.75
    assert values["all"] == math.inf
    assert MEASURES["robust"](sample) == {
        "eps": [0.1, 0.3, 0.6, 1.0],
        "robust": [4 / 5, 3 / 5, 2 / 5, 1 / 5],
    }
    assert MEASURES["correct"](sample) == {"accuracy": 0.8}
    pixels = replace(sample, settings=settings | {"norm": "group_l0", "measured_at": [1]})
    assert MEASURES["norms"](pixels)["mean"] == 1
    values = replace(sample, settings=settings | {"norm": "l0"})
    assert MEASURES["norms"](values)["mean"] == pytest.approx(5 / 3)
    at = replace(sample, points=[x[attacked], points], eps=[0.1, 1.0])
    assert MEASURES["robust"](at) == {"eps": [0.1, 1.0], "robust": [4 / 5, 1 / 5]}


def test_nested_radii_attack_only_what_still_stands(bench, network, monkeypatch):
    bench.content["attacks"]["pgd"] |= {"nested": True, "measures": ["robust"]}
    bench.content["networks"]["fcnn"]["eps"] = {"none": {"linf": [0.01, 0.1, 0.2]}}
    bench.write()
    plan, run, given = bench.plan(), Run(network, "pgd"), []

    @functools.wraps(pgd)
    def counted(model, x, y, **settings):
        given.append(len(x))
        return pgd(model, x, y, **settings)

    monkeypatch.setattr("adv.attacks.gradient.pgd", counted)
    make(plan, run)
    record = read(plan.record(run))
    assert record["values"]["eps"] == [0.01, 0.1, 0.2]
    shares = record["values"]["robust"]
    assert given[0] == record["attacked"]
    assert [round(share * 60) for share in shares[:-1]] == given[1:]
    assert shares == sorted(shares, reverse=True)
    assert record["passes"]["backward"] == pytest.approx(3 * sum(given) / record["attacked"])


def test_a_peer_is_called_counted_and_told_with_its_libraries(bench, network):
    bench.content["attacks"]["ddn"] = {
        "call": "peers.ddn",
        "norm": "l2",
        "steps": 20,
        "settings": {"init_epsilon": 0.5},
        "measured_at": [0.5],
        "measures": ["norms", "robust"],
    }
    bench.write()
    plan, run = bench.plan(), Run(network, "ddn")
    make(plan, run)
    record = read(plan.record(run))
    assert record["passes"]["backward"] == 20
    assert record["versions"].keys() >= {"foolbox", "adversarial-robustness-toolbox"}
    assert "adv.lab.peers.attack" in record["code"]
    model, test = trained(plan, network), data.load("digits").test
    some = test[torch.tensor([400 * i // 60 for i in range(60)])]
    correct = model(some.x).argmax(1) == some.y
    x, y = some.x[correct], some.y[correct]
    x_adv = peers.attack("ddn", model, x, y, norm="l2", steps=20, settings={"init_epsilon": 0.5})
    fooled = model(x_adv).argmax(1) != y
    mean = (x_adv - x)[fooled].flatten(1).norm(dim=1).mean()
    assert record["values"]["mean"] == pytest.approx(float(mean), rel=1e-5)


def test_a_cell_that_cannot_be_says_why_and_runs_nothing(bench):
    bench.content["tables"]["3"]["columns"]["rho2"] = {"missing": "no library has it"}
    bench.write()
    plan = bench.plan()
    item = plan.items["convex-3"]
    assert plan.runs(item.cells["fcnn", "rho2"]) == []
    why = {(gap["row"], gap["column"]): gap["why"] for gap in summary.table(plan, item)["missing"]}
    assert why["fcnn", "rho2"] == "no library has it"
    assert {task.subject.attack for task in plan.tasks([item]) if task.step == "attack"} == {
        "clean",
        "deepfool",
    }


def test_radii_of_a_psnr_fill_the_ball():
    x = torch.rand(3, 1, 4, 5)
    for norm in ("linf", "l2"):
        (eps,) = steps.radii({"eps": {"psnr": [15]}, "norm": norm}, x)
        delta = torch.ones_like(x) * (eps if norm == "linf" else eps / math.sqrt(20))
        assert psnr(x + delta, x).tolist() == pytest.approx([15] * 3, abs=1e-4)
    assert steps.radii({"eps": [0.1, 1]}, x) == [0.1, 1.0]
    assert steps.radii({}, x) is None


def test_regression_attacks_get_what_they_take(monkeypatch):
    seen = []

    def linear(model, x, y=None, *, eps, norm="linf", steps=1, bounds=(0, 1), seed=0):
        seen.append((y, eps, norm, steps, seed))
        return x

    def noise(x, *, eps, norm="l2", count=1):
        seen.append((norm, count))
        return x

    monkeypatch.setattr("adv.attacks.gradient.pgd", linear)
    monkeypatch.setattr("adv.attacks.gradient.fgsm", noise)
    model, x, y = (
        torch.nn.Identity().eval(),
        torch.rand(3, 1, 2, 2),
        torch.zeros(3, dtype=torch.int64),
    )
    settings = {
        "call": "gradient.pgd",
        "norm": "l2",
        "steps": 4,
        "measures": ["error"],
        "eps": [0.1],
    }
    for target, expected in (("labels", y), ("input", x), ("output", None)):
        steps.perturbed(model, x, y, 0.1, settings | {"target": target}, 5)
        given, *rest = seen.pop()
        assert rest == [0.1, "l2", 4, 5]
        assert given is None if expected is None else bool((given == expected).all())
    pixels = {"call": "gradient.fgsm", "norm": "pixels", "ball": "linf", "count": "eps"}
    steps.perturbed(model, x, y, 0.1, pixels, 0)
    assert seen == [("pixels", 0.1)]


def test_a_network_of_luminance_is_given_it(bench):
    part = data.load("patches").test
    some = steps.chosen(part, {"images": 8}, {"input": "luminance"})
    assert some.x.shape == (8, 1, 16, 16)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(some.x[1, 0], (part.x[50] * weights).sum(0), atol=1e-6)
    assert len(steps.chosen(part, {"images": None}, {})) == len(part)


def test_a_training_goes_on_where_it_was_killed(bench, network, monkeypatch):
    whole = bench.plan()
    steps.train(whole, network)
    expected = whole.weights(network).read_bytes()
    whole.weights(network).unlink()
    whole.record(network).unlink()
    rename, saved = Path.replace, []

    def dying(path, target):
        if saved:
            raise KeyboardInterrupt
        saved.append(target)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", dying)
        with pytest.raises(KeyboardInterrupt):
            steps.train(whole, network)
    assert not whole.record(network).is_file()
    assert not whole.weights(network).is_file()
    assert len(list(whole.weights(network).parent.glob("checkpoint-*.pt"))) == 1
    steps.train(whole, network)
    assert whole.weights(network).read_bytes() == expected
    assert not list(whole.weights(network).parent.glob("checkpoint-*.pt"))


def test_a_record_names_the_code_that_ran_not_that_of_the_end(bench, network, monkeypatch):
    """Files may change while a training of hours runs, whose record must not say it is of them."""
    plan, run = bench.plan(), Run(network, "pgd")
    before = {one: plan.versions(one) for one in (network, run)}

    def edited(function, patch):
        @functools.wraps(function)
        def call(*arguments, **settings):
            patch.setattr(Plan, "versions", lambda _, one: dict.fromkeys(before[one], "0" * 12))
            return function(*arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(steps, "fit", edited(fit, patch))
        steps.train(plan, network)
    assert read(plan.record(network))["code"] == before[network]
    with monkeypatch.context() as patch:
        patch.setattr("adv.attacks.gradient.pgd", edited(pgd, patch))
        steps.attack(plan, run)
        steps.measure(plan, run)
    measured = {"reproduce.measures.fooling": "0" * 12}
    assert read(plan.record(run))["code"] == before[run] | measured
    assert plan.fault(run) == "code of reproduce.measures.fooling changed"


def test_a_training_does_not_go_on_from_what_other_code_or_a_model_of_other_weights_left(
    bench, network, monkeypatch
):
    files = []

    def stopped(model, train, *, checkpoint, **settings):
        files.append(checkpoint.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "fit", stopped)
    now = bench.plan().versions(network)
    for code, used in (
        (now, {}),
        (now, {}),
        (now | {"adv.lab.training.fit": "0"}, {}),
        (now, {"used": "1"}),
    ):
        monkeypatch.setattr(Plan, "versions", lambda *_, code=code: code)
        monkeypatch.setattr(steps, "_which", lambda *_, used=used: used)
        monkeypatch.setattr(Plan, "files", lambda *_: [])
        with pytest.raises(KeyboardInterrupt):
            steps.train(bench.plan(), network)
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_other_weights_than_the_record_s_are_refused(bench, network):
    plan = bench.plan()
    make(plan, Run(network, "clean"))
    plan.weights(network).write_bytes(b"other")
    with pytest.raises(ValueError, match="aren't the weights of"):
        steps.attack(plan, Run(network, "clean"))


def test_points_of_other_settings_are_refused(bench, network):
    plan, run = bench.plan(), Run(network, "pgd")
    steps.train(plan, network)
    steps.attack(plan, run)
    bench.content["attacks"]["pgd"]["steps"] = 4
    bench.write()
    with pytest.raises(ValueError, match="of other settings or weights"):
        steps.measure(bench.plan(), run)


def test_table_and_figure_are_means_over_seeds_and_tell_what_is_missing(bench):
    plan = bench.plan()
    item, drawing = plan.items["convex-3"], plan.items["convex-figure-3a"]
    for cell in item.cells.values():
        if cell.model == "fcnn":
            make(plan, *plan.runs(cell))
    content = summary.table(plan, item)
    errors = [
        100 * read(plan.record(run))["values"]["error"]
        for run in plan.runs(item.cells["fcnn", "test-error"])
    ]
    fcnn, nin = content["rows"]
    assert fcnn["values"]["test-error"] == statistics.mean(errors)
    assert fcnn["spread"]["test-error"] == pytest.approx(abs(errors[0] - errors[1]) / math.sqrt(2))
    assert fcnn["seeds"] == {"test-error": 2, "rho1": 2}
    assert fcnn["images"] == {"test-error": 400, "rho1": 60}
    assert nin["values"] == {"test-error": None, "rho1": None}
    assert content["missing"][0] == {
        "row": "nin",
        "column": "test-error",
        "why": "no data: cifar10-subset",
    }
    assert (
        compare("convex", "3", ours=content["rows"])
        .iloc[0, 1]
        .startswith(f"{fcnn['values']['test-error']:.1f}")
    )
    shown = summary.show(content)
    assert "digits: 60 of 400 test images" in shown
    assert "missing: nin, rho1: no data" in shown
    content = summary.figure(plan, drawing)
    runs = plan.runs(drawing.cells["DeepFool",])
    ratios = [read(plan.record(run))["values"]["fooling"] for run in runs]
    assert content["curves"]["DeepFool"]["y"] == pytest.approx(
        [50 * (a + b) for a, b in zip(*ratios, strict=True)]
    )
    assert content["clean"]["mean"] == fcnn["values"]["test-error"]
    assert content["missing"] == [{"curve": "PGD", "why": "not run, on digits"}]
    assert summary.draw(content)[:4] == b"\x89PNG"


def invented(plan, item, values):
    """Records of a figure's or table's runs with values as the measures might give them."""
    for cell in item.needed:
        for run in plan.runs(cell):
            settings = {"training": plan.recipe(run.network), "attack": plan.attack(run)}
            record = {"settings": settings, "weights": "w", "seed": run.network.seed}
            record |= {"images": 60, "of": 400, "complete": True, "dataset": "digits"}
            write_json(plan.record(run), record | {"values": values(run)})


def test_one_missing_value_leaves_a_gap_in_a_curve_and_no_spread(bench):
    plan = bench.plan()
    item = plan.items["convex-figure-3a"]
    shares = {0: [0.2, 0.4], 1: [0.4, None]}
    invented(
        plan,
        item,
        lambda run: {"eps": [0.05, 0.1], "fooling": shares[run.network.seed], "error": 0.1},
    )
    content = summary.figure(plan, item)
    curve = content["curves"]["PGD"]
    assert curve["y"][0] == pytest.approx(30)
    assert curve["spread"] == [pytest.approx(20 / math.sqrt(2)), None]
    assert math.isnan(curve["y"][1])
    assert content["clean"]["spread"] == 0
    assert summary.draw(content)[:4] == b"\x89PNG"
    assert summary._spread([1.0]) is summary._spread([]) is None
    assert summary._spread([1.0, math.inf]) is None


def test_a_mistyped_value_is_named_as_the_reason(bench):
    bench.content["tables"]["3"]["columns"]["test-error"]["value"] = "eror"
    bench.content["figures"]["3a"]["cell"]["value"] = "foolign"
    bench.write()
    plan = bench.plan()
    table, drawing = plan.items["convex-3"], plan.items["convex-figure-3a"]
    invented(plan, drawing, lambda run: {"eps": [0.1], "error": 0.1, "rho1": None})
    gaps = summary.table(plan, table)["missing"]
    why = {(gap["row"], gap["column"]): gap["why"] for gap in gaps}
    assert why["fcnn", "test-error"] == "no value 'eror'; there are eps, error, rho1"
    assert why["fcnn", "rho1"] == "no finite value for every seed"
    content = summary.figure(plan, drawing)
    assert {gap["why"] for gap in content["missing"]} == {
        "no value 'foolign'; there are eps, error, rho1"
    }
    assert len(content["missing"]) == 2
    bench.content["figures"]["3a"] |= {"x": "esp", "cell": {"model": "fcnn", "value": "error"}}
    bench.write()
    plan = bench.plan()
    content = summary.figure(plan, plan.items["convex-figure-3a"])
    assert {gap["why"][:14] for gap in content["missing"]} == {"no value 'esp'"}


def test_what_older_code_made_is_marked(bench, network):
    plan, run = bench.plan(), Run(network, "clean")
    make(plan, run)
    item = plan.items["convex-3"]
    assert not any("older code" in scale for scale in summary.table(plan, item)["rows"][0]["scale"])
    record = read(plan.record(run))
    record["code"]["reproduce.measures.error"] = "0"
    write_json(plan.record(run), record)
    (scale,) = summary.table(plan, item)["rows"][0]["scale"]
    assert scale.endswith("trained for 3 epochs, by older code")


def test_json_is_short_and_without_infinity():
    content = {"a": math.inf, "b": [1.0, math.nan], "c": {"long": list(range(60)), "d": "é"}}
    text = dumps(content)
    assert json.loads(text) == {
        "a": None,
        "b": [1.0, None],
        "c": {"long": list(range(60)), "d": "é"},
    }
    assert len(text.splitlines()) < 10


def test_the_command_line_names_the_step(bench, network):
    folders = [f"--{name}={bench.folder / name}" for name in ("settings", "results", "work")]
    steps.main(["train", "convex", "digits", "fcnn", "none", "0", *folders])
    steps.main(["attack", "convex", "digits", "fcnn", "none", "0", "clean", *folders])
    steps.main(["measure", "convex", "digits", "fcnn", "none", "0", "clean", *folders])
    assert read(bench.plan().record(Run(network, "clean")))["values"]["error"] < 0.5
