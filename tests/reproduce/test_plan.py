"""What is to be computed, what of it is there, and why something is to be done again."""

import json
import math

import pytest

from adv.lab.files import sha256
from reproduce import summary
from reproduce.files import dumps, read
from reproduce.items import Network, Run
from reproduce.plan import Plan

DIGITS = Network("convex", "digits", "fcnn", "none", 0)


def pretend(plan, *subjects, seconds=2.0):
    """Records as the steps would write them."""
    for subject in subjects:
        network = subject if isinstance(subject, Network) else subject.network
        settings = {"training": plan.recipe(network)}
        if isinstance(subject, Run):
            settings["attack"] = plan.attack(subject)
        content = {"settings": settings, "weights": "w", "seconds": seconds}
        path = plan.record(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | {"code": plan.versions(subject)}))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tables_become_runs_of_every_seed(bench):
    plan = bench.plan()
    assert list(plan.items) == ["convex-3", "convex-figure-3a"]
    cell = plan.items["convex-3"].cells["fcnn", "test-error"]
    assert (cell.scale, cell.value, cell.at) == (100, "error", None)
    seeds = [run.network.seed for run in plan.runs(cell)]
    assert seeds == [0, 1]
    assert plan.record(plan.runs(cell)[1]) == (
        bench.folder / "results/convex/digits/fcnn/none/seed-1/clean.json"
    )
    assert plan.attack(Run(DIGITS, "pgd"))["eps"] == [0.05, 0.1]
    assert plan.attack(Run(DIGITS, "clean"))["images"] is None


def test_the_first_data_set_that_is_there_is_used(bench):
    cell = bench.plan().items["convex-3"].cells["nin", "rho1"]
    for there, used in (
        ({"cifar10", "cifar10-subset"}, "cifar10"),
        ({"cifar10-subset"}, "cifar10-subset"),
        (set(), "cifar10-subset"),
    ):
        plan = bench.plan(datasets=frozenset(there))
        assert plan.runs(cell)[0].network.dataset == used
        assert bool(plan.wanted(cell)) == bool(there)
    # Stored results need no data.
    run = Run(Network("convex", "cifar10", "nin", "none", 1), "deepfool")
    pretend(plan, run)
    assert plan.wanted(cell) == [run]


def test_what_changed_runs_again(bench):
    plan, run = bench.plan(), Run(DIGITS, "pgd")
    assert plan.fault(run) == "new"
    pretend(plan, DIGITS, run)
    assert plan.fault(run) is plan.fault(DIGITS) is None
    bench.content["attacks"]["pgd"]["steps"] = 4
    bench.write()
    assert bench.plan().fault(run) == "attack.steps changed"
    assert bench.plan().fault(DIGITS) is None
    assert not bench.plan().current(run)
    bench.content["attacks"]["pgd"]["steps"] = 3
    bench.content["networks"]["fcnn"]["training"]["lr"] = 0.02
    bench.write()
    assert bench.plan().fault(run) == "training.training.lr changed"
    assert bench.plan().fault(DIGITS) == "training.training.lr changed"


@pytest.mark.parametrize("content", ['{"weights": "w"}', "{}", "[]"])
def test_a_file_that_is_no_record_is_named(bench, content):
    plan, run = bench.plan(), Run(DIGITS, "pgd")
    pretend(plan, DIGITS, run)
    plan.record(run).write_text(content)
    for ask in (plan.fault, plan.current, plan.older, plan.estimate):
        with pytest.raises(ValueError, match=r"pgd\.json is no record: it has no settings"):
            ask(run)


def test_code_and_weights_count_as_changes(bench):
    plan, run = bench.plan(), Run(DIGITS, "pgd")
    pretend(plan, DIGITS, run)
    code = json.loads(plan.record(run).read_text())["code"]
    edit(plan.record(run), code=code | {"adv.attacks.gradient.pgd": "0"})
    assert plan.fault(run) == "code of adv.attacks.gradient.pgd changed"
    assert plan.current(run)
    assert bench.plan(trust=True).fault(run) is None
    edit(plan.record(run), code=code)
    edit(plan.record(DIGITS), weights="v")
    assert plan.fault(run) == "of other weights"


