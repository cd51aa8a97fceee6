import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from adv.defenses.critic import Critic
from adv.lab import data, models
from adv.lab.models import (
    MLP,
    Autoencoder,
    Colorization,
    DenseNet40,
    LeNet5,
    NetworkInNetwork,
    Normalize,
    ResNet32,
    join_color,
    split_color,
)

SHAPES = {
    "fcnn": (1, 28, 28),
    "mlp-1000": (1, 28, 28),
    "mlp-1200": (1, 28, 28),
    "digits-cnn": (1, 8, 8),
    "lenet5": (1, 28, 28),
    "lenet5-wide": (1, 28, 28),
    "nin": (3, 32, 32),
    "densenet40": (3, 32, 32),
    "resnet32": (3, 32, 32),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def dense(*sizes: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(sizes))


# Counts: published in total, or the sum over the paper's table of layers.
COUNTS = {
    "fcnn": dense(784, 150, 100, 10),
    "mlp-1000": dense(784, 1000, 1000, 1000, 10),
    "mlp-1200": dense(784, 1200, 1200, 1200, 10),
    "lenet5": 61_706,
    "lenet5-wide": 26 * 32 + (25 * 32 + 1) * 64 + dense(1024, 512, 10),
    "nin": 966_986,
    "densenet40": 1_019_722,
    "resnet32": 464_154,
    "autoencoder": dense(784, 256, 32) + dense(32, 256, 784),
    "colorization": (9 + 1) * 16 + (9 * 16 + 1) * 32 + (9 * 32 + 1) * 64 + (128 + 1) * 64
    + (9 * 64 + 1) * 32 + (9 * 32 + 1) * 16 + (9 * 16 + 1) * 2,
}  # fmt: skip


def encoder(outputs, channels=1):
    """Table 1 of Chen, Xie and Zhu, with biases."""
    sizes = (channels, 256, 512, 1024, 128)
    return sum((16 * a + 1) * b for a, b in pairwise(sizes)) + 129 * outputs


def decoder(latent, channels=1):
    """Their Table 2: kernels, biases, and two numbers a map of the batch normalization."""
    kernels = 16384 * latent + 8388608 + 2097152 + 4096 * channels
    return kernels + (1024 + 512 + 256) * 3 + channels


COUNTS |= {
    "dc-vae": encoder(16) + decoder(8),
    "dc-gan": encoder(1) + decoder(100),
    "abs-vae": 26 * 32 + (16 * 32 + 1) * 32 + (9 * 32 + 1) * 64 + (25 * 64 + 1) * 16
    + 16 * 8 * 32 + 25 * 32 * 16 + 25 * 16 * 16 + 16 * 16 + 32 + 16 + 16 + 1
    + 2 * (32 + 32 + 64 + 32 + 16 + 16),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert parameters(models.build(name)) == COUNTS[name]


@pytest.mark.parametrize("name", ["abs-vae", "dc-vae"])
def test_images_go_through_the_sides_of_the_tables(name):
    settings = {} if name == "abs-vae" else {"widths": (4, 5, 6), "code": 7, "shape": (3, 32, 32)}
    network = models.build(name, seed=0, **settings)
    sides = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda _m, _x, made: sides.append(made.shape[-1]))
    made = network.eval()(torch.rand(2, *network.shape))
    assert made.shape == (2, *network.shape)
    assert 0 < made.min() < made.max() < 1
    wanted = [24, 11, 5, 1, 4, 11, 25, 28] if name == "abs-vae" else [16, 8, 4, 1, 4, 8, 16, 32]
    assert sides == wanted


def test_smaller_images_are_framed_and_cut():
    """A border of the 32x32 image plays no part: its pixels get no gradient."""
    network = models.build("dc-gan", seed=0, latent=4, widths=(4, 5, 6), code=7)
    made = network.eval().decode(noise(2, 4))
    assert made.shape == (2, 1, 28, 28)
    inner = network.generator[:-2](noise(2, 4)).sigmoid()
    assert inner.shape == (2, 1, 32, 32)
    assert torch.equal(made, inner[:, :, 2:-2, 2:-2])
    assert network.judge(made).shape == (2,)
    framed = torch.nn.functional.pad(made, (2, 2, 2, 2))
    assert torch.equal(network.critic[1:](framed)[:, 0], network.judge(made))
    for shape in ((1, 27, 28), (1, 34, 34)):
        with pytest.raises(ValueError, match="even sides"):
            models.build("dc-gan", shape=shape)


def test_the_digits_network_fits_into_300_kilobytes():
    network = models.build("digits-cnn")
    assert sum(p.numel() * p.element_size() for p in network.state_dict().values()) <= 300_000


def test_the_digits_network_learns():
    digits = data.load("digits")
    network = models.build("digits-cnn", seed=0)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in torch.randperm(len(digits.train), generator=generator).split(64):
            loss = nn.functional.cross_entropy(
                network(digits.train.x[batch]), digits.train.y[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    assert (network(digits.test.x).argmax(1) == digits.test.y).float().mean() > 0.9


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_each_sample_alone(name):
    network = models.build(name, seed=0).eval()
    x = noise(3, *SHAPES[name])
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(image[None]) for image in x])
    assert together.shape == (3, 10)
    scale = together.abs().max()
    assert (together - alone).abs().max() < 1e-4 * scale
    assert (together[0] - together[1]).abs().max() > 1e-6 * scale


@pytest.mark.parametrize("name", SHAPES)
def test_batched_and_second_derivatives(name):
    network = models.build(name, seed=0).eval()
    x = noise(2, *SHAPES[name]).requires_grad_()
    logits = network(x)
    rows = torch.eye(10)[:2, None].expand(2, 2, 10)
    (batched,) = torch.autograd.grad(logits, x, rows, is_grads_batched=True, retain_graph=True)
    for k in range(2):
        (one,) = torch.autograd.grad(logits[:, k].sum(), x, create_graph=True, retain_graph=True)
        assert torch.allclose(batched[k], one, rtol=1e-3, atol=1e-5)
        assert one.abs().max() > 0
    first = next(network.parameters())
    (second,) = torch.autograd.grad(one.square().sum(), first)
    assert second.isfinite().all()
    assert second.abs().max() > 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_batch_of_other_images_is_refused(name):
    network = models.build(name)
    channels, height, width = SHAPES[name]
    with pytest.raises(ValueError, match="not " + r"\(2, 7, 5, 5\)"):
        network(noise(2, 7, 5, 5))
    if not isinstance(network, MLP):
        with pytest.raises(ValueError, match=rf"takes images \(B, {channels}, .*not"):
            network(noise(channels, height, width))


@pytest.mark.parametrize(("name", "side"), [("nin", 5), ("densenet40", 3)])
def test_images_too_small_to_pool_are_refused(name, side):
    network = models.build(name).eval()
    with pytest.raises(ValueError, match=f"H, W >= {side + 1}"):
        network(noise(1, 3, side, side))
    assert network(noise(1, 3, side + 1, side + 1)).shape == (1, 10)


# Construction


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_a_seed_fixes_the_weights_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, second = models.build("fcnn", seed=3), models.build("fcnn", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, second)
    assert not same(first, models.build("fcnn", seed=4))


def test_a_seed_means_the_global_state_after_manual_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = models.build("lenet5")
        after = models.build("lenet5")
    assert same(models.build("lenet5", seed=5), expected)
    assert not same(expected, after)


def test_settings_reach_the_network():
    network = models.build("lenet5", seed=0, classes=3, shape=(3, 16, 20), activation="tanh")
    assert network(noise(2, 3, 16, 20)).shape == (2, 3)
    assert models.build("lenet5", shape=(1, 18, 19))(noise(2, 1, 18, 19)).shape == (2, 10)
    assert models.build("mlp", sizes=(64, 5, 2))(noise(4, 1, 8, 8)).shape == (4, 2)
    with pytest.raises(ValueError, match="no network 'LeNet'; there are mlp,"):
        models.build("LeNet")
    with pytest.raises(TypeError, match="depth"):
        models.build("lenet5", depth=3)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        models.build("fcnn", activation="swish")
    with pytest.raises(ValueError, match="two or more positive"):
        MLP((784,))
    with pytest.raises(ValueError, match="12x12"):
        LeNet5(shape=(1, 8, 8), padding=0)


def test_initial_weights_have_the_variance_of_the_papers():
    he = models.build("mlp", sizes=(600, 400), seed=0, init="he").layers[0]
    # 240,000 draws: the sample's standard deviation is within 0.6 % (4 sigma) of the true one.
    assert he.weight.std().item() == pytest.approx(math.sqrt(2 / 600), rel=0.006)
    assert he.weight.abs().max() > 4 * math.sqrt(2 / 600)  # normal; uniform ends at 1.73
    assert not he.bias.any()
    glorot = models.build("mlp", sizes=(600, 400), seed=0, init="glorot").layers[0]
    bound = math.sqrt(6 / 1000)
    assert 0.999 * bound < glorot.weight.abs().max() <= bound
    assert glorot.weight.std().item() == pytest.approx(math.sqrt(2 / 1000), rel=0.006)
    conv = models.build("lenet5-wide", seed=0, init="he").features[3]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 800), rel=0.02)
    with pytest.raises(ValueError, match="'he' or 'glorot'"):
        models.initialize(he, "zeros")


