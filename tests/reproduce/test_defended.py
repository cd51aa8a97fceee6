"""Generative defenses in settings: put together, attacked through a surrogate, judged afresh."""

import pytest
import torch
import yaml
from torch import nn

from adv.attacks.adaptive import backtracking, bpda, distortion_search
from adv.attacks.common import input_gradient
from adv.defenses.generative import AnalysisBySynthesis, DefenseGAN
from adv.geometry import norm as length
from adv.lab import data, models, zoo
from reproduce import defended, steps, summary
from reproduce.files import read
from reproduce.items import Network, Run
from reproduce.measures import MEASURES
from reproduce.plan import ROOT, Plan

GAN = {"name": "DefenseGAN", "restarts": 2, "steps": 10, "lr": 0.05}
BETTER = GAN | {"restarts": 3, "steps": 40, "lr": 0.1}
ABS = {"name": "AnalysisBySynthesis", "beta": 0.1, "draws": 50, "steps": 5}
SEARCH = {"call": "adaptive.distortion_search", "norm": "l2", "steps": 10, "rounds": 2, "lr": 0.05}
ENDS = {"measured_at": [0.0, 3.0], "measures": ["norms", "robust"]}
SETTINGS = {
    "networks": {
        "mlp": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "mlp", "sizes": [64, 16, 10]},
            "training": {"epochs": 10, "batch_size": 50, "lr": 0.01},
            "images": 20,
        },
        "wgan": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "wgan", "latent": 5, "hidden": [32, 32]},
            "training": {"epochs": 20, "batch_size": 50, "lr": 0.005},
        },
        "vaes": {
            "data": ["digits"],
            "seeds": 1,
            "model": {"name": "vaes", "latent": 3, "hidden": [12]},
            "loss": {"name": "lab.generative.class_elbo", "variance": 0.05},
            "training": {"epochs": 3, "batch_size": 200, "lr": 0.01},
            "images": 20,
        },
    },
    "defenses": {"none": None},
    "attacks": {
        "gan-clean": {"uses": "wgan", "defense": BETTER, "images": 50, "measures": ["correct"]},
        "gan-unrolled": {
            "uses": "wgan",
            "defense": BETTER,
            "gradient": {"name": "backtracking", "steps": 3, "step_size": 0.05, "warm": 4},
            **SEARCH,
            **ENDS,
        },
        "gan-surface": {
            "uses": "wgan",
            "defense": BETTER,
            "call": "adaptive.surface_search",
            "norm": "l2",
            "verify": 2,
            "steps": 30,
            "rounds": 3,
            **ENDS,
        },
        "abs": {"defense": ABS, **SEARCH, **ENDS},
        "abs-walk": {"defense": ABS, "call": "adaptive.latent_walk", "norm": "l2", **ENDS},
    },
    "tables": {
        "gan": {
            "rows": {"gan": {"model": "mlp"}},
            "columns": {
                "clean": {"attack": "gan-clean", "value": "accuracy"},
                "far": {"attack": "gan-unrolled", "value": "robust", "at": 3.0},
            },
        },
    },
    "figures": {
        "1": {
            "axes": {"x": "distortion", "y": "accuracy"},
            "x": "eps",
            "cell": {"value": "robust"},
            "curves": {
                "DefenseGAN": {"model": "mlp", "attack": "gan-unrolled"},
                "ABS": {"model": "vaes", "attack": "abs"},
                "ABS, walk": {"model": "vaes", "attack": "abs-walk"},
            },
        },
    },
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A small paper, with its networks trained."""
    folder = tmp_path_factory.mktemp("generative")
    (folder / "settings").mkdir()
    (folder / "settings" / "small.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    folders = (folder / name for name in ("settings", "results", "work"))
    plan = Plan(*folders, datasets=frozenset({"digits"}))
    for name in SETTINGS["networks"]:
        steps.train(plan, Network("small", "digits", name, "none", 0))
    return plan


def run(plan, model, attack):
    one = Run(Network("small", "digits", model, "none", 0), attack)
    steps.attack(plan, one)
    steps.measure(plan, one)
    return one, read(plan.record(one))


def test_a_game_is_trained_and_recorded(plan):
    record = read(plan.record(Network("small", "digits", "wgan", "none", 0)))
    assert record["values"]["epochs"] == 20
    assert record["seconds"] > 0
    assert list(record["code"]) == [
        "adv.lab.models._MODELS[wgan]",
        "adv.lab.generative.fit_wgan",
        "adv.lab.data._LOADERS[digits]",
        "adv.lab.models.build",
        "reproduce.steps._game (alone)",
    ]
    other = read(plan.record(Network("small", "digits", "vaes", "none", 0)))
    assert {"adv.lab.models._MODELS[vae]", "adv.lab.generative.class_elbo"} <= set(other["code"])


@pytest.mark.filterwarnings("ignore::adv.attacks.common.GradientMaskingWarning")
def test_a_figure_of_defenses_under_attack(plan):
    for model, attack in (
        ("mlp", "gan-clean"),
        ("mlp", "gan-surface"),
        ("mlp", "gan-unrolled"),
        ("vaes", "abs"),
        ("vaes", "abs-walk"),
    ):
        one, record = run(plan, model, attack)
        assert plan.fault(one) is None
        assert "passes" not in record
        if attack != "gan-clean":
            clean, far = record["values"]["robust"]
            # With other draws some of the images attacked are misclassified as they are.
            assert 0.1 <= clean <= record["attacked"] / record["images"]
            assert far < clean
            assert record["values"]["found"] > 0.5
            assert f"adv.attacks.{SETTINGS['attacks'][attack]['call']}" in record["code"]
    content = summary.figure(plan, plan.items["small-figure-1"])
    assert set(content["curves"]) == {"DefenseGAN", "ABS", "ABS, walk"}
    assert content["curves"]["DefenseGAN"]["x"] == [0.0, 3.0]
    assert "wgan for 20" in content["curves"]["DefenseGAN"]["scale"][0]
    (row,) = summary.table(plan, plan.items["small-gan"])["rows"]
    assert row["values"]["far"] == content["curves"]["DefenseGAN"]["y"][1]
    # A generator trained anew makes the results of an older one void.
    used = plan.used(one) or Network("small", "digits", "wgan", "none", 0)
    weights = plan.record(used)
    text = weights.read_text()
    weights.write_text(text.replace(read(weights)["weights"], "0" * 64))
    of_gan = Run(Network("small", "digits", "mlp", "none", 0), "gan-unrolled")
    assert plan.fault(of_gan) == "of another wgan"
    weights.write_text(text)


@pytest.fixture
def parts():
    gan = defended.built(zoo.load("digits/mlp"), zoo.load("digits/wgan"), {"defense": GAN}, 3)
    synthesis = defended.built(zoo.load("digits/abs"), None, {"defense": ABS}, 3)
    some = data.load("digits").test.take(12)
    return gan, synthesis, some


def test_defenses_are_built_of_their_networks(parts):
    gan, synthesis, _ = parts
    assert isinstance(gan, DefenseGAN)
    assert (gan.restarts, gan.steps, gan.seed) == (2, 10, 3)
    assert isinstance(synthesis, AnalysisBySynthesis)
    assert (synthesis.beta, synthesis.draws, synthesis.seed) == (0.1, 50, 3)
    bare = nn.Flatten()
    assert defended.built(bare, None, {}, 0) is bare
    with pytest.raises(TypeError, match="uses a WGAN"):
        defended.built(bare, None, {"defense": GAN}, 0)
    with pytest.raises(TypeError, match="VAEs"):
        defended.built(bare, None, {"defense": ABS}, 0)
    with pytest.raises(ValueError, match="no generative defense"):
        defended.built(bare, None, {"defense": {"name": "magic"}}, 0)


def gradient(model, x):
    return input_gradient(lambda v: model(v)[:, 0], x)[1]


def test_surrogates_are_those_of_attacks_adaptive(parts):
    gan, synthesis, some = parts
    same = defended.surrogate(gan, {"gradient": {"name": "oblivious"}}, 0)
    assert same is gan.classifier
    wanted = bpda(gan.purify, gan.classifier)
    found = defended.surrogate(gan, {"gradient": {"name": "bpda"}}, 0)
    assert torch.equal(gradient(found, some.x), gradient(wanted, some.x))
    own = {"name": "backtracking", "steps": 4, "step_size": 0.03}
    wanted = backtracking(gan.project, gan.inner, gan.logits, steps=4, step_size=0.03)
    found = defended.surrogate(gan, {"gradient": own}, 0)
    assert torch.equal(gradient(found, some.x), gradient(wanted, some.x))
    # A lighter solver is one of its own; the defense stays as it was.
    light = defended.surrogate(gan, {"gradient": own | {"solver": {"steps": 1}}}, 0)
    assert not torch.allclose(light(some.x), found(some.x))
    assert gan.steps == 10
    assert defended.surrogate(synthesis, {}, 0) is synthesis
    for name in ("nes", "implicit"):
        model = defended.surrogate(synthesis, {"gradient": {"name": name}}, 0)
        assert torch.allclose(model(some.x), synthesis(some.x), atol=1e-5)
        assert (gradient(model, some.x) != 0).any()


def test_a_warm_solver_starts_where_it_ended(parts):
    gan, _, some = parts
    model = defended.surrogate(gan, {"gradient": {"name": "bpda", "warm": 6}}, 0)
    first = model(some.x)
    assert torch.allclose(first, gan(some.x), atol=1e-5)
    again = gan.project(some.x, start=gan.project(some.x), steps=6)
    assert torch.allclose(model(some.x), gan.logits(again, some.x), atol=1e-5)


def test_what_cannot_be_differentiated_so_is_refused(parts):
    gan, synthesis, _ = parts
    for defense, name, error in (
        (synthesis, "bpda", TypeError),
        (synthesis, "oblivious", TypeError),
        (nn.Flatten(), "nes", TypeError),
        (gan, "magic", ValueError),
    ):
        with pytest.raises(error):
            defended.surrogate(defense, {"gradient": {"name": name}}, 0)
    with pytest.raises(ValueError, match="has no 'patience'"):
        defended.surrogate(gan, {"gradient": {"name": "bpda", "solver": {"patience": 1}}}, 0)
    settings = {"call": "adaptive.latent_walk", "norm": "l2"}
    with pytest.raises(TypeError, match="explains"):
        defended.adapted(gan, *_some(), settings, 0)
    settings = {"call": "adaptive.surface_search", "norm": "l2"}
    with pytest.raises(TypeError, match="one generator"):
        defended.adapted(synthesis, *_some(), settings, 0)


def _some():
    some = data.load("digits").test.take(3)
    return some.x, some.y


def test_the_attack_asks_a_defense_with_other_draws(parts):
    gan, _, some = parts
    own = {"steps": 8, "rounds": 2, "lr": 0.05}
    settings = {**SEARCH, **own, "gradient": {"name": "bpda"}, "defense": GAN, "chunk": 7}
    found = defended.adapted(gan, some.x, some.y, settings, 5)
    for part, seed in ((slice(0, 7), 5), (slice(7, 12), 12)):
        judge = gan.reseeded(defended.VERIFY + seed)
        surrogate = bpda(gan.purify, gan.classifier)
        wanted = distortion_search(
            surrogate, some.x[part], some.y[part], verify=judge, seed=seed, **own
        )
        assert torch.allclose(found[part], wanted, atol=1e-4)


def test_attack_judges_and_measure_each_have_draws_of_their_own(plan, parts, monkeypatch):
    """Else an attack would be measured on the very starts that it was searched on."""
    built, whole, judges = [], defended.built, []

    def noted(model, used, settings, seed):
        built.append(seed)
        return whole(model, used, settings, seed)

    with monkeypatch.context() as patch:
        patch.setattr(defended, "built", noted)
        run(plan, "mlp", "gan-clean")
    attacked, measured = built
    gan, _, some = parts
    reseeded = DefenseGAN.reseeded

    def asked(defense, seed):
        judges.append(seed)
        return reseeded(defense, seed)

    monkeypatch.setattr(DefenseGAN, "reseeded", asked)
    settings = {"call": "adaptive.surface_search", "norm": "l2", "verify": 3, "chunk": 5}
    settings |= {"steps": 1, "rounds": 1, "defense": GAN}
    defended.adapted(gan, some.x, some.y, settings, attacked)
    assert judges == [1000, 1010, 1020, 1005, 1015, 1025, 1010, 1020, 1030]
    # The judges of chunk 0 to 999, and of some seeds of networks, lie strictly between the others.
    assert (attacked, measured) == (0, 2000)


def test_more_images_than_there_are_draws_are_refused():
    count = defended.MEASURE - defended.VERIFY
    x, y = torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.int64)
    with pytest.raises(ValueError, match="1000 images: of more than 999"):
        defended.adapted(nn.Flatten(), x, y, {"call": "adaptive.latent_walk", "norm": "l2"}, 0)
    several = {"call": "adaptive.surface_search", "norm": "l2", "verify": 3}
    with pytest.raises(ValueError, match="985 images: of more than 979"):
        defended.adapted(nn.Flatten(), x[:985], y[:985], several, 0)


def test_points_are_stretched_until_the_judge_is_fooled():
    x, y = torch.full((5, 1, 1, 2), 0.4), torch.zeros(5, dtype=torch.int64)
    reach = torch.tensor([0.52, 0.495, 0.46, 0.7, 0.4])
    x_adv = torch.stack([reach, torch.full((5,), 0.4)], dim=1).reshape(5, 1, 1, 2)

    def judge(v):
        first = v.flatten(1)[:, 0]
        return torch.stack([torch.full_like(first, 0.5), first], dim=1)

    found = defended.stretched(judge, x, y, x_adv)
    assert torch.equal(found[0], x_adv[0])
    # 0.4 + 1.06 * 0.095 is the first beyond one half; 0.06 is too short by more than a fifth.
    assert found[1, 0, 0, 0].item() == pytest.approx(0.4 + 1.06 * 0.095)
    assert torch.equal(found[2], x[2])
    assert torch.equal(found[3], x_adv[3])
    assert torch.equal(found[4], x[4])
    assert (length(found - x, "l2") <= 1.2 * length(x_adv - x, "l2") + 1e-6).all()


def test_an_undefended_network_is_searched_as_well():
    model, (x, y) = zoo.load("digits/cnn-at"), _some()
    points = defended.adapted(model, x, y, {**SEARCH, "rounds": 3}, 0)
    wanted = distortion_search(model, x, y, steps=10, rounds=3, lr=0.05)
    assert torch.allclose(points, wanted)


def test_the_settings_of_the_paper_can_be_read():
    plan = Plan(datasets=frozenset({"mnist"}))
    items = [item for item in plan.items.values() if item.paper == "generative"]
    assert {"generative-figure-1"} <= {item.name for item in items}
    for item in items:
        for cell in item.needed:
            for one in plan.runs(cell):
                recipe, settings = plan.recipe(one.network), plan.attack(one)
                assert settings.get("images", 0) is None or settings["images"] >= 100
                assert set(settings["measures"]) <= set(MEASURES)
                assert plan.versions(one)
                model = recipe["model"]
                assert model["name"] in models.names()
                assert model.get("kind", "vae") in models.names()
                if "gradient" in settings:
                    assert "defense" in settings, one
    assert (ROOT / "reproduce" / "paper" / "generative.yaml").is_file()
