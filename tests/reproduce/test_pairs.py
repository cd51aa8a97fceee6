"""Networks that use other ones: pairs for autoencoders, attacks and trainings on a manifold."""

import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from adv.attacks.latent import latent_fgsm, reconstruct
from adv.attacks.representation import match
from adv.lab import data, models
from adv.lab.files import sha256
from adv.lab.generative import VAEManifold
from reproduce import pairs, steps, summary
from reproduce.files import read, write_json
from reproduce.items import Network, Run
from reproduce.measures import MEASURES, Sample
from reproduce.plan import ROOT, Plan

MATCH = {"norm": "l2", "steps": 3, "step_size": 0.3, "bounds": [-1.0, 2.0]}
SETTINGS = {
    "networks": {
        "vae": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "vae", "hidden": [16], "latent": 4},
            "loss": {"name": "lab.generative.elbo", "variance": 0.05},
            "training": {"epochs": 2, "batch_size": 100, "lr": 0.01},
            "images": 40,
        },
        "cvae": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "vae", "hidden": [16], "latent": 4, "classes": 10},
            "loss": {"name": "lab.generative.elbo", "variance": 0.05},
            "training": {"epochs": 2, "batch_size": 100, "lr": 0.01},
        },
        "mlp": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "mlp", "sizes": [64, 16, 10]},
            "training": {"epochs": 3, "batch_size": 100, "lr": 0.01},
            "images": 50,
        },
    },
    "defenses": {
        "none": None,
        "pairs": {"uses": "vae", "pairs": {"count": 12, "attack": "pair"}},
        "shuffled": {"uses": "vae", "pairs": {"count": 12, "attack": "pair", "shuffled": True}},
        "subset": {"pairs": {"count": 12}},
        "latent": {
            "uses": "cvae",
            "loss": {
                "name": "defenses.adversarial.joint",
                "attacks": [
                    {"attack": "fgsm", "eps": 0.1},
                    {"attack": "latent_fgsm", "eps": 0.5, "manifold": "used"},
                ],
            },
            "training": {"warmup": 2, "weight_decay": 0.01, "augment": True},
        },
    },
    "attacks": {
        "clean": {"images": None, "target": "input", "measures": ["reconstruction", "pictures"]},
        "pair": {
            "call": "representation.match",
            "uses": "vae",
            "target": "pair",
            "eps": [1.0],
            "measures": ["reconstruction", "code", "pictures"],
            **MATCH,
        },
        "latent": {
            "call": "latent.latent_fgsm",
            "uses": "cvae",
            "every": True,
            "norm": "linf",
            "eps": [0.0, 0.5],
            "measures": ["kept"],
        },
        "decoded": {
            "call": "latent.reconstruct",
            "uses": "cvae",
            "every": True,
            "measures": ["kept", "spectra"],
        },
    },
    "tables": {
        "errors": {
            "rows": {"pairs": {"defense": "pairs"}},
            "columns": {"pair": {"attack": "pair", "value": "error"}},
            "cell": {"model": "vae"},
        },
        "kept": {
            "rows": {"plain": {"defense": "none"}},
            "columns": {"latent": {"attack": "latent", "value": "kept", "at": 0.5}},
            "cell": {"model": "mlp"},
        },
    },
    "figures": {
        "2": {
            "cell": {"model": "vae", "attack": "pair"},
            "images": {
                "source": {"value": "picture-source"},
                "target": {"value": "picture-wanted"},
            },
        }
    },
}
VAE = Network("autoencoders", "digits", "vae", "none", 0)
PAIRS = Network("autoencoders", "digits", "vae", "pairs", 0)
CVAE = Network("autoencoders", "digits", "cvae", "none", 0)
MLP = Network("autoencoders", "digits", "mlp", "none", 0)
TEST = data.load("digits").test


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "settings").mkdir()
    text = yaml.safe_dump(SETTINGS, sort_keys=False)
    (tmp_path / "settings" / "autoencoders.yaml").write_text(text)
    folders = (tmp_path / name for name in ("settings", "results", "work"))
    return Plan(*folders, datasets=frozenset({"digits"}))


