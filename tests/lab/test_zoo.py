"""The zoo's files, refusals and recipes, on a small zoo of its own and on the one that ships."""

import hashlib
import math
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from adv.attacks.gradient import pgd
from adv.defenses.generative import AnalysisBySynthesis
from adv.lab import data, zoo
from adv.lab.files import held
from adv.lab.generative import VAEManifold
from adv.lab.models import build, join_color, split_color
from adv.lab.training import cross_entropy

RECIPE = """
["tiny/plain"]
data = "digits"
model = { name = "mlp", sizes = [64, 10] }
training = { epochs = 2, batch_size = 100, lr = 0.02 }
attack = { name = "gradient.fgsm", eps = 0.1, norm = "linf", samples = 100 }
seed = 3

["tiny/vat"]
data = "digits"
model = { name = "mlp", sizes = [64, 12, 10], activation = "tanh" }
training = { epochs = 1, batch_size = 100, lr = 0.01, schedule = "cosine", best = true }
loss = { name = "adversarial.vat", eps = 0.5, power_steps = 2 }
attack = { name = "gradient.fgsm", eps = 0.1, norm = "linf" }

["tiny/autoencoder"]
data = "digits"
model = { name = "autoencoder", shape = [1, 8, 8], hidden = 30, code = 20 }
training = { epochs = 6, batch_size = 50, lr = 0.01, best = true }
task = "reconstruction"

["tiny/colorization"]
data = "patches"
model = { name = "colorization", widths = [4, 4, 4] }
training = { epochs = 2, batch_size = 50, lr = 0.01 }
task = "colorization"

["tiny/vae"]
data = "digits"
model = { name = "vae", latent = 6, hidden = [32], classes = 10 }
training = { epochs = 5, batch_size = 50, lr = 0.01 }
loss = { name = "lab.generative.elbo", variance = 0.02 }
task = "generation"

["tiny/wgan"]
data = "digits"
model = { name = "wgan", hidden = [16] }
training = { epochs = 2, batch_size = 50, lr = 0.002 }
task = "game"
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A zoo of six recipes without weights."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / zoo.MANIFEST).write_text(RECIPE)
    monkeypatch.setattr(zoo, "WEIGHTS", weights)
    return weights


store = partial(zoo.store, progress=False)
train = partial(zoo.train, progress=False)


def test_loading_leaves_the_global_random_state():
    before = torch.get_rng_state()
    zoo.load("digits/mlp-24")
    assert torch.equal(torch.get_rng_state(), before)


def test_stores_loads_and_makes_again(tiny):
    told = store("tiny/plain")
    assert told.difference is None
    assert "nothing stored" in str(told)
    model = zoo.load("tiny/plain")
    assert not model.training
    file = tiny / "tiny" / "plain.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = zoo.entry("tiny/plain").record
    assert record["sha256"] == digest
    assert record["parameters"] == 650
    assert record["command"] == "adv train tiny/plain"
    test = data.load("digits").test
    right = (model(test.x).argmax(1) == test.y).double().mean()
    assert record["clean"] == pytest.approx(float(right), abs=1 / 400)
    assert record["clean"] > 0.6
    again = train("tiny/plain")
    assert (again.difference, again.agreement, again.path) == (0.0, 1.0, None)
    assert again.stored == record
    assert f"{record['clean']:.2%}" in str(again)
    assert sorted(p.name for p in tiny.rglob("*") if p.is_file()) == [
        "manifest.toml",
        "plain.safetensors",
    ]


def test_comparison_measures_a_changed_network(tiny, tmp_path):
    store("tiny/plain")
    stored = zoo.load("tiny/plain")
    weights = load_file(zoo.entry("tiny/plain").path)
    weights["layers.0.bias"][3] += 2.5
    save_file(weights, zoo.entry("tiny/plain").path)
    manifest = (tiny / zoo.MANIFEST).read_text()
    old = zoo.entry("tiny/plain").record["sha256"]
    new = hashlib.sha256(zoo.entry("tiny/plain").path.read_bytes()).hexdigest()
    (tiny / zoo.MANIFEST).write_text(manifest.replace(old, new))
    told = train("tiny/plain", tmp_path / "out" / "new.safetensors")
    assert told.difference == pytest.approx(2.5, abs=1e-6)
    x = data.load("digits").test.x
    same = stored(x).argmax(1) == zoo.load("tiny/plain")(x).argmax(1)
    assert told.agreement == pytest.approx(float(same.double().mean()))
    assert told.agreement < 1
    written = load_file(tmp_path / "out" / "new.safetensors")
    for name, value in stored.state_dict().items():
        assert torch.equal(written[name], value)
    assert str(told.path) in str(told)


def test_the_seed_decides_the_weights(tiny):
    store("tiny/plain")
    (tiny / zoo.MANIFEST).write_text((tiny / zoo.MANIFEST).read_text().replace("= 3", "= 4"))
    assert train("tiny/plain").difference > 1e-3


def test_training_gets_the_recipes_seed_and_validation_set(tiny, monkeypatch):
    seen = {}

    def spy(model, train, *, val, seed, **settings):
        seen.update(model=model.eval().state_dict(), val=val, seed=seed)

    monkeypatch.setattr(zoo, "fit", spy)
    train("tiny/plain")
    start = build("mlp", sizes=[64, 10], seed=3).state_dict()
    assert all(torch.equal(seen["model"][name], value) for name, value in start.items())
    assert (seen["seed"], seen["val"]) == (3, None)
    train("tiny/vat")
    assert torch.equal(seen["val"].x, data.load("digits").val.x)


def test_a_changed_file_is_refused(tiny):
    store("tiny/plain")
    file = tiny / "tiny" / "plain.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256.*adv train tiny/plain"):
        zoo.load("tiny/plain")


def test_what_does_not_fit_is_made_anew(tiny, tmp_path):
    """A damaged file, or another recipe's, must not stop the training that replaces it."""
    store("tiny/plain")
    intact = (tiny / "tiny" / "plain.safetensors").read_bytes()
    (tiny / "tiny" / "plain.safetensors").write_bytes(intact[:-7])
    with pytest.raises(ValueError, match="adv train tiny/plain --store"):
        zoo.load("tiny/plain")
    assert train("tiny/plain").difference is None
    assert store("tiny/plain").difference is None
    assert (tiny / "tiny" / "plain.safetensors").read_bytes() == intact
    manifest = (tiny / zoo.MANIFEST).read_text()
    (tiny / zoo.MANIFEST).write_text(manifest.replace("[64, 10]", "[64, 5, 10]", 1))
    with pytest.raises(ValueError, match="does not fit its recipe"):
        zoo.load("tiny/plain")
    assert store("tiny/plain").made["parameters"] == 65 * 5 + 6 * 10
    zoo.load("tiny/plain")