# What the layers compute


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda z: np.maximum(z, 0)),
        ("tanh", np.tanh),
        ("softplus", lambda z: np.logaddexp(z, 0)),
        ("sigmoid", lambda z: 1 / (1 + np.exp(-z))),
        ("leaky_relu", lambda z: np.where(z > 0, z, 0.2 * z)),
        ("elu", lambda z: np.where(z > 0, z, np.expm1(z))),
    ],
)
def test_mlp_is_alternating_affine_maps_and_activations(activation, function):
    network = models.build("mlp", sizes=(12, 9, 7, 3), activation=activation, seed=1).double()
    x = noise(5, 3, 2, 2).double() - 0.5
    (w1, b1), (w2, b2), (w3, b3) = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in network.layers
        if isinstance(layer, nn.Linear)
    )
    hidden = function(x.reshape(5, 12).numpy() @ w1.T + b1)
    expected = function(hidden @ w2.T + b2) @ w3.T + b3
    assert np.abs(network(x).detach().numpy() - expected).max() < 1e-12


@pytest.mark.parametrize(("name", "places"), [("fcnn", 2), ("lenet5-wide", 2), ("digits-cnn", 2)])
def test_dropout_acts_in_training_only(name, places):
    network = models.build(name, seed=0, dropout=0.5)
    assert sum(isinstance(module, nn.Dropout) for module in network.modules()) == places
    assert same(network, models.build(name, seed=0))
    x = noise(2, *SHAPES[name])
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), models.build(name, seed=0).eval()(x))


