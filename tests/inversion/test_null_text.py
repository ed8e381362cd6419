"""Null-text inversion on real pictures with the embedded backbone, alone and in a bank."""

import pytest
import torch
from conftest import snapshot

from augment import LatentBank, Plan, Rule, UserError, sample
from augment.bank.fill import fill_bank
from augment.diffusion.conditions import Schedule
from augment.inversion import inverted, inverter
from augment.plan.planner import Planner
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.synthesis.synthesizer import Synthesizer

STEPS, GUIDANCE = 8, 5.0
NAMES = ("Coat", "Pullover", "Shirt")


@pytest.fixture(scope="module")
def coats(tmp_path_factory):
    root = write_fashion(tmp_path_factory.mktemp("tops"), "shots", [0])
    source = Folder(root)
    return torch.stack([source.load(f"{name}/000.png", 1, 32) for name in NAMES])


@pytest.fixture(scope="module")
def found(tiny, coats):
    return inverted(inverter("null_text", steps=STEPS), tiny, coats, "top", GUIDANCE)


def psnr(images, others):
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


def back(tiny, latents, nulls=None, guidance=GUIDANCE, **more):
    if nulls is not None:
        more["negative"] = Schedule.by_step(tiny.process.levels(STEPS), nulls)
    return sample(tiny, latents, "top", "ddim", STEPS, guidance, **more)


def test_the_guided_sampler_gives_the_images_back(tiny, coats, found):
    plain = inverted(inverter("ddim", steps=STEPS), tiny, coats, "top")["latents"]
    torch.testing.assert_close(found["latents"], plain, rtol=0, atol=1e-6)
    unguided = psnr(back(tiny, plain, guidance=1.0), coats)
    guided = psnr(back(tiny, plain), coats)
    with_nulls = psnr(back(tiny, plain, found["nulls"]), coats)
    assert found["nulls"].shape == (3, STEPS, 128)
    assert guided.mean() < unguided.mean() - 2, "guidance spoils the way back"
    assert with_nulls.mean() > unguided.mean() - 0.3, "and the embeddings repair it"


def test_a_batch_is_its_images_one_by_one(tiny, coats, found):
    run = inverter("null_text", steps=STEPS)
    for row in range(len(coats)):
        alone = inverted(run, tiny, coats[row : row + 1], "top", GUIDANCE)
        torch.testing.assert_close(alone["nulls"][0], found["nulls"][row], rtol=0, atol=1e-3)
        images = [
            back(tiny, kept["latents"][-1:], kept["nulls"][-1:])
            for kept in (alone, {key: value[: row + 1] for key, value in found.items()})
        ]
        torch.testing.assert_close(*images, rtol=0, atol=1e-3)


def test_one_embedding_may_be_shared_by_a_batch(tiny, coats):
    run = inverter("null_text", steps=STEPS, shared=True)
    kept = inverted(run, tiny, coats, "top", GUIDANCE, batch_size=2)
    assert kept["nulls"].shape == (2, STEPS, 128)
    assert kept["null_rows"].tolist() == [0, 0, 1]
    guided = psnr(back(tiny, kept["latents"]), coats)
    shared = psnr(back(tiny, kept["latents"], kept["nulls"][kept["null_rows"]]), coats)
    assert shared.mean() > guided.mean() + 2


def test_negative_prompt_leaves_nothing_to_guide_and_something_for_another_prompt(tiny, coats):
    latents = inverted(inverter("negative_prompt", steps=3), tiny, coats, "top")["latents"]
    same = sample(tiny, latents, "top", steps=3, guidance=6.0, negative="top")
    assert torch.equal(same, sample(tiny, latents, "top", steps=3))
    other = sample(tiny, latents, "bag", steps=3, guidance=6.0, negative="top")
    assert not torch.allclose(other, sample(tiny, latents, "bag", steps=3))