def test_unknown_and_untrained_networks(tiny):
    with pytest.raises(ValueError, match="tiny/plain, tiny/vat"):
        zoo.load("tiny/nothing")
    with pytest.raises(FileNotFoundError, match="adv train tiny/vat"):
        zoo.load("tiny/vat")
    assert zoo.names()[:3] == ("tiny/plain", "tiny/vat", "tiny/autoencoder")


def test_losses_come_from_the_recipe(tiny, monkeypatch):
    seen = {}

    def fake(eps, power_steps):
        seen.update(eps=eps, power_steps=power_steps)
        return cross_entropy

    monkeypatch.setattr("adv.defenses.adversarial.vat", fake)
    told = store("tiny/vat")
    assert seen == {"eps": 0.5, "power_steps": 2}
    assert told.made["parameters"] == 64 * 12 + 12 + 12 * 10 + 10
    assert zoo.entry("tiny/vat").loss["name"] == "adversarial.vat"


def test_a_manifold_of_a_recipe_is_a_trained_vae(tiny, monkeypatch):
    seen = {}

    def fake(attacks, **settings):
        seen.update(attacks=attacks, settings=settings)
        return cross_entropy

    store("tiny/vae")
    file = tiny / zoo.MANIFEST
    recipe = """
["tiny/latent"]
data = "digits"
model = { name = "mlp", sizes = [64, 10] }
training = { epochs = 1 }
loss = { name = "adversarial.joint", attacks = [{ attack = "fgsm" }, { manifold = "tiny/vae" }] }
"""
    file.write_text(file.read_text() + recipe)
    monkeypatch.setattr("adv.defenses.adversarial.joint", fake)
    train("tiny/latent")
    first, second = seen["attacks"]
    assert first == {"attack": "fgsm"}
    assert isinstance(second["manifold"], VAEManifold)
    test = data.load("digits").test
    again = zoo.load("tiny/vae").posterior(test.x[:3], test.y[:3])[0]
    assert torch.equal(second["manifold"].encode(test.x[:3], test.y[:3]), again)
    file.write_text(file.read_text().replace('"tiny/vae" }]', '"tiny/wgan" }]'))
    store("tiny/wgan")
    with pytest.raises(ValueError, match="not 'tiny/wgan'"):
        train("tiny/latent")


