"""The workflow as a user runs it, on digits: what runs, what doesn't, and after a kill."""

import json
import os
import signal
import subprocess
import time

import pytest

from reproduce.files import read
from reproduce.plan import ROOT

pytest.importorskip("snakemake")


def values(plan):
    return {path.relative_to(plan.results): read(path)["values"] for path in records(plan)}


def records(plan):
    return sorted(plan.results.glob("convex/*/*/*/*/*.json"))


def test_a_table_from_nothing_and_then_only_what_changed(bench):
    plan = bench.plan()
    told = bench.run("convex-3")
    assert "no data for nin of convex: cifar10 or cifar10-subset" in told
    assert "6 trainings and attacks to run" in told
    table = read(plan.output(plan.items["convex-3"]))
    assert [row["seeds"] for row in table["rows"]] == [{"test-error": 2, "rho1": 2}, {}]
    assert "missing: nin, rho1: no data" in told
    assert not list(plan.work.glob("**/*.pt"))
    before = {path: path.stat().st_mtime_ns for path in records(plan)}
    assert len(before) == 6

    # One measured again, from weights that are there; the others stay.
    bench.content["attacks"]["deepfool"]["overshoot"] = 0.5
    bench.write()
    told = bench.run("convex-3", "--dry")
    assert told.count("(attack.overshoot changed)") == 2
    assert "2 trainings and attacks to run" in told
    assert {path: path.stat().st_mtime_ns for path in records(plan)} == before
    bench.run("convex-3")
    changed = {path.stem for path in records(plan) if path.stat().st_mtime_ns != before[path]}
    assert changed == {"deepfool"}
    after = read(plan.output(plan.items["convex-3"]))
    assert after["rows"][0]["values"]["test-error"] == table["rows"][0]["values"]["test-error"]
    assert after["rows"][0]["values"]["rho1"] > table["rows"][0]["values"]["rho1"]


def test_a_killed_run_leaves_whole_files_and_goes_on(bench):
    bench.content["networks"]["fcnn"]["seeds"] = 1
    bench.content["networks"]["fcnn"]["training"] |= {"epochs": 400}
    bench.write()
    plan = bench.plan()
    network = plan.runs(plan.items["convex-figure-3a"].cells["PGD",])[0].network
    folder = plan.weights(network).parent
    process = subprocess.Popen(
        bench.command("convex-figure-3a"),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("checkpoint-*.pt"))
    assert not records(plan)
    assert not plan.weights(network).is_file()
    told = bench.run("convex-figure-3a")
    assert read(plan.record(network))["values"]["epochs"] == 400
    assert "convex, figure 3a: 2 curves" in told
    figure = plan.output(plan.items["convex-figure-3a"])
    assert json.loads(figure.read_text())["missing"] == []
    assert (plan.work / "figures" / "convex-figure-3a.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_tables_are_refused(bench):
    assert "no convex-9; there are convex-3" in bench.run("convex-9", "--dry", status=1)