def make(plan, *subjects):
    for subject in subjects:
        if isinstance(subject, Network):
            steps.train(plan, subject)
        else:
            steps.attack(plan, subject)
            steps.measure(plan, subject)


def trained(plan, network):
    model = models.build(**plan.recipe(network)["model"])
    model.load_state_dict(load_file(plan.weights(network)))
    return model.eval()


def strip(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=int)


def test_partners_are_others_and_cover_all():
    numbers = pairs.partners(3000, 10, seed=1)
    assert not bool((numbers == torch.arange(3000) % 10).any())
    counts = torch.bincount((numbers - torch.arange(3000)) % 10, minlength=10)
    assert counts[0] == 0
    assert bool((counts[1:] > 200).all())
    assert not torch.equal(numbers, pairs.partners(3000, 10, seed=2))


def test_one_image_has_no_partner():
    for given in ((1,), (5, 1)):
        with pytest.raises(ValueError, match="two images"):
            pairs.partners(*given)


def test_a_fresh_network_is_trained_on_pairs_made_for_the_other(plan):
    make(plan, VAE)
    vae, train = trained(plan, VAE), data.load("digits").train
    recipe, folder = plan.recipe(PAIRS), plan.work / "pairs" / "name"
    inputs, wanted = pairs.training(vae, train, recipe["pairs"], 0, folder)
    numbers = pairs.partners(12, len(train), 0)
    assert torch.equal(wanted, train.x[numbers])
    assert inputs.y.tolist() == list(range(12))
    with torch.no_grad():
        code = vae.posterior(wanted)[0]
    direct = match(lambda x: vae.posterior(x)[0], train.x[:12], code, eps=1.0, **MATCH)
    assert torch.allclose(inputs.x, direct, atol=1e-6)
    # What is done isn't done again, and counts for other trainings on the same pairs.
    (file,) = folder.glob("*.pt")
    torch.save(torch.zeros(12, 1, 8, 8), file)
    mixed = plan.recipe(Network("autoencoders", "digits", "vae", "shuffled", 0))["pairs"]
    other, same = pairs.training(vae, train, mixed, 0, folder)
    assert float(other.x.abs().max()) == 0
    assert torch.equal(same, wanted)
    assert sorted(other.y.tolist()) == list(range(12)) != other.y.tolist()
    clean, images = pairs.training(None, train, {"count": 12}, 0, folder)
    assert torch.equal(clean.x, images)
    assert torch.equal(images, train.x[:12])


def test_targets_alone_start_from_black(tmp_path):
    vae = models.build("vae", hidden=[16], latent=4, seed=0).eval()
    x, wanted = TEST.x[:5], TEST.x[5:10]
    settings = {"eps": [1.0], "start": "zero", **MATCH}
    points = pairs.attacked(vae, x, wanted, settings, 3, tmp_path)
    with torch.no_grad():
        code = vae.posterior(wanted)[0]
    black = torch.zeros_like(x)
    direct = match(lambda z: vae.posterior(z)[0], black, code, eps=1.0, seed=3, **MATCH)
    assert torch.allclose(points, direct, atol=1e-6)
    with pytest.raises(TypeError, match="for a VAE"):
        pairs.attacked(torch.nn.Identity(), x, wanted, settings, 0, tmp_path)