def test_wrong_names_in_a_recipe(tiny):
    text = (tiny / zoo.MANIFEST).read_text()
    for wrong in ("adversarial.nothing", "nothing.vat", "vat"):
        (tiny / zoo.MANIFEST).write_text(text.replace("adversarial.vat", wrong))
        with pytest.raises(ValueError, match=r"MODULE\.FUNCTION"):
            train("tiny/vat")


def decibels(a, b):
    """Mean over the images of their peak signal-to-noise ratios, in numpy."""
    squares = (a - b).detach().flatten(1).numpy().astype(np.float64) ** 2
    return float(np.mean(-10 * np.log10(squares.mean(axis=1))))


@pytest.mark.parametrize("task", ["autoencoder", "colorization"])
def test_networks_of_images_are_worth_their_psnr(tiny, task):
    told = store(f"tiny/{task}")
    model, record = zoo.load(f"tiny/{task}"), zoo.entry(f"tiny/{task}").record
    test = data.load(zoo.entry(f"tiny/{task}").data).test
    given, wanted = split_color(test.x) if task == "colorization" else (test.x, test.x)
    assert record["psnr"] == pytest.approx(decibels(model(given), wanted), abs=1e-3)
    assert f"{record['psnr']:.2f} dB" in str(told)
    assert not {"clean", "robust"} & {*record}
    again = train(f"tiny/{task}")
    assert (again.difference, again.agreement) == (0, None)
    assert f"(stored: {record['psnr']:.2f} dB)" in str(again)


def test_the_best_epoch_of_an_autoencoder_is_that_of_its_psnr(tiny, monkeypatch):
    scores = []
    fit = zoo.fit

    def spy(model, train, **settings):
        scores.append((settings["score"], settings["val"]))
        return fit(model, train, **settings)

    monkeypatch.setattr(zoo, "fit", spy)
    store("tiny/autoencoder")
    ((score, val),) = scores
    model = zoo.load("tiny/autoencoder")
    assert score(model, val.x, val.y) == pytest.approx(decibels(model(val.x), val.x), abs=1e-3)


def test_decoders_of_all_classes_are_worth_what_they_classify(tiny):
    file = tiny / zoo.MANIFEST
    recipe = """
["tiny/abs"]
data = "digits"
model = { name = "vaes", latent = 3, hidden = [16] }
training = { epochs = 6, batch_size = 100, lr = 0.01 }
loss = { name = "lab.generative.class_elbo", variance = 0.05 }
attack = { name = "gradient.fgsm", eps = 0.15 }
defense = { beta = 0.1, draws = 100, steps = 5 }
"""
    file.write_text(file.read_text() + recipe)
    made, test = store("tiny/abs").made, data.load("digits").test
    parts = zoo.load("tiny/abs").parts
    whole = AnalysisBySynthesis(parts, beta=0.1, draws=100, steps=5)
    share = (whole(test.x).argmax(1) == test.y).double().mean().item()
    assert made["clean"] == pytest.approx(share)
    assert made["robust"] < made["clean"] - 0.1
    assert share > 0.5


