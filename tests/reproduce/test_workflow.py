"""The workflow as a user runs it, on digits: what runs, what doesn't, and after a kill."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from reproduce import judging, summary
from reproduce.__main__ import alone, main
from reproduce.files import read
from reproduce.plan import ROOT, _datasets


def records(plan):
    return sorted(plan.results.glob("convex/*/*/*/*/*.json"))


def kill_in_training(bench, folder):
    """Start a run and end it, with all its processes, once a training has saved something."""
    process = subprocess.Popen(
        bench.command("convex-3"),
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
    assert list(folder.glob("checkpoint-*.pt")), "a training that saved something in two minutes"


def test_a_table_from_nothing_in_spite_of_a_kill_and_then_only_what_changed(bench):
    bench.content["networks"]["fcnn"]["seeds"] = 1
    bench.content["networks"]["fcnn"]["training"]["epochs"] = 400
    bench.write()
    plan = bench.plan()
    item = plan.items["convex-3"]
    (run,) = plan.wanted(item.cells["fcnn", "rho1"])
    weights = plan.weights(run.network)
    kill_in_training(bench, weights.parent)
    assert not weights.exists()
    assert not records(plan)

    told = bench.run("convex-3")
    assert "no data for nin of convex: cifar10 or cifar10-subset" in told
    assert "3 trainings and attacks to run: about 5 s" in told
    assert "missing: nin, rho1: no data" in told
    assert read(plan.record(run.network))["values"]["epochs"] == 400
    table = read(plan.output(item))
    assert [row["seeds"] for row in table["rows"]] == [{"test-error": 1, "rho1": 1}, {}]
    assert [path.stem for path in records(plan)] == ["clean", "deepfool", "train"]
    assert not list(plan.work.glob("**/*.pt"))
    before = {path: path.stat().st_mtime_ns for path in [*records(plan), weights]}

    # Only what changed runs again, from weights that are there, but not from old points.
    plan.points(run).write_bytes(b"left by a killed run")
    bench.content["attacks"]["deepfool"]["overshoot"] = 0.5
    bench.write()
    told = bench.run("convex-3", "--dry")
    assert "deepfool  (attack.overshoot changed)" in told
    _, after = told.split("1 trainings and attacks to run")
    assert len(after.splitlines()) < 15, "Snakemake's own words are few"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    bench.run("convex-3")
    changed = [path.stem for path in before if path.stat().st_mtime_ns != before[path]]
    assert changed == ["deepfool"]
    (old, _), (new, _) = table["rows"], read(plan.output(item))["rows"]
    assert new["values"]["test-error"] == old["values"]["test-error"]
    assert new["values"]["rho1"] > old["values"]["rho1"]

    # What a training is to replace stays until it is done.
    kept = {path: path.read_bytes() for path in [*records(plan), weights]}
    bench.content["networks"]["fcnn"]["training"]["epochs"] = 401
    bench.write()
    kill_in_training(bench, weights.parent)
    assert {path: path.read_bytes() for path in kept if path.exists()} == kept
    bench.run("convex-3")
    assert [read(path)["settings"]["training"]["training"]["epochs"] for path in records(plan)] == [
        401
    ] * 3
    assert not [path for path, old in kept.items() if path.read_bytes() == old]
    assert not list(plan.work.glob("**/*.pt"))


def test_unknown_names_are_refused(bench):
    told = bench.run("convex-9", "--dry", status=1)
    assert "reproduce: no table or figure convex-9; there are convex-3" in told
    told = bench.run("convex-3", "--only=vgg", "--dry", status=1)
    assert "reproduce: no network vgg; there are fcnn, nin" in told


def test_of_many_names_the_closest_are_told(bench):
    table = bench.content["tables"]["3"]
    bench.content["tables"] = {f"{part}.{k}": table for part in (3, 4) for k in range(1, 8)}
    bench.write()
    with pytest.raises(ValueError, match=r"convex-3\.9; closest: convex-3") as told:
        bench.plan().item("convex-3.9")
    assert str(told.value).endswith("; python -m reproduce --list lists all 15")
    assert "convex-4.7" not in str(told.value)
    listed = bench.run("--list").splitlines()
    assert listed == ["convex-3.1", *listed[1:13], "convex-4.7", "convex-figure-3a"]


def test_a_dry_run_hides_no_error(bench):
    wrong = bench.run("convex-3", "--dry", "--snakemake", "--until", "nothing", status=1)
    assert "No rule to produce nothing" in wrong


def test_names_may_have_dots_and_a_dry_run_leaves_no_trace(bench):
    content = bench.content
    content["networks"]["mlp-1.5"] = content["networks"].pop("fcnn") | {"seeds": 1}
    content["defenses"]["at-0.1"] = {"training": {"epochs": 2}}
    content["attacks"]["clean.all"] = content["attacks"].pop("clean")
    content["tables"] = {
        "4.1": {
            "rows": {"at": {"model": "mlp-1.5", "defense": "at-0.1"}},
            "columns": {"test-error": {"attack": "clean.all", "value": "error"}},
        }
    }
    del content["figures"]
    bench.write()
    told = bench.run("--dry", "--snakemake", "--quiet", "rules")
    assert "2 trainings and attacks to run" in told
    assert re.search(r"^total +4$", told, flags=re.M)  # train, attack, measure, table
    assert not {"results", "work"} & {path.name for path in bench.folder.iterdir()}
    # Nor does one wait for a run that goes on.
    with alone(bench.plan().work):
        bench.run("--dry")
        assert "another run holds" in bench.run(status=1)


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with alone(tmp_path / "work") as lock:
        assert os.fstat(lock)
    assert "no locks in" in capsys.readouterr().err


def test_what_is_wrong_with_data_or_settings_is_said_in_a_line(bench, monkeypatch):
    folders = [f"--{name}={bench.folder / name}" for name in ("settings", "results", "work")]
    _datasets.cache_clear()
    monkeypatch.setenv("ADV_DATA", str(bench.folder / "nowhere"))
    with pytest.raises(SystemExit, match=r"^reproduce: ADV_DATA=.*nowhere is not a folder"):
        main(["convex-3", "--dry", *folders])
    bench.content["tables"]["3"]["columns"]["rho1"]["attack"] = "depfool"
    bench.write()
    with pytest.raises(SystemExit, match=r"^reproduce: convex-3, fcnn, rho1: no 'depfool'"):
        main(["convex-3", "--dry", *folders])
    (bench.folder / "settings/convex.yaml").write_text("networks: [")
    with pytest.raises(SystemExit, match=r"^reproduce: .*convex\.yaml is no YAML"):
        main(["convex-3", "--dry", *folders])
    bench.write()
    bench.content["tables"]["3"]["columns"]["rho1"]["attack"] = "deepfool"
    bench.write()
    damaged = bench.folder / "results/convex/digits/fcnn/none/seed-0/train.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.raises(SystemExit, match=r"^reproduce: .*seed-0/train\.json is no JSON"):
        main(["convex-3", "--dry", "--datasets=digits", *folders])


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (summary, ["convex-9"], "no table or figure convex-9; there are convex-3"),
        (judging, ["convex-9", "images.npz"], "no table or figure convex-9"),
        (judging, ["convex-figure-3a", "images.npz"], "convex-figure-3a is no table"),
        (judging, ["convex-3", "nowhere/images.npz"], "no folder nowhere for images.npz"),
    ],
)
def test_other_commands_say_what_is_wrong_in_a_line_too(bench, program, arguments, message):
    folders = [f"--{name}={bench.folder / name}" for name in ("settings", "results", "work")]
    with pytest.raises(SystemExit, match=rf"^{program.__name__}: {message}"):
        program.main([*arguments, "--datasets=digits", *folders])


def test_ctrl_c_lets_snakemake_end_its_jobs(tmp_path):
    child = (
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'started').touch()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    sys.exit(7)"
    )
    line = [sys.executable, "-c", child, str(tmp_path)]
    program = (
        "import signal, sys\n"
        "from reproduce.__main__ import launch\n"
        # A shell that starts the tests in the background lets them ignore Ctrl+C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(launch({line!r}, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 7
    assert told == b""
