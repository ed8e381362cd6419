"""Filters: laws over the table, and what each is for on images with known faults."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import save_clip
from safetensors.torch import load_file, save_file

from augment import Mixing, Planner, Rule, UserError
from augment.bank.fill import fill_bank
from augment.core.errors import UnknownImagesWarning
from augment.networks import timm_network
from augment.shards.write import contents
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.sources.images import save_image
from augment.synthesis.filters import FILTERS, Filter, Reference, make_filter
from augment.synthesis.filters.degenerate import blackness, statistics
from augment.synthesis.filters.reference import MIN_OWN
from augment.synthesis.synthesizer import Synthesizer

CPU = torch.device("cpu")
COUNTS = (MIN_OWN + 2, 5, 1)
"""Images of the laws' classes: judged by itself, by all, and one alone."""

NETWORK = "test_resnet"
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-train.tar.gz"
RANDOM = "of a random network, whose cosines are so alike that their last digits count"
TOLERANCES = {"prototype": (1e-4, RANDOM), "clip": (1e-4, RANDOM)}
"""How far apart an image's scores may be in two batches, if not 1e-5; with the reason."""

every_filter = pytest.mark.parametrize("name", FILTERS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def textures(label, count, channels=3, size=16, seed=0, phases=1.0):
    """Pictures of a class: waves across, down or both, in any phase and contrast, and tinted."""
    throw = generator(100 * seed + label)
    phase, contrast, shade = torch.rand(3, count, 1, 1, generator=throw)
    ramp = torch.arange(size) * (2 * torch.pi / size)
    down, across = ((1, 0), (0, 1), (1, 1))[label]
    wave = (2 * (down * ramp[:, None] + across * ramp) + 6.3 * phases * phase).sin()
    grey = 0.45 + 0.1 * shade + (0.2 + 0.1 * contrast) * wave
    images = grey[:, None] + 0.02 * torch.randn(count, channels, size, size, generator=throw)
    images[:, label % channels] += 0.05
    return images.clamp(0, 1)


def bank_of(real, prompts=None, names="abcdefghij"):
    """A reference to lists of images."""
    classes = list(names[: len(real)])

    def chosen(label, limit):
        images = real[label]
        if limit is None or limit >= len(images):
            return images
        return images[torch.linspace(0, len(images) - 1, limit).long()]

    return Reference(classes, prompts or [""] * len(real), chosen, CPU)


def save_network(folder, seed=0, classes=3, channels=3, prefix="", name=NETWORK):
    """Weights of a network without training."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(name, num_classes=classes, in_chans=channels)
    path = folder / f"{name}-{seed}-{classes}-{channels}{prefix}.safetensors"
    save_file({prefix + key: value for key, value in network.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What makes each filter run without a network connection."""
    folder = tmp_path_factory.mktemp("networks")
    save_clip(folder / "clip")
    weights = {"model": NETWORK, "weights": save_network(folder, prefix="network.")}
    found = {"classifier": weights, "prototype": weights, "clip": {"model": str(folder / "clip")}}
    return {name: found.get(name, {}) for name in FILTERS}


@pytest.fixture(scope="module")
def reference():
    real = [textures(label, count) for label, count in enumerate(COUNTS)]
    return bank_of(real, ["a cat", "a mat", "cat on mat"])


@pytest.fixture(scope="module")
def batch():
    """Images that no bank has, some of them faulty, and labels that are partly wrong."""
    images = torch.cat([textures(label, 2, seed=1) for label in range(3)])
    faulty = torch.rand(2, 3, 16, 16, generator=generator(9))
    return torch.cat([images, faulty]), [0, 0, 1, 1, 2, 0, 1, 2]


@pytest.fixture(scope="module")
def prepared(settings, reference):
    return {name: make_filter(name, **settings[name]).prepare(reference) for name in FILTERS}


@every_filter
def test_scores_are_finite_numbers_one_an_image(name, prepared, batch):
    images, labels = batch
    before = images.clone()
    scores = prepared[name](images, labels)
    assert scores.shape == (len(images),)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert scores.std() > 0
    assert torch.equal(images, before)


@every_filter
def test_an_image_has_its_score_in_any_batch(name, prepared, batch):
    images, labels = batch
    together, tolerance = prepared[name](images, labels), TOLERANCES.get(name, (1e-5,))[0]
    alone = [prepared[name](images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(torch.cat(alone), together, rtol=tolerance, atol=tolerance)
    order = torch.randperm(len(images), generator=generator(3)).tolist()
    shuffled = prepared[name](images[order], [labels[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=tolerance, atol=tolerance)
    many = prepared[name](images.repeat(20, 1, 1, 1), labels * 20)[-len(images) :]
    torch.testing.assert_close(many, together, rtol=tolerance, atol=tolerance)


@every_filter
def test_prepared_again_it_scores_the_same_and_throws_no_dice(
    name, settings, reference, prepared, batch
):
    state = torch.get_rng_state()
    again = make_filter(name, **settings[name]).prepare(reference)(*batch)
    assert torch.equal(again, prepared[name](*batch))
    assert torch.equal(torch.get_rng_state(), state)


@every_filter
def test_an_image_that_is_no_number_is_not_kept(name, prepared, batch):
    images = batch[0].clone()
    images[0, 0, 3, 3] = torch.nan
    scores = prepared[name](images, batch[1])
    assert not scores[0] >= make_filter(name).minimum
    assert scores[1:].isfinite().all()


@every_filter
def test_settings_are_checked_and_named(name):
    made = make_filter(name)
    assert isinstance(made, Filter)
    assert isinstance(made.minimum, float)
    assert make_filter(name, minimum=None).minimum is None
    assert make_filter(name, minimum=1) == make_filter(name, minimum=1.0)
    with pytest.raises(UserError, match=r"out of .*minimum, got 'threshold'"):
        make_filter(name, threshold=0.5)
    for wrong in ("0.5", True, float("nan")):
        with pytest.raises(UserError, match=f"minimum of {name} as float or None"):
            make_filter(name, minimum=wrong)


def test_an_unknown_filter_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=", ".join(FILTERS)):
        make_filter("sharpness")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("prototype", "quantile", 0.5),
        ("clip", "quantile", 0.0),
        ("degenerate", "quantile", -1.0),
        ("duplicate", "size", 0),
        ("clip", "to", "caption"),
    ],
)
def test_settings_out_of_range_are_refused(name, setting, value):
    with pytest.raises(UserError, match="expected a"):
        make_filter(name, **{setting: value})


# fashion


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """The embedded images: real ones, and as many held out of each class."""
    root = tmp_path_factory.mktemp("fashion")
    folders = (
        write_fashion(root / "real", "shots"),
        write_fashion(root / "test", "test", [*range(40)]),
    )
    return [
        [torch.stack([source.load(i, 1, 32) for i in ids]) for ids in source.ids.values()]
        for source in map(Folder, folders)
    ]


def rate(scores, made, of, reject=False):
    """The share of lists of images, a class each, that a filter keeps (or rejects)."""
    kept = torch.cat([scores(images, [label] * len(images)) for label, images in enumerate(of)])
    share = (kept >= made.minimum).float().mean().item()
    return 1 - share if reject else share


TROUSER, SNEAKER, BAG = 9, 7, 1


@pytest.fixture(scope="module")
def three(fashion):
    """Real and held-out images of three classes that are easily kept apart."""
    return [[part[label] for label in (TROUSER, SNEAKER, BAG)] for part in fashion]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was trained for seconds on other images of the three classes."""
    import timm

    folder = tmp_path_factory.mktemp("trained")
    source = Folder(write_fashion(folder / "train", "test", [*range(100, 132)]))
    names = [source.classes[label] for label in (TROUSER, SNEAKER, BAG)]
    images = torch.stack([source.load(i, 1, 32) for name in names for i in source.ids[name]])
    labels = torch.arange(3).repeat_interleave(32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(NETWORK, num_classes=3, in_chans=1)
        optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
        for _ in range(60):
            rows = torch.randperm(96)[:48]
            loss = F.cross_entropy(network((images[rows] - 0.5) * 4), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path = folder / "trained.safetensors"
    save_file({f"network.{key}": value for key, value in network.state_dict().items()}, path)
    return {"model": NETWORK, "weights": str(path)}


def test_a_classifier_keeps_right_labels_and_rejects_wrong_ones(trained, three):
    made = make_filter("classifier", **trained)
    scores = made.prepare(bank_of(three[0]))
    assert rate(scores, made, three[1]) > 0.95
    assert rate(scores, made, three[1][1:] + three[1][:1], reject=True) > 0.95


def test_confidence_is_against_the_strongest_rival_for_any_number_of_classes(settings, reference):
    given = settings["classifier"]
    scores = make_filter("classifier", **given).prepare(reference)
    images = textures(0, 5, seed=2)
    logits = timm_network(given["model"], given["weights"], 3, CPU)(images)
    for label in range(3):
        others = logits[:, [k for k in range(3) if k != label]].amax(1)
        expected = torch.stack([logits[:, label], others], 1).softmax(1)[:, 0]
        torch.testing.assert_close(scores(images, [label] * 5), expected.float())


def test_networks_see_images_as_they_were_trained(tmp_path):
    """timm's size and normalisation; our own classifier's are the image's, 0.5 and 0.25."""
    import timm

    images = textures(0, 3, channels=1, size=24)
    for prefix in ("", "network."):
        path = save_network(tmp_path, channels=1, prefix=prefix)
        with torch.random.fork_rng():
            network = timm.create_model(NETWORK, num_classes=3, in_chans=1).eval()
        state = {key.removeprefix(prefix): value for key, value in load_file(path).items()}
        network.load_state_dict(state)
        inputs = (images - 0.5) * 4
        if not prefix:
            inputs = F.interpolate(images, (160, 160), mode="bilinear", antialias=True) * 2 - 1
        with torch.no_grad():
            expected = network(inputs)
        got = timm_network(NETWORK, path, 3, CPU)(images)
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)
        colour = images * torch.tensor([0.5, (1 - 0.1495 - 0.171) / 0.587, 1.5])[:, None, None]
        torch.testing.assert_close(timm_network(NETWORK, path, 3, CPU)(colour), got)


def test_wrong_weights_are_told_apart(tmp_path, monkeypatch, reference):
    def prepare(name="classifier", **given):
        make_filter(name, **{"model": NETWORK, **given}).prepare(reference)

    with pytest.raises(UserError, match=r"3 classes, got .*safetensors for 5; give weights"):
        prepare(weights=save_network(tmp_path, classes=5))
    with pytest.raises(UserError, match="3 classes, got test_resnet for 1000; give weights"):
        prepare()
    with pytest.raises(UserError, match="expected weights of test_resnet, got"):
        prepare("prototype", weights=save_network(tmp_path, name="test_efficientnet"))
    with pytest.raises(UserError, match=r"\.safetensors file, got .*no\.safetensors"):
        prepare(weights=str(tmp_path / "no.safetensors"))
    (tmp_path / "pickle.pt").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match=r"\.safetensors file, got .*pickle\.pt"):
        prepare(weights=str(tmp_path / "pickle.pt"))
    with pytest.raises(UserError, match="expected a network of timm, got 'resnet'"):
        prepare(model="resnet")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"latent-augment\[train\]"):
        prepare()