def test_generative_networks_are_made_again(tiny):
    vae, wgan = store("tiny/vae"), store("tiny/wgan")
    assert vae.made["psnr"] > 10
    assert "test PSNR" in str(vae)
    test = data.load("digits").test
    made = zoo.load("tiny/vae")(test.x, test.y)
    square = (made - test.x).flatten(1).square().mean(1)
    assert (-10 * square.log10()).mean().item() == pytest.approx(vae.made["psnr"], abs=1e-3)
    again = train("tiny/wgan")
    assert again.difference == 0
    assert again.made["distance"] == wgan.made["distance"]
    assert "critic finds apart" in str(again)
    assert zoo.load("tiny/wgan").decode(torch.zeros(1, 12)).shape == (1, 1, 8, 8)


def test_unknown_task(tiny):
    text = (tiny / zoo.MANIFEST).read_text()
    (tiny / zoo.MANIFEST).write_text(text.replace('"reconstruction"', '"compression"'))
    with pytest.raises(ValueError, match="no task 'compression'; there are reconstruction, col"):
        train("tiny/autoencoder")


def test_weights_can_be_read_by_all_and_a_link_stays_one(tiny, tmp_path):
    """Also where the file is replaced as a whole."""
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "new" / "real.safetensors")
    train("tiny/plain", tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "new" / "real.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("bad", ["weights", "file/below.safetensors"])
def test_a_bad_place_is_refused_before_the_training(tiny, tmp_path, monkeypatch, bad):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(zoo, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises((ValueError, OSError), match=r"is no file|exists|Not a directory"):
        train("tiny/plain", tmp_path / bad)


@pytest.mark.parametrize("point", ["write_text", "replace"])
def test_a_store_cut_short_leaves_the_old_files(tiny, monkeypatch, point):
    store("tiny/plain")
    before = {p: p.read_bytes() for p in tiny.rglob("*") if p.is_file()}
    manifest = (tiny / zoo.MANIFEST).read_text()
    (tiny / zoo.MANIFEST).write_text(manifest.replace("seed = 3", "seed = 4"))
    before[tiny / zoo.MANIFEST] = (tiny / zoo.MANIFEST).read_bytes()
    real = getattr(Path, point)

    def fail(path, *arguments, **settings):
        """Half of the manifest; or the weights, once they are written beside the stored ones."""
        if point == "write_text":
            real(path, arguments[0][:100])
            raise OSError("the disk is full")
        if arguments[0] == tiny / "tiny" / "plain.safetensors":
            raise OSError("the disk is full")
        real(path, *arguments)

    monkeypatch.setattr(Path, point, fail)
    with pytest.raises(OSError, match="disk is full"):
        store("tiny/plain")
    assert {p: p.read_bytes() for p in tiny.rglob("*") if p.is_file()} == before
    zoo.load("tiny/plain")


def test_storing_waits_for_another_and_keeps_what_it_wrote(tiny):
    pytest.importorskip("fcntl")
    manifest = tiny / zoo.MANIFEST
    other = '["tiny/other"]\ndata = "digits"\nmodel = { name = "mlp" }\ntraining = {}\n'
    with ThreadPoolExecutor(1) as pool:
        with held(tiny):
            told = pool.submit(store, "tiny/plain")
            while not told.done() and not list(tiny.glob("*/*.safetensors")):  # it trains
                time.sleep(0.01)
            time.sleep(0.2)
            assert manifest.read_text() == RECIPE
            assert not told.done()
            manifest.write_text(RECIPE + other)
        told.result(timeout=20)
    assert zoo.names()[-1] == "tiny/other"
    assert "sha256" in zoo.entry("tiny/plain").record
    zoo.load("tiny/plain")


def test_storing_keeps_the_other_entries(tiny):
    before = tomllib.loads(RECIPE)
    store("tiny/plain")
    after = tomllib.loads((tiny / zoo.MANIFEST).read_text())
    after["tiny/plain"].pop("record")
    assert after == before


def test_toml_survives_awkward_values():
    entries = {"a/b": {"x": {"eps": 1e-5, "s": 'say "hi"\\', "n": [1, 2.5], "yes": True}, "k": 3}}
    assert tomllib.loads(zoo._toml(entries)) == entries


# ---------------------------------------------------------------------------------- what ships


SHIPPED = list(zoo.names())
CLASSIFIERS = [name for name in SHIPPED if not zoo.entry(name).task]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_the_one_of_the_record(name):
    entry = zoo.entry(name)
    assert entry.path.stat().st_size <= (2_000_000 if name.startswith("mnist/") else 300_000)
    model = zoo.load(name)
    assert sum(p.numel() for p in model.parameters()) == entry.record["parameters"]
    worth = {"clean", "robust"}
    if entry.task:
        worth = {"distance"} if entry.task == "game" else {"psnr"}
    assert {"sha256", "command", "seconds", "device", "torch"} | worth <= {*entry.record}


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name.startswith("digits/")])
def test_shipped_accuracies_are_those_of_the_record(name):
    """Within two of 400 images; under attack, on the first 100, within four standard deviations."""
    entry, model, test = zoo.entry(name), zoo.load(name), data.load("digits").test
    if entry.defense:
        model = AnalysisBySynthesis(model.parts, **entry.defense)
    right = (model(test.x).argmax(1) == test.y).double().mean()
    assert float(right) == pytest.approx(entry.record["clean"], abs=2 / 400)
    settings = dict(entry.attack)
    assert settings.pop("name") == "gradient.pgd"
    some = test.take(100)
    moved = pgd(model, some.x, some.y, **(settings | {"restarts": 1}))
    stands = float((model(moved).argmax(1) == some.y).double().mean())
    share = entry.record["robust"]
    assert stands == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 100))