def test_the_interval_says_where_there_is_guidance(tiny, coats):
    latents = inverted(inverter("ddim", steps=4), tiny, coats, "top")["latents"]

    def images(**more):
        return sample(tiny, latents, "top", "ddim", 4, 4.0, **more)

    assert torch.equal(images(interval=(0.0, 1.0)), images())
    plain = sample(tiny, latents, "top", "ddim", 4)
    levels = tiny.process.levels(4)
    assert torch.equal(images(interval=(levels[1] + 0.01, levels[2] - 0.01)), plain)
    torch.testing.assert_close(images(interval=(levels[1], levels[4])), images())
    part = images(interval=(levels[2], levels[3]))
    assert not torch.allclose(part, plain) and not torch.allclose(part, images())


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny):
    root = write_fashion(tmp_path_factory.mktemp("images"), "shots", [0, 1])
    for folder in root.iterdir():
        if folder.name not in ("Coat", "Bag"):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    prompts = {"Coat": "top", "Bag": "bag"}
    path = tmp_path_factory.mktemp("bank") / "bank"
    return fill_bank(
        path, tiny, Folder(root), prompts, "null_text", steps=STEPS, guidance=GUIDANCE, inner=3
    )


def test_a_bank_keeps_the_embeddings_and_samples_with_them(tiny, bank, tmp_path):
    assert bank.inversion == {
        "method": "null_text", "solver": "ddim", "guidance": GUIDANCE, "steps": STEPS, "inner": 3,
        "shared": False,
    }  # fmt: skip
    nulls, rows = bank.null_embeddings("Coat")
    assert nulls.shape == (2, STEPS, 128)
    assert rows.tolist() == [0, 1]
    one = bank.subset(lambda image_id: image_id != "Coat/000.png")
    assert one.null_embeddings("Coat")[1].tolist() == [1]
    synthesizer = Synthesizer(tiny, bank, Rule.parse("nin/0"))
    how = synthesizer.resolved
    assert (how.solver, how.steps, how.guidance) == (
        "ddim",
        STEPS,
        GUIDANCE,
    )
    plan = Plan(1, "Coat", ("Coat/000.png", "Coat/001.png"), (1.0, 0.0), 0.0, 0, 0, 1)
    expected = back(tiny, bank.latents("Coat")[:1], nulls[:1])
    torch.testing.assert_close(synthesizer.images([plan]), expected, rtol=0, atol=1e-4)
    half = Plan(1, "Coat", plan.members, (0.5, 0.5), 0.5, 0, 0, 1)
    empty = tiny.condition([""])["text"]
    expected = 0.5 * nulls.float().mean(0) + 0.5 * empty
    torch.testing.assert_close(synthesizer.null(half), expected)
    assert LatentBank.open(bank.path).null_embeddings("Bag")[0].shape == (2, STEPS, 128)
    images = synthesizer.images([Planner(bank.members)(0, i) for i in range(2)])
    assert images.shape == (2, 1, 32, 32)


def test_a_harmed_file_of_embeddings_is_named(tiny, bank, tmp_path):
    copy = tmp_path / "bank"
    for name, content in snapshot(bank.path).items():
        if content:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
    (copy / "0001" / "chunk-0000.nulls.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"chunk-0000\.nulls\.safetensors"):
        LatentBank.open(copy).null_embeddings("Coat")


def test_a_bank_of_another_inversion_has_no_embeddings(tiny, tmp_path):
    source = Folder(write_fashion(tmp_path / "images", "shots", [0]))
    with pytest.raises(UserError, match="prompt for every image"):
        fill_bank(tmp_path / "bank", tiny, source, {"Bag": "bag"}, "null_text", steps=2)
    assert not (tmp_path / "bank").exists()
    plain = fill_bank(tmp_path / "bank", tiny, source, steps=1)
    with pytest.raises(UserError, match="null_text"):
        plain.null_embeddings("Coat")


def test_negative_prompt_inverts_without_guidance_whatever_it_samples_with(tiny, coats):
    run = inverter("negative_prompt", steps=4)
    plain, guided = (inverted(run, tiny, coats, "top", scale)["latents"] for scale in (1.0, 5.0))
    assert torch.equal(plain, guided)


def test_null_text_goes_on_in_inference_mode_and_asks_no_more_than_it_says(tiny, coats):
    asked, network = 0, tiny.network

    class Counting(type(tiny)):
        def __init__(self):
            self.__dict__ |= tiny.__dict__

        def network(self, latent, timestep, condition):
            nonlocal asked
            asked += 3 if torch.is_grad_enabled() else 1
            return network(latent, timestep, condition)

    run = inverter("null_text", steps=3, inner=2)
    with torch.inference_mode():
        kept = inverted(run, Counting(), coats[:1], "top", GUIDANCE)
    assert kept["nulls"].isfinite().all()
    assert asked <= run.evaluations