def test_each_part_of_the_pairs_has_a_seed_and_a_file_of_its_own(tmp_path, monkeypatch):
    vae = models.build("vae", hidden=[16], latent=4, seed=0).eval()
    seeds = []

    def noted(encode, x, code, *, seed, **settings):
        seeds.append((len(x), seed))
        return match(encode, x, code, seed=seed, **settings)

    monkeypatch.setattr(pairs, "PART", 4)
    monkeypatch.setattr(pairs, "match", noted)
    x, wanted = TEST.x[:10], TEST.x[10:20]
    points = pairs.attacked(vae, x, wanted, {"eps": [1.0], **MATCH}, 3, tmp_path)
    assert seeds == [(4, 3), (4, 7), (2, 11)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.pt", "4.pt", "8.pt"]
    with torch.no_grad():
        code = vae.posterior(wanted[4:8])[0]
    direct = match(lambda z: vae.posterior(z)[0], x[4:8], code, eps=1.0, seed=7, **MATCH)
    assert torch.allclose(points[4:8], direct, atol=1e-6)


def test_the_first_weights_are_other_ones_and_targets_are_learned(plan, monkeypatch):
    seen = {}
    whole = steps.fit

    def watched(model, train, **settings):
        seen[len(train)] = (model.state_dict()["tail.layers.0.weight"].clone(), settings["loss"])
        return whole(model, train, **settings)

    monkeypatch.setattr("reproduce.steps.fit", watched)
    make(plan, VAE, PAIRS)
    first, fresh = (weights for weights, _ in seen.values())
    assert not torch.equal(first, fresh)
    assert read(plan.record(PAIRS))["images"] == 12
    # The loss is of the targets, not of the inputs: it tells them apart.
    model, loss = trained(plan, PAIRS), seen[12][1]
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    one = loss(model, x, y)
    torch.manual_seed(0)
    assert loss(model, x, y + 1) != one


def test_what_an_autoencoder_makes_of_pairs(plan):
    make(plan, VAE, PAIRS, Run(PAIRS, "pair"), Run(PAIRS, "clean"))
    record = read(plan.record(Run(PAIRS, "pair")))
    assert record["used"] == sha256(plan.weights(VAE))
    assert record["attacked"] == 40
    vae, fresh = trained(plan, VAE), trained(plan, PAIRS)
    x = TEST.x[[400 * i // 40 for i in range(40)]]
    wanted = x[pairs.partners(40)]
    with torch.no_grad():
        points = match(lambda z: vae.posterior(z)[0], x, vae.posterior(wanted)[0], eps=1.0, **MATCH)
        outputs = fresh(points)
        codes = [fresh.posterior(z)[0] for z in (x, points, wanted)]
        clean = (fresh(TEST.x) - TEST.x).square().flatten(1).sum(1).mean()
    values = record["values"]
    error = (outputs - wanted).square().flatten(1).sum(1).mean()
    assert values["error"] == pytest.approx(float(error), rel=1e-4)
    around = (wanted - wanted.mean(0)).square().flatten(1).sum(1).mean()
    assert values["relative"] == pytest.approx(float(error / around), rel=1e-4)
    source = (outputs - x).square().flatten(1).sum(1).mean()
    assert values["source"] == pytest.approx(float(source), rel=1e-4)
    before, after = ((code - codes[2]).norm(dim=1) for code in codes[:2])
    assert values["moved"] == pytest.approx(float((after / before).mean()), rel=1e-3)
    assert values["length"] <= 1 + 1e-5
    shown = strip(values["picture-input-output"])
    expected = torch.cat(list(outputs[:8, 0]), dim=1).clamp(0, 1).mul(255).round().int()
    assert shown.shape == (8, 64)
    assert np.abs(shown - expected.numpy()).max() <= 1
    assert len({values[f"picture-{name}"] for name in ("source", "input", "wanted")}) == 3
    values = read(plan.record(Run(PAIRS, "clean")))["values"]
    assert values["error"] == pytest.approx(float(clean), rel=1e-4)
    assert {key for key in values if "picture" in key} == {
        "picture-source",
        "picture-source-output",
    }
    table = summary.table(plan, plan.items["autoencoders-errors"])
    assert table["rows"][0]["values"]["pair"] == pytest.approx(float(error), rel=1e-4)
    assert "ours alone" in summary.show(table)
    assert "40 of 400 test images, trained for 2 epochs on 12 pairs" in summary.show(table)


def test_perturbations_of_black_are_shown_on_grey():
    model = models.build("vae", seed=0).eval()
    x = torch.rand(3, 1, 8, 8)
    delta = torch.zeros(3, 1, 8, 8)
    delta[0, 0, 0, :2] = torch.tensor([0.5, -0.25])
    settings = {"target": "pair", "start": "zero"}
    sample = Sample(model, x, torch.zeros(3).long(), torch.ones(3).bool(), [delta], [1.0], settings)
    shown = strip(MEASURES["pictures"](sample)["picture-input"])
    assert shown[0, :3].tolist() == [255, 64, 128]


def test_attacks_on_the_manifold_of_the_other_network(plan):
    make(plan, CVAE, MLP, Run(MLP, "latent"), Run(MLP, "decoded"))
    model, manifold = trained(plan, MLP), VAEManifold(trained(plan, CVAE)).eval()
    some = TEST[torch.tensor([400 * i // 50 for i in range(50)])]
    shares = []
    for eps in (0.0, 0.5):
        points = latent_fgsm(model, some.x, some.y, manifold=manifold, eps=eps)
        shares.append(float((model(points).argmax(1) == some.y).double().mean()))
    record = read(plan.record(Run(MLP, "latent")))
    assert record["values"] == {"eps": [0.0, 0.5], "kept": shares}
    assert record["attacked"] == record["images"] == 50
    values = read(plan.record(Run(MLP, "decoded")))["values"]
    decoded = reconstruct(some.x, some.y, manifold=manifold)
    right = model(decoded).argmax(1) == some.y
    assert (values["eps"], values["kept"]) == ([0.0], [float(right.double().mean())])
    numpy = np.cov(decoded[some.y == 3].flatten(1).double().numpy(), rowvar=False)
    index = [int(i) - 1 for i in values["index"]]
    expected = np.sort(np.linalg.eigvalsh(numpy))[::-1][index].clip(0)
    assert values["spectrum-3"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)
    assert index[:30] == list(range(30))
    assert index[-1] < 64
    means = np.mean([values[f"spectrum-{c}"] for c in range(10)], axis=0)
    assert values["spectrum"] == pytest.approx(means.tolist(), rel=1e-3, abs=1e-9)


def test_a_training_warms_up_on_clean_images_and_then_gets_its_loss(plan, monkeypatch):
    make(plan, CVAE)
    stages = []
    whole = steps.fit

    def watched(model, train, **settings):
        optimizer = settings["optimizer"](model.parameters(), lr=1.0)
        decay = optimizer.param_groups[0]["weight_decay"]
        stages.append((settings["epochs"], decay))
        return whole(model, train, **settings)

    monkeypatch.setattr("reproduce.steps.fit", watched)
    network = Network("autoencoders", "digits", "mlp", "latent", 0)
    monkeypatch.setattr("reproduce.steps._augmented", lambda loss: loss)
    make(plan, network)
    assert stages == [(2, 0.01), (1, 0.01)]
    record = read(plan.record(network))
    assert record["used"] == sha256(plan.weights(CVAE))
    assert record["values"]["epochs"] == 3
    assert not list(plan.weights(network).parent.glob("checkpoint*"))


def test_augmented_images_are_shifted_and_mirrored_only():
    seen = []
    loss = steps._augmented(lambda model, x, y: seen.append(x), pad=1)
    image = torch.rand(1, 2, 4, 5)
    torch.manual_seed(0)
    loss(None, image.expand(60, -1, -1, -1), torch.zeros(60))
    options = {}
    for mirrored in (False, True):
        padded = torch.nn.functional.pad(image.flip(3) if mirrored else image, (1,) * 4)[0]
        for down in range(3):
            for right in range(3):
                part = padded[:, down : down + 4, right : right + 5]
                options[part.contiguous().numpy().tobytes()] = (mirrored, down, right)
    found = {options[x.contiguous().numpy().tobytes()] for x in seen[0]}
    assert len(found) > 12


def test_what_uses_a_network_waits_for_it_and_falls_with_it(plan):
    items = [plan.items["autoencoders-errors"], plan.items["autoencoders-figure-2"]]
    order = [
        str(task.subject) if task.step == "attack" else task.subject for task in plan.tasks(items)
    ]
    assert order == [VAE, str(Run(VAE, "pair")), PAIRS, str(Run(PAIRS, "pair"))]
    make(plan, VAE, Run(VAE, "pair"), PAIRS, Run(PAIRS, "pair"))
    assert plan.tasks(items) == []
    # Weights that aren't needed may be absent; those that are needed bring all down.
    plan.weights(VAE).unlink()
    assert plan.tasks(items) == []
    record = read(plan.record(Run(PAIRS, "pair")))
    plan.record(Run(PAIRS, "pair")).unlink()
    why = {str(task.subject): task.reason for task in plan.tasks(items)}
    assert list(why.values()) == [
        "the weights aren't here",
        "trained anew",
        "vae trained anew",
        "new",
    ]
    write_json(plan.record(Run(PAIRS, "pair")), record)
    vae = read(plan.record(VAE))
    write_json(plan.record(VAE), vae | {"weights": "other"})
    assert plan.fault(PAIRS) == "of another vae"
    assert plan.fault(Run(PAIRS, "pair")) == "of another vae"
    write_json(plan.record(VAE), vae)
    content = json.loads(json.dumps(SETTINGS))
    content["networks"]["vae"]["loss"]["variance"] = 0.1
    (plan.settings / "autoencoders.yaml").write_text(yaml.safe_dump(content))
    later = Plan(plan.settings, plan.results, plan.work, datasets=frozenset({"digits"}))
    assert later.fault(PAIRS).endswith("loss.variance changed")
    content["networks"]["vae"]["loss"]["variance"] = 0.05
    content["attacks"]["pair"]["steps"] = 4
    (plan.settings / "autoencoders.yaml").write_text(yaml.safe_dump(content))
    later = Plan(plan.settings, plan.results, plan.work, datasets=frozenset({"digits"}))
    assert later.fault(PAIRS) == "training.pairs.attack.steps changed"


def test_snakemake_knows_what_is_used(plan):
    folders = [f"--{name}={getattr(plan, name)}" for name in ("settings", "results", "work")]
    tables = ["autoencoders-errors", "autoencoders-kept"]
    line = [sys.executable, "-m", "reproduce", *folders, "--datasets=digits", "--dry", *tables]
    line += ["--snakemake", "--quiet", "rules"]  # which shows the jobs
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 trainings and attacks to run" in done.stdout
    # Nobody asked for the models that were attacked, or are moved along; they are used.
    jobs = dict(
        row.split()
        for row in done.stdout.splitlines()
        if row.startswith(("train ", "attack ")) and len(row.split()) == 2
    )
    assert jobs == {"train": "4", "attack": "2"}


def test_images_of_a_figure(plan):
    item = plan.items["autoencoders-figure-2"]
    assert summary.figure(plan, item)["missing"][0]["curve"] == "source"
    assert summary.draw(summary.figure(plan, item))[:4] == b"\x89PNG"
    make(plan, VAE, Run(VAE, "pair"))
    content = summary.figure(plan, item)
    assert [row["label"] for row in content["rows"]] == ["source", "target"]
    assert "figure 2: 2 rows of images" in summary.show(content)
    shown = summary.strip(content["rows"][0]["png"])
    x = TEST.x[[400 * i // 40 for i in range(8)], 0]
    assert len(shown) == 8
    assert np.abs(np.stack(shown) - x.numpy() * 255).max() <= 1
    drawn = summary.draw(content)
    assert drawn[:4] == b"\x89PNG"
    assert len(drawn) <= 40_000
