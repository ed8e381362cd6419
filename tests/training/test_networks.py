"""Networks, heads, and what learns."""

import copy

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from augment import UserError
from augment.training.models.finetune import (
    AuxiliaryBatchNorm,
    CosineHead,
    ScaledHead,
    add_lora,
    auxiliary,
    features,
    freeze,
    get_head,
    head_name,
    set_head,
    tau_normalised,
    train_mode,
    with_auxiliary_norms,
)
from augment.training.models.networks import NETWORKS, build_network

VIT = "test_vit"
TIMM = ("test_resnet", "test_efficientnet", VIT)
every_network = pytest.mark.parametrize("name", [*NETWORKS, *TIMM])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def images(network="small_cnn", n=4, channels=3):
    side = 160 if network == VIT else 32
    return torch.rand(n, channels, side, side)


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def changed(network, before):
    after = network.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def step(network, batch, k=3):
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    F.cross_entropy(network(batch), torch.arange(len(batch)) % k).backward()
    optimizer.step()


@every_network
@pytest.mark.parametrize("channels", [1, 3])
def test_the_head_of_features_is_the_network(name, channels):
    network, batch = build_network(name, channels, 3).eval(), images(name, 2, channels)
    head = get_head(network)
    given = features(network, batch)
    assert isinstance(head, nn.Linear) and head.out_features == 3
    assert given.shape == (2, head.in_features)
    assert torch.equal(head(given), network(batch))
    assert not head._forward_pre_hooks


@every_network
def test_another_head_is_put_in_place(name):
    network, batch = build_network(name, 3, 3).eval(), images(name, 2)
    given, head = features(network, batch), get_head(network)
    for other in (
        CosineHead(head.in_features, 5),
        ScaledHead(head),
        nn.Linear(head.in_features, 7),
    ):
        set_head(network, other)
        assert get_head(network) is other
        assert torch.equal(features(network, batch), given)
        assert torch.equal(network(batch), other(given))
        freeze(network)
        names = {n for n, p in network.named_parameters() if p.requires_grad}
        assert names == {f"{head_name(network)}.{n}" for n, _ in other.named_parameters()}


def test_resnet32_is_that_of_the_literature():
    network = build_network("resnet32", 3, 10)
    assert sum(p.numel() for p in network.parameters()) == 464_154
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 32
    for layer in layers[1:-1]:
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_resnet12_is_that_of_cifar_fs():
    network = build_network("resnet12", 3, 64)
    assert sum(p.numel() for p in network[:-1].parameters()) == 12_424_320
    assert len([m for m in network.modules() if isinstance(m, nn.Conv2d)]) == 12 + 4
    assert network[:4](torch.rand(1, 3, 32, 32)).shape == (1, 640, 2, 2)
    assert network[:-1](torch.rand(2, 3, 84, 84)).shape == (2, 640)


def test_a_shortcut_is_the_strided_image_between_zeros():
    block = build_network("resnet32", 3, 10)[8].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_resnet10_has_ten_layers():
    network = build_network("resnet10", 3, 1000)
    convolutions = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    assert len([name for name in convolutions if "downsample" not in name]) + 1 == 10
    assert sum(p.numel() for p in network.parameters()) == 5_418_792
    assert all((m.weight == 1).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("name", "pretrained", "words"),
    [
        ("resnet99", False, "expected small_cnn, .* timm, got 'resnet99'; see"),
        ("small_cnn", True, "expected lite0 or a network of timm to be pretrained, got small_cnn"),
        ("coatnet_0_224", True, "expected to build coatnet_0_224 .*No pretrained weights exist"),
        ("test_resnet", True, "expected to build test_resnet .*check the connection"),
        ("resnet18.nonsense", True, "expected to build .*nvalid pretrained tag"),
    ],
)
def test_a_network_that_cannot_be_had_is_one_sentence(
    name, pretrained, words, monkeypatch, tmp_path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"^{words}") as caught:
        build_network(name, 3, 3, pretrained)
    assert "\n" not in str(caught.value)


def test_options_are_refused_before_weights_are_loaded():
    with pytest.raises(UserError, match="expected none as options of lite0, got nonsense"):
        build_network("lite0", 3, 3, True, options={"nonsense": 3})


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "got Sequential with none"),
        (
            timm.create_model("levit_128s", num_classes=3),
            r"with \('head.linear', 'head_dist.linear'\)",
        ),
        (timm.create_model("test_resnet", num_classes=0), "got Identity"),
    ],
    ids=["none", "two", "no classes"],
)
def test_a_network_without_one_linear_head_is_one_sentence(network, words):
    for use in (get_head, freeze, lambda network: train_mode(network, "head")):
        with pytest.raises(UserError, match=rf"^expected a network with .*{words}"):
            use(network)


def test_tau_is_the_power_of_the_norm():
    head = nn.Linear(8, 5)
    assert torch.equal(tau_normalised(head, 0).weight, head.weight)
    torch.testing.assert_close(tau_normalised(head, 1).weight.norm(dim=1), torch.ones(5))
    half = tau_normalised(head, 0.5)
    torch.testing.assert_close(half.weight.norm(dim=1), head.weight.norm(dim=1).sqrt())
    torch.testing.assert_close(F.normalize(half.weight), F.normalize(head.weight))
    assert half.bias is None and half.weight.requires_grad