@pytest.mark.parametrize("before", ["", "local-dir:"])
def test_shards_know_the_model_in_a_folder_by_its_content(before, tmp_path):
    for name, content in (("config.json", "{}"), ("model.safetensors", "1")):
        (tmp_path / name).write_text(content)
    judge = make_filter("prototype", model=f"{before}{tmp_path}")
    known = contents(judge)["model"]
    assert contents(judge)["model"] == known and str(tmp_path) not in known
    (tmp_path / "model.safetensors").write_text("2")
    assert contents(judge)["model"] != known
    assert contents(make_filter("prototype", model="resnet18"))["model"] == "resnet18"


def test_a_classifier_needs_two_classes():
    with pytest.raises(UserError, match="2 classes"):
        make_filter("classifier").prepare(bank_of([textures(0, 3)]))


# prototype and clip


def test_a_prototype_rejects_images_of_other_classes(trained, three):
    made = make_filter("prototype", **trained)
    scores = made.prepare(bank_of(three[0]))
    assert rate(scores, made, three[1]) > 0.9
    assert rate(scores, made, three[1][1:] + three[1][:1], reject=True) > 0.95


def test_the_median_real_image_scores_one_and_the_quantile_zero(settings):
    images = textures(0, MIN_OWN + 1)
    scores = make_filter("prototype", quantile=0.1, **settings["prototype"])
    found = scores.prepare(bank_of([images]))(images, [0] * len(images))
    rows = timm_network(*settings["prototype"].values(), 0, CPU)(images)
    rows = F.normalize(rows, dim=1)
    own = torch.stack([(rows.sum(0) - row) @ row / (len(rows) - 1) for row in rows])
    middle = own.quantile(0.5)
    spread = (middle - own.quantile(0.1)).clamp_min(1e-3)
    expected = (rows @ rows.mean(0) - middle) / spread + 1
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_one_image_a_class_gives_no_scale(settings):
    single = bank_of([textures(0, 1), textures(1, 1)], ["a cat", "a mat"])
    for name in ("prototype", "clip"):
        given = settings[name] | ({"to": "images"} if name == "clip" else {})
        with pytest.raises(UserError, match="2 real images or more"):
            make_filter(name, **given).prepare(single)
    make_filter("clip", **settings["clip"]).prepare(single)