def test_tasks_are_the_trainings_and_attacks_that_will_run(bench):
    plan = bench.plan()
    table, figure = plan.items.values()
    tasks = plan.tasks([table, figure])
    assert [task.step for task in tasks] == ["train", *["attack"] * 3] * 2
    assert {task.subject.network.model for task in tasks if task.step == "attack"} == {"fcnn"}
    other = Network("convex", "digits", "fcnn", "none", 1)
    runs = [
        Run(network, name)
        for network in (DIGITS, other)
        for name in plan.paper("convex")["attacks"]
    ]
    pretend(plan, DIGITS, other, *runs)
    assert plan.tasks([table, figure]) == []
    # An attack needs weights, which git doesn't keep; what is trained anew is measured anew.
    plan.record(runs[2]).unlink()
    reasons = {task.subject: task.reason for task in plan.tasks([table, figure])}
    assert reasons.pop(DIGITS) == "the weights aren't here"
    assert reasons.pop(runs[2]) == "new"
    assert reasons == dict.fromkeys(runs[:2], "trained anew")
    assert plan.tasks([table]) == []


def test_some_attacks_are_skipped(bench):
    plan, whole = bench.plan(skip=("pgd",)), bench.plan()
    items = [plan.items["convex-figure-3a"]]
    attacks = {task.subject.attack for task in plan.tasks(items) if task.step == "attack"}
    assert attacks == {"clean", "deepfool"}
    assert {path.stem for path in plan.inputs(items[0])} == attacks
    assert {path.stem for path in whole.inputs(items[0])} == {*attacks, "pgd"}


def test_radii_may_depend_on_defense_and_norm(bench):
    grids = {"none": {"linf": [0.1], "l2": [1.0]}, "at": {"linf": [0.3], "l2": [2.0]}}
    bench.content["networks"]["fcnn"]["eps"] = grids
    bench.content["defenses"]["at"] = {}
    bench.content["attacks"]["deepfool"]["norm"] = "l2"
    bench.write()
    plan = bench.plan()
    for defense, grid in grids.items():
        network = Network("convex", "digits", "fcnn", defense, 0)
        assert plan.attack(Run(network, "pgd"))["eps"] == grid["linf"]
        assert plan.attack(Run(network, "deepfool"))["measured_at"] == grid["l2"]
        assert "eps" not in plan.attack(Run(network, "clean"))


def test_only_some_networks(bench):
    plan = bench.plan(only=("nin",), datasets=frozenset({"digits", "cifar10-subset"}))
    networks = {
        task.subject.network
        for task in plan.tasks(list(plan.items.values()))
        if task.step == "attack"
    }
    assert {network.dataset for network in networks} == {"cifar10-subset"}
    table = plan.items["convex-3"]
    assert all("nin" in path.parts for path in plan.inputs(table))
    pretend(plan, Run(DIGITS, "clean"))
    assert plan.record(Run(DIGITS, "clean")) in plan.inputs(table)


def test_time_is_estimated_by_records_or_settings(bench):
    plan, other = bench.plan(), Network("convex", "digits", "fcnn", "none", 1)
    assert plan.estimate(DIGITS) == 5
    assert math.isnan(plan.estimate(Run(DIGITS, "pgd")))
    pretend(plan, other, Run(other, "pgd"), seconds=7.0)
    assert plan.estimate(DIGITS) == plan.estimate(Run(DIGITS, "pgd")) == 7
    pretend(plan, DIGITS, seconds=3.0)
    assert plan.estimate(DIGITS) == 3


def test_unknown_names_are_refused(bench):
    with pytest.raises(ValueError, match=r"no settings .*nobody\.yaml; there are convex"):
        bench.plan().paper("nobody")
    with pytest.raises(
        ValueError, match="no 'vgg' in networks of the settings; there are fcnn, nin"
    ):
        bench.plan().recipe(Network("convex", "digits", "vgg", "none", 0))


def mistyped(bench, message, **changes):
    column = bench.content["tables"]["3"]["columns"]["rho1"]
    before = dict(column)
    column |= changes
    bench.write()
    with pytest.raises(ValueError, match=message):
        bench.plan().check()
    column.clear()
    column |= before