def test_cosines_do_not_know_lengths():
    head, x = CosineHead(8, 5), torch.randn(6, 8)
    cosines = F.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(x), cosines)
    torch.testing.assert_close(head(3 * x), cosines)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))


def test_scales_alone_are_learnt():
    linear, x = nn.Linear(8, 3), torch.randn(6, 8)
    head = ScaledHead(linear)
    assert torch.equal(head(x), linear(x))
    assert [name for name, _ in head.named_parameters()] == ["scales"]
    with torch.no_grad():
        head.scales.copy_(torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(head(x), linear(x) * torch.tensor([1.0, 2.0, 0.5]))
    before = state(head)
    step(head, x)
    assert changed(head, before) == {"scales"}
    assert torch.equal(head.weight, linear.weight) and head.weight is not linear.weight
    for use in (ScaledHead, lambda head: tau_normalised(head, 1)):
        with pytest.raises(UserError, match=r"^expected a linear head, got ScaledHead"):
            use(head)


@every_network
def test_a_frozen_network_learns_in_its_head_alone(name):
    network, batch = build_network(name, 3, 3), images(name)
    freeze(network)
    train_mode(network, "head")
    before, head = state(network), head_name(network)
    step(network, batch)
    assert changed(network, before) == {f"{head}.weight", f"{head}.bias"}
    train_mode(network)
    assert all(module.training for module in network.modules())


def test_an_unknown_way_to_tune_is_one_sentence():
    with pytest.raises(UserError, match=r"way to tune out of all, head, lora, got 'some'"):
        train_mode(nn.Linear(1, 1), "some")


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [(VIT, None, 12), (VIT, ["mlp.fc1"], 6), ("small_cnn", ["0", "6"], 2)],
)
def test_adapters_and_head_alone_learn(name, targets, count):
    network, batch = build_network(name, 3, 3), images(name)
    logits = network.eval()(batch)
    head = head_name(network)
    network = add_lora(network, 2, targets)
    torch.testing.assert_close(network.eval()(batch), logits)
    learning = {n for n, p in network.named_parameters() if p.requires_grad}
    adapters = learning - {f"{head}.weight", f"{head}.bias"}
    assert len(adapters) == len(learning) - 2 and all("lora_" in n for n in adapters)
    assert len(adapters) == 2 * count
    train_mode(network, "lora")
    before = state(network)
    step(network, batch)
    step(network, batch)  # A moves once B is not zero
    assert changed(network, before) == learning


def test_an_adapter_never_sits_where_it_would_be_idle():
    network = timm.create_model("beit_base_patch16_224", num_classes=3, depth=1, embed_dim=24)
    names = {n for n, _ in add_lora(network, 2).named_parameters() if "lora_" in n}
    assert names and not any("qkv" in name for name in names)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize(
    ("name", "rank", "targets", "words"),
    [
        ("small_cnn", 2, None, "layers named attn for LoRA in Chain"),
        (VIT, 2, ["nothing"], "layers named nothing"),
        (VIT, 2, ["head"], "layers named head"),
        (VIT, 0, None, "rank ≥ 1, got 0"),
        ("test_efficientnet", 3, ["conv_dw"], "layers that LoRA fits"),
    ],
)
def test_wrong_adapters_are_one_sentence(name, rank, targets, words):
    with pytest.raises(UserError, match=rf"^expected {words}"):
        add_lora(build_network(name, 3, 3), rank, targets)


@pytest.mark.parametrize("name", [*NETWORKS, "test_resnet", "test_efficientnet"])
def test_synthetic_images_have_norms_of_their_own(name):
    network, batch = build_network(name, 3, 3), images(name)
    plain = copy.deepcopy(network)
    network = with_auxiliary_norms(network)
    assert with_auxiliary_norms(network) is network
    norms = [m for m in network.modules() if isinstance(m, AuxiliaryBatchNorm)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert torch.equal(network.eval()(batch), plain.eval()(batch))
    train_mode(network)
    before = state(network)
    with auxiliary(network):
        step(network, batch)
    moved = changed(network, before)
    assert any(".aux.running_mean" in n for n in moved)
    assert not any(".main." in n for n in moved)
    before = state(network)
    step(network, batch)
    moved = changed(network, before)
    assert any(".main.running_mean" in n for n in moved)
    assert not any(".aux.running" in n for n in moved)
    network.eval()
    main = network(batch)
    with auxiliary(network):
        assert torch.equal(network(batch), main)


def test_the_flag_falls_after_an_error():
    network = with_auxiliary_norms(build_network("small_cnn", 3, 3))
    with pytest.raises(ZeroDivisionError), auxiliary(network):
        raise ZeroDivisionError
    assert not any(getattr(m, "synthetic", False) for m in network.modules())


def test_a_network_without_norms_is_one_sentence():
    network = build_network(VIT, 3, 3)
    with pytest.raises(UserError, match=r"^expected a network with batch norms"):
        with_auxiliary_norms(network)
    with (
        pytest.raises(UserError, match=r"^expected a network with auxiliary norms"),
        auxiliary(network),
    ):
        pass