def test_a_class_without_images_is_named(settings):
    empty = bank_of([textures(0, 0), textures(1, 4)])
    with pytest.raises(UserError, match="real images of class 'a', got none"):
        make_filter("degenerate").prepare(empty)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A CLIP whose texts are where the images of their class are, away from what all share."""
    from augment.networks import load_clip

    folder = str(tmp_path_factory.mktemp("clip"))
    real = [textures(label, 40, phases=0.1) for label in range(3)]
    seen = bank_of(real, ["a cat", "mat", "on"])
    save_clip(folder)
    clip = load_clip(folder, CPU)
    model, processor = clip.model, clip.processor
    mean, std = (
        torch.tensor(part)[:, None, None] for part in (processor.image_mean, processor.image_std)
    )
    pooled = [model.vision_model(pixel_values=(part - mean) / std).pooler_output for part in real]
    shared = torch.cat(pooled).mean(0)
    model.vision_model.post_layernorm.bias -= shared
    towards = [model.visual_projection(part - shared).mean(0) for part in pooled]
    model.text_projection.weight.copy_(torch.eye(32))
    texts = clip.texts(seen.prompts).float()
    model.text_projection.weight.copy_((torch.linalg.pinv(texts) @ torch.stack(towards)).T)
    model.save_pretrained(folder)
    return folder, seen


@pytest.mark.parametrize("to", ["prompt", "images"])
def test_clip_rejects_images_of_other_classes(to, knowing):
    folder, seen = knowing
    made = make_filter("clip", model=folder, to=to)
    scores = made.prepare(seen)
    fresh = [textures(label, 30, seed=4, phases=0.1) for label in range(3)]
    assert rate(scores, made, fresh) > 0.85
    assert rate(scores, made, fresh[1:] + fresh[:1], reject=True) > 0.6


def test_clip_wants_prompts_that_fit_and_a_whole_clip(settings, tmp_path, monkeypatch):
    def prepare(prompts, **given):
        bank = bank_of([textures(0, 3), textures(1, 3)], prompts)
        make_filter("clip", **settings["clip"] | given).prepare(bank)

    prepare(["", ""], to="images")
    with pytest.raises(UserError, match="expected a prompt for every class, got none for 'b'"):
        prepare(["a cat", ""])
    with pytest.raises(UserError, match="at most 75 tokens"):
        prepare(["a cat", "cat " * 80])
    with pytest.raises(UserError, match=r"got '.*nowhere'"):
        prepare(["a", "b"], model=str(tmp_path / "nowhere"))
    folder = tmp_path / "text"
    model = save_clip(folder)
    state = {k: v for k, v in model.state_dict().items() if "vision_model" not in k}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"whole CLIP .* damaged in vision_model"):
        prepare(["a", "b"], model=str(folder))
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": torch.zeros(1)}, folder / "evil.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": {"logit_scale": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index of safetensors files beside it, got evil\.bin"):
        prepare(["a", "b"], model=str(folder))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"latent-augment\[sd\]"):
        prepare(["a", "b"])


# duplicate


@pytest.mark.parametrize("shots", [32, 5, 1])
def test_copies_are_near_and_other_images_are_not(fashion, shots):
    real = [images[:shots] for images in fashion[0]]
    made = make_filter("duplicate")
    scores = made.prepare(bank_of(real))
    assert max(scores(images, [k] * shots).max() for k, images in enumerate(real)) < 1e-6
    noise = 0.05 * torch.randn(real[0].shape, generator=generator())
    assert rate(scores, made, [(part + noise).clamp(0, 1) for part in real], reject=True) > 0.99
    assert rate(scores, made, fashion[1]) > 0.95


def test_a_copy_of_another_class_is_no_copy_of_this_one(three):
    scores = make_filter("duplicate").prepare(bank_of(three[0]))
    assert scores(three[0][0], [1] * 32).min() > 0.4


def test_copies_seen_by_a_network(trained, three):
    made = make_filter("duplicate", **trained)
    scores = made.prepare(bank_of(three[0]))
    assert rate(scores, made, three[0], reject=True) == 1
    assert rate(scores, made, three[1]) > 0.85


def test_a_real_image_is_as_far_as_real_images_are():
    images = textures(0, MIN_OWN)
    rows = F.interpolate(images, (8, 8), mode="bilinear", antialias=True).flatten(1).double()
    apart = torch.stack([(rows - row).square().mean(1).sqrt() for row in rows])
    usual = apart.fill_diagonal_(9).amin(1).quantile(0.5)
    fresh = textures(0, 4, seed=6)
    small = F.interpolate(fresh, (8, 8), mode="bilinear", antialias=True).flatten(1).double()
    expected = torch.stack([(rows - row).square().mean(1).sqrt().amin() for row in small]) / usual
    scores = make_filter("duplicate", size=8).prepare(bank_of([images]))
    torch.testing.assert_close(scores(fresh, [0] * 4).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_single_real_image_has_no_scale():
    with pytest.raises(UserError, match="expected 2 real images"):
        make_filter("duplicate").prepare(bank_of([textures(0, 1)]))


# degenerate


def faults(images):
    """What sampling at its worst gives, in the shape of images."""
    noise = torch.rand(images.shape, generator=generator(1))
    blurred = F.interpolate(F.adaptive_avg_pool2d(images, 3), 32, mode="bilinear")
    found = {
        "black": torch.zeros_like(images),
        "white": torch.ones_like(images),
        "grey": torch.full_like(images, 0.5),
        "flat": images.mean((1, 2, 3), keepdim=True).expand(images.shape),
        "noise": noise,
        "faint noise": 0.35 + 0.3 * noise,
        "saturated": (images > images.mean((1, 2, 3), keepdim=True)).float(),
        "blurred": blurred,
    }
    if images.shape[1] == 3:
        found["tinted"] = images * torch.tensor([1, 0.25, 0.25])[:, None, None]
    return found


def assert_faults_are_caught(made, scores, held_out):
    for name in faults(held_out[0]):
        bad = [faults(images)[name] for images in held_out]
        assert rate(scores, made, bad, reject=True) > 0.95, name


def test_fashion_is_kept_and_faults_are_caught(fashion):
    made = make_filter("degenerate")
    scores = made.prepare(bank_of(fashion[0]))
    assert rate(scores, made, fashion[1]) > 0.95
    assert_faults_are_caught(made, scores, fashion[1])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """CIFAR-10: 200 images a class, and 60 held out."""
    if not CIFAR.exists():
        pytest.skip("no CIFAR-10 on this machine")
    root, numbers = tmp_path_factory.mktemp("cifar"), [*range(200), *range(4940, 5000)]
    names = {f"{number:04d}.jpg" for number in numbers}
    with tarfile.open(CIFAR) as archive:
        wanted = [member for member in archive if Path(member.name).name in names]
        archive.extractall(root, wanted, filter="data")
    source = Folder(root / "train")
    images = [torch.stack([source.load(i, 3, 32) for i in ids]) for ids in source.ids.values()]
    return [part[:200] for part in images], [part[200:] for part in images]


@pytest.mark.parametrize("shots", [30, 200])
def test_photographs_are_kept_and_faults_are_caught(shots, photographs):
    """Of few images a class all together are the yardstick, of many each class for itself."""
    real, held_out = photographs
    made = make_filter("degenerate")
    scores = made.prepare(bank_of([part[:shots] for part in real]))
    assert rate(scores, made, held_out) > 0.95
    assert_faults_are_caught(made, scores, held_out)


def photographs_of(count, throw, size=32):
    """Grey pictures of lit things before a background that is no single tone, with grain."""
    down, across = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    found = []
    for _ in range(count):
        tone, *slopes = torch.rand(3, generator=throw)
        image = 0.2 + 0.6 * tone + 0.8 * (slopes[0] - 0.5) * down + 0.6 * (slopes[1] - 0.5) * across
        for y, x, width, shade in torch.rand(3, 4, generator=throw):
            far = (down - y) ** 2 + (across - x) ** 2
            thing = (-((far / (0.01 + 0.05 * width)) ** 2)).exp()
            image = (1 - thing) * image + thing * shade * (1.3 - 0.6 * across)
        waves = 20 + 40 * torch.rand(2, generator=throw)
        image = image + 0.06 * (waves[0] * across + waves[1] * down).sin()
        grain = 0.03 * torch.randn(size, size, generator=throw)
        found.append((image + grain).clamp(0, 1)[None])
    return torch.stack(found)


def test_black_blobs_of_a_model_that_does_not_know_photographs_are_refused(tiny, tmp_path):
    """As a user makes them, with tiny; other photographs of their kind are kept."""
    throw, names = generator(), "abc"
    real, held_out = ([photographs_of(n, throw) for _ in names] for n in (8, 20))
    for name, images in zip(names, real, strict=True):
        for number, image in enumerate(images):
            save_image(image, tmp_path / "images" / name / f"{number}.png")
    with pytest.warns(UnknownImagesWarning, match="tiny DOES NOT KNOW THESE IMAGES"):
        bank = fill_bank(tmp_path / "bank", tiny, Folder(tmp_path / "images"), steps=10)
    planner = Planner(bank.members, Mixing())
    plans = [planner(0, index) for index in range(15)]
    blobs = Synthesizer(tiny, bank, Rule.parse("fade/chm")).images(plans)
    made = make_filter("degenerate")
    scores = made.prepare(bank_of(real))
    assert (scores(blobs, [plan.label for plan in plans]) < 0).float().mean() > 0.8
    assert rate(scores, made, held_out) > 0.9


def test_blackness_is_the_share_of_black_pixels():
    image = torch.linspace(0, 1, 100).view(1, 1, 10, 10)
    assert blackness(image).item() == pytest.approx(0.1**0.5)
    assert blackness(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)).item() == 0  # grey 0.114
    assert blackness(torch.tensor([0.3, 0.0, 0.0]).view(1, 3, 1, 1)).item() == 1


def test_a_class_of_its_own_range_and_one_of_all_classes():
    """A class of many images is judged by them; a class of few by those of all."""
    dark, light = textures(0, MIN_OWN) * 0.4, textures(1, MIN_OWN) * 0.4 + 0.6
    odd = textures(0, 5, seed=3) * 0.4 + 0.6
    many = make_filter("degenerate").prepare(bank_of([dark, light]))
    few = make_filter("degenerate").prepare(bank_of([dark[:30], light[:30]]))
    assert many(odd, [0] * 5).max() < 0 < few(odd, [0] * 5).min()
    assert many(odd, [1] * 5).min() > -1


def test_the_statistics_of_a_ramp():
    """Five columns from 0 to 1; the green of the colour one is half as bright."""
    ramp = torch.linspace(0, 1, 5).expand(1, 1, 4, 5)
    log = torch.tensor([0.25 + 1e-3, 1e-3 / (0.25 + 1e-3), ramp.std(correction=0) + 1e-3]).log()
    shares, middle = [0.2**0.5, 0.2**0.5], torch.tensor(0.5)
    expected = torch.stack([*torch.tensor(shares), log[0], log[1], middle, log[2]])
    torch.testing.assert_close(statistics(ramp)[0], expected)
    colour = ramp * torch.tensor([1, 0.5, 1])[:, None, None]
    grey = 0.5 * (0.299 + 0.587 / 2 + 0.114)
    tint = (1 / 2 - grey) / (grey + 0.1)
    torch.testing.assert_close(statistics(colour)[0, 6:], torch.tensor([tint, tint]))


def test_one_image_gives_others_of_its_kind_some_room():
    scores = make_filter("degenerate").prepare(bank_of([textures(0, 1)]))
    others = torch.cat([textures(0, 20, seed=5), textures(0, 20, seed=5).flip(-1) * 0.9])
    assert scores(others, [0] * 40).min() > 0
    assert scores(faults(others)["white"], [0] * 40).max() < 0


def test_few_images_still_tell_a_picture_from_none():
    real = [textures(0, 3), textures(1, 2)]
    made = make_filter("degenerate")
    scores = made.prepare(bank_of(real))
    assert rate(scores, made, [textures(0, 20, seed=5), textures(1, 20, seed=5)]) > 0.9
    for name in ("black", "white", "grey", "noise", "saturated"):
        bad = faults(textures(0, 20, seed=5))[name]
        assert rate(scores, made, [bad], reject=True) > 0.95, name


def test_a_small_class_is_not_read_where_the_pool_judges_it():
    asked = []

    def real(label: int, limit: int | None) -> torch.Tensor:
        asked.append(label)
        return torch.rand(
            min(40, limit or 40), 3, 32, 32, generator=torch.Generator().manual_seed(label)
        )

    labels = list(range(200))
    names = [f"c{label}" for label in labels]
    images = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    scores = []
    for counts in ([40] * 200, None):
        asked.clear()
        reference = Reference(names, [""] * 200, real, torch.device("cpu"), counts)
        scores.append(make_filter("degenerate").prepare(reference)(images, labels))
        assert len(asked) < 40 if counts else len(asked) >= 200
    assert torch.equal(*scores)