def test_shipped_autoencoder_beats_the_best_linear_one_of_its_size():
    digits, entry = data.load("digits"), zoo.entry("digits/autoencoder")
    x = digits.test.x
    reached = decibels(zoo.load("digits/autoencoder")(x), x)
    assert reached == pytest.approx(entry.record["psnr"], abs=0.01)
    pca = PCA(8).fit(digits.train.x.flatten(1))
    linear = pca.inverse_transform(pca.transform(x.flatten(1))).clip(0, 1)
    assert reached > decibels(torch.from_numpy(linear).view_as(x), x) + 2


def test_shipped_colorization_beats_gray_and_the_mean_color_of_each_photograph():
    patches, entry = data.load("patches"), zoo.entry("patches/colorization")
    luminance, chroma = split_color(patches.test.x)
    guess = zoo.load("patches/colorization")(luminance)
    assert decibels(guess, chroma) == pytest.approx(entry.record["psnr"], abs=0.01)
    _, known = split_color(patches.train.x)
    means = torch.stack([known[patches.train.y == k].mean(dim=(0, 2, 3)) for k in (0, 1)])
    mean = means[patches.test.y][..., None, None].expand_as(chroma)
    for baseline in (torch.zeros_like(chroma), mean):
        assert decibels(guess, chroma) > decibels(baseline, chroma) + 3
        colored, plain = (join_color(luminance, c).clamp(0, 1) for c in (guess, baseline))
        assert decibels(colored, patches.test.x) > decibels(plain, patches.test.x) + 3


def test_shipped_linear_network_can_be_made_again():
    told = train("digits/linear")
    assert told.difference < 1e-3
    assert told.agreement >= 0.99
    assert told.made["clean"] == pytest.approx(told.stored["clean"], abs=2 / 400)