def test_what_is_mistyped_in_a_cell_is_said_before_anything_runs(bench):
    where = "convex-3, fcnn, rho1: "
    mistyped(bench, where + "no 'depfool' in attacks .* there are clean, d", attack="depfool")
    mistyped(bench, where + "no 'nnoe' in defenses .* there are none", defense="nnoe")
    mistyped(
        bench,
        where + r"no radius 0\.2 of deepfool; there are 0\.05, 0\.1",
        value="fooling",
        at=0.2,
    )
    mistyped(bench, "a cell of convex has no atack; there are model, attack", atack="pgd")
    bench.content["tables"]["3"]["columns"]["rho1"] |= {"value": "fooling", "at": 0.1}
    bench.content["tables"]["3"]["rows"]["other"] = {"model": "fcnnn", "missing": "no such network"}
    bench.write()
    bench.plan().check()
    bench.content["attacks"]["deepfool"] |= {"nested": True}
    bench.content["attacks"]["deepfool"] |= {"eps": [0.1, 0.05]}
    bench.write()
    with pytest.raises(ValueError, match="the radii of deepfool, which is nested, must rise"):
        bench.plan().check()
    bench.content["attacks"]["deepfool"] |= {"nested": False}
    bench.content["figures"]["3a"]["clean"]["attack"] = "claen"
    bench.write()
    with pytest.raises(ValueError, match="convex-figure-3a, clean: no 'claen' in attacks"):
        bench.plan().check()


def test_weights_at_hand_are_those_of_the_record(bench):
    plan = bench.plan()
    pretend(plan, DIGITS)
    assert not plan.whole(DIGITS)
    plan.weights(DIGITS).parent.mkdir(parents=True)
    plan.weights(DIGITS).write_bytes(b"weights")
    assert not plan.whole(DIGITS), "other weights than those that the record is of"
    edit(plan.record(DIGITS), weights=sha256(plan.weights(DIGITS)))
    assert plan.whole(DIGITS)


def test_the_stored_settings_fit_the_papers_tables():
    from adv.lab.claims import paper

    plan = Plan(datasets=frozenset())
    for item in plan.items.values():
        entries = paper(item.paper)["tables" if item.kind == "table" else "figures"]
        printed = next((entry for entry in entries if str(entry["id"]) == item.id), None)
        if printed is None:  # a table of our own, or a figure's part on other data
            assert item.id.startswith(("errors-", "controls-")) or item.kind == "figure"
        elif item.kind == "table":
            rows = {row["id"] for row in printed["rows"]}
            columns = {column["id"] for column in printed["columns"]}
            assert {row for row, _ in item.cells} <= rows
            assert {column for _, column in item.cells} <= columns
        elif isinstance(printed.get("series"), list) and printed.get("curves", True) is not None:
            assert {label for (label,) in item.cells} >= set(printed["series"])
        for cell in item.cells.values():
            for run in plan.runs(cell):
                assert plan.versions(run)
                assert plan.versions(run.network)


def test_the_stored_tables_and_figures_are_what_the_stored_records_give():
    """If not, ``python -m reproduce.summary --datasets=...`` writes them again."""
    datasets = {path.name for path in Plan().results.glob("*/*") if path.is_dir()}
    plan = Plan(datasets=frozenset(datasets))
    for item in plan.items.values():
        if (stored := read(plan.output(item))) is not None:
            made = summary.table if item.kind == "table" else summary.figure
            assert json.loads(dumps(made(plan, item))) == stored, item.name


def test_of_networks_that_are_not_asked_for_stored_results_count(bench):
    """Also where this machine has a data set that comes first, and no results on it."""
    network = bench.content["networks"]["fcnn"]
    network["data"] = ["mnist", "digits"]
    bench.write()
    kept = Network("convex", "digits", "fcnn", "none", 0)
    datasets = frozenset({"mnist", "digits"})
    plan = bench.plan(datasets=datasets)
    cell = plan.items["convex-3"].cells["fcnn", "test-error"]
    pretend(plan, Run(kept, cell.attack))
    assert {run.network.dataset for run in plan.runs(cell)} == {"mnist"}
    for chosen in ({"only": ("nin",)}, {"skip": (cell.attack,)}):
        runs = bench.plan(datasets=datasets, **chosen).runs(cell)
        assert {run.network.dataset for run in runs} == {"digits"}