def test_normalize_standardizes_channels_and_keeps_the_gradient_in_pixels():
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.5, 0.25)
    x = noise(2, 3, 16, 16)
    plain = models.build("resnet32", seed=0).eval()
    normalized = models.build("resnet32", seed=0, normalize=(mean, std)).eval()
    by_hand = np.stack([(x[:, c].numpy() - mean[c]) / std[c] for c in range(3)], axis=1)
    assert torch.allclose(normalized(x), plain(torch.from_numpy(by_hand)), rtol=1e-4)
    assert set(normalized.state_dict()) >= {"0.mean", "0.std"}
    assert parameters(normalized) == parameters(plain)
    with pytest.raises(ValueError, match="Normalize takes images"):
        normalized(noise(2, 1, 16, 16))
    for bad in (((0.5,), (0.0,)), ((0.5, 0.5), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match="one positive std per channel"):
            Normalize(*bad)


def test_lenet_sizes_follow_the_published_tables():
    classic, wide = LeNet5(), models.build("lenet5-wide")
    x = noise(1, 1, 28, 28)
    assert classic.features[:3](x).shape == (1, 6, 14, 14)
    assert classic.features[:6](x).shape == (1, 16, 5, 5)
    assert wide.features[:3](x).shape == (1, 32, 12, 12)
    assert wide.features[:6](x).shape == (1, 64, 4, 4)
    # The classic 32x32 field: padding the image by hand changes nothing.
    padded = LeNet5(padding=0, shape=(1, 32, 32))
    padded.load_state_dict(classic.state_dict())
    frame = torch.zeros(1, 1, 32, 32)
    frame[..., 2:30, 2:30] = x
    assert torch.allclose(classic(x), padded(frame), atol=1e-6)


def test_network_in_network_is_a_perceptron_slid_over_patches():
    network = NetworkInNetwork().eval()
    x = noise(1, 3, 32, 32)
    convs = [module for module in network.layers if isinstance(module, nn.Conv2d)]
    assert [tuple(c.weight.shape[:1] + c.weight.shape[2:]) for c in convs] == [
        (192, 5, 5), (160, 1, 1), (96, 1, 1),
        (192, 5, 5), (192, 1, 1), (192, 1, 1),
        (192, 3, 3), (192, 1, 1), (10, 1, 1),
    ]  # fmt: skip
    hidden = x[0, :, 8:13, 3:8].flatten()
    for conv in convs[:3]:
        hidden = (conv.weight.flatten(1) @ hidden + conv.bias).relu()
    assert torch.allclose(network.layers[:6](x)[0, :, 10, 5], hidden, rtol=1e-4, atol=1e-5)
    assert network.layers[:8](x).shape == (1, 96, 16, 16)
    assert network.layers[:16](x).shape == (1, 192, 8, 8)
    before, after = network.layers[:6](x), network.layers[:7](x)
    assert torch.equal(after[..., 2, 3], before[..., 4:7, 6:9].amax(dim=(2, 3)))
    # The last window of the average pool has only two rows and columns left.
    before, after = network.layers[:14](x), network.layers[:15](x)
    assert torch.allclose(after[..., 2, 3], before[..., 4:7, 6:9].mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(after[..., 7, 7], before[..., 14:, 14:].mean(dim=(2, 3)), atol=1e-5)
    maps = network.layers(x)
    assert maps.shape == (1, 10, 8, 8)
    assert torch.allclose(network(x)[0], maps.reshape(10, 64).mean(1), atol=1e-5)


def test_densenet_keeps_every_map_it_has_made():
    network = DenseNet40().eval()
    x = noise(1, 3, 32, 32)
    stem = network.layers[0](x)
    block = network.layers[:13](x)
    assert block.shape == (1, 16 + 12 * 12, 32, 32)
    assert torch.equal(block[:, :16], stem)
    assert torch.equal(block[:, :28], network.layers[:2](x))
    assert network.layers[:27](x).shape == (1, 160 + 144, 16, 16)
    assert network.layers(x).shape == (1, 304 + 144, 8, 8)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 40


def test_resnet_shortcuts_take_every_second_pixel_and_pad_with_zeros():
    network = ResNet32().eval()
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 32
    blocks = network.layers[3:]
    x = noise(2, 16, 8, 8) - 0.5
    for i, width, side in ((0, 16, 8), (5, 32, 4)):
        nn.init.zeros_(blocks[i].residual[-1].weight)  # the last norm: the residual is 0
        expected = torch.zeros(2, width, side, side)
        expected[:, (width - 16) // 2 :][:, :16] = x[:, :, :: 8 // side, :: 8 // side]
        assert torch.equal(blocks[i](x), expected.relu())
    images = noise(1, 3, 32, 32)
    assert [network.layers[:n](images).shape[1:] for n in (8, 13, 18)] == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]


# Networks that return images


IMAGES = {"autoencoder": ((1, 28, 28), (1, 28, 28)), "colorization": ((1, 10, 7), (2, 10, 7))}


@pytest.mark.parametrize("name", IMAGES)
def test_outputs_are_images_of_each_sample_alone(name):
    network = models.build(name, seed=0).eval()
    given, returned = IMAGES[name]
    x = noise(3, *given)
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(image[None]) for image in x])
    assert together.shape == (3, *returned)
    assert torch.allclose(together, alone, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_derivatives_of_images_forward_backward_and_batched(name):
    """The attacks on regression need J u, J^T w and many of them at once."""
    network = models.build(name, seed=0, activation="tanh").eval().double()
    given, returned = IMAGES[name]
    x, u, w = (
        noise(2, *shape, seed=i).double() for i, shape in enumerate([given, given, returned])
    )
    _, forward = torch.func.jvp(network, (x,), (u,))
    step = 1e-6
    difference = (network(x + step * u) - network(x - step * u)) / (2 * step)
    assert torch.allclose(forward, difference, rtol=1e-5, atol=1e-9)
    pulled = torch.func.vjp(network, x)[1]
    assert (forward * w).sum().item() == pytest.approx((u * pulled(w)[0]).sum().item(), rel=1e-9)
    many = torch.stack([w, w.flip(0), w.square()])
    batched = torch.func.vmap(lambda v: pulled(v)[0])(many)
    assert torch.allclose(batched, torch.stack([pulled(v)[0] for v in many]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_autoencoder_is_two_perceptrons_and_a_sigmoid(activation):
    network = Autoencoder((2, 3, 2), hidden=9, code=4, activation=activation).double()
    x = noise(5, 2, 3, 2).double() - 0.5
    function = np.tanh if activation == "tanh" else lambda z: np.maximum(z, 0)
    maps = [
        (m.weight.detach().numpy(), m.bias.detach().numpy())
        for m in network.modules()
        if isinstance(m, nn.Linear)
    ]
    assert [w.shape for w, _ in maps] == [(9, 12), (4, 9), (9, 4), (12, 9)]
    values = x.reshape(5, 12).numpy()
    for (w, b), after in zip(maps, (function, lambda z: z, function, lambda z: z), strict=True):
        values = after(values @ w.T + b)
    expected = (1 / (1 + np.exp(-values))).reshape(5, 2, 3, 2)
    assert np.abs(network(x).detach().numpy() - expected).max() < 1e-12
    assert network.encoder(x).shape == (5, 4)


def test_colorization_is_its_table_of_layers():
    network = Colorization((4, 6, 8)).double()
    x = noise(3, 1, 12, 8).double()
    a, b, c, fusion, d, e, head = (m for m in network.modules() if isinstance(m, nn.Conv2d))

    def conv(layer, maps, stride=1):
        padding = layer.weight.shape[-1] // 2
        return F.conv2d(maps, layer.weight, layer.bias, stride, padding)

    def doubled(maps):
        return maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    maps = conv(c, conv(b, conv(a, x).relu(), 2).relu(), 2).relu()
    assert maps.shape == (3, 8, 3, 2)
    whole = maps.sum(dim=(2, 3)) / 6
    maps = conv(fusion, torch.cat([maps, whole[..., None, None].repeat(1, 1, 3, 2)], 1)).relu()
    maps = doubled(conv(e, doubled(conv(d, maps).relu())).relu())
    assert torch.allclose(network(x), conv(head, maps).tanh() / 2, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 13), (16, 16), (33, 18)])
def test_colorization_takes_any_size(size):
    chroma = models.build("colorization", seed=0)(noise(2, 1, *size))
    assert chroma.shape == (2, 2, *size)
    assert chroma.abs().max() < 0.5


def test_networks_of_images_refuse_other_images():
    with pytest.raises(
        ValueError, match=r"Autoencoder takes images \(B, 1, 28, 28\), not \(2, 784"
    ):
        models.build("autoencoder")(noise(2, 784))
    with pytest.raises(ValueError, match=r"Colorization takes images \(B, 1, H, W\), not \(2, 3"):
        models.build("colorization")(noise(2, 3, 8, 8))
    with pytest.raises(ValueError, match="positive"):
        Autoencoder(code=0)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        Colorization(activation="swish")


def test_colors_are_split_as_in_jpeg_files():
    """Pillow's conversion rounds to whole bytes, and puts gray at 128."""
    patches = data.load("patches").test.x[:50]
    luminance, chroma = split_color(patches)
    values = torch.cat([luminance, chroma + 128 / 255], dim=1) * 255
    for image, ours in zip((patches * 255).round().byte(), values, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("YCbCr")
        difference = ours.permute(1, 2, 0).numpy() - np.asarray(theirs, np.float32)
        assert np.abs(difference).max() < 1.01


def test_splitting_colors_is_linear_and_joining_undoes_it():
    rgb = noise(4, 3, 5, 6).double()
    luminance, chroma = split_color(rgb)
    assert (luminance.shape, chroma.shape) == ((4, 1, 5, 6), (4, 2, 5, 6))
    assert torch.allclose(join_color(luminance, chroma), rgb, atol=1e-14)
    matrix = np.array(
        [
            [0.299, 0.587, 0.114],
            [-0.299 / 1.772, -0.587 / 1.772, 0.5],
            [0.5, -0.587 / 1.402, -0.114 / 1.402],
        ]
    )
    expected = np.einsum("ij,bjhw->bihw", matrix, rgb.numpy())
    assert np.abs(torch.cat([luminance, chroma], 1).numpy() - expected).max() < 1e-15
    free = noise(2, 3, 2, 2, seed=1).double() - 0.5  # also where no color is
    again = torch.cat(split_color(join_color(free[:, :1], free[:, 1:])), 1)
    assert torch.allclose(again, free, atol=1e-14)


def test_gray_has_no_chroma_and_pure_colors_the_most():
    gray = noise(2, 1, 3, 3).expand(2, 3, 3, 3)
    luminance, chroma = split_color(gray)
    assert torch.allclose(luminance, gray[:, :1])
    assert chroma.abs().max() < 1e-6
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T[None, :, :, None]
    luminance, chroma = split_color(corners)
    assert (luminance.min().item(), luminance.max().item()) == pytest.approx((0, 1))
    assert chroma.amax(dim=(0, 2, 3)).tolist() == pytest.approx([0.5, 0.5])
    assert chroma.amin(dim=(0, 2, 3)).tolist() == pytest.approx([-0.5, -0.5])


def test_colors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"split_color takes images \(B, 3, H, W\), not \(2, 1"):
        split_color(noise(2, 1, 4, 4))
    for luminance, chroma in (
        (noise(2, 2, 4, 4), noise(2, 2, 4, 4)),
        (noise(2, 1, 4, 4), noise(2, 1, 4, 4)),
        (noise(2, 1, 4, 4), noise(1, 2, 4, 4)),
        (noise(2, 1, 4, 4), noise(2, 2, 4, 5)),
        (noise(1, 4, 4), noise(1, 2, 4, 4)),
    ):
        with pytest.raises(ValueError, match="join_color takes luminance"):
            join_color(luminance, chroma)


@pytest.mark.parametrize(
    "net",
    [
        MLP((6, 5, 3)),
        models.build("lenet5"),
        models.build("digits-cnn"),
        models.build("resnet32"),
        Critic((784, 4, 10)),
    ],
    ids=lambda net: type(net).__name__,
)
def test_an_empty_batch_has_no_logits(net):
    shape = {"MLP": (6,), "LeNet5": (1, 28, 28), "ResNet32": (3, 32, 32), "Critic": (784,)}
    x = torch.zeros(0, *shape.get(type(net).__name__, (1, 8, 8)))
    assert len(net.eval()(x)) == 0
