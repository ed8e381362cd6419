"""Conditions as values: prompts, embeddings and schedules by level, on the embedded backbone."""

from itertools import pairwise

import pytest
import torch

from augment import Plan, Synthesizer, UserError, sample
from augment.bank.fill import fill_bank
from augment.diffusion.conditions import Schedule, embed, mix, rows_of, two_stages
from augment.diffusion.process import split
from augment.sources import Folder
from augment.sources.fashion import write_fashion

STEPS = 4


@pytest.fixture(scope="module")
def latents(tiny):
    return torch.randn(3, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def draw(tiny, latents):
    """Images of the three latents."""
    return lambda prompts, **more: sample(
        tiny, latents, prompts, **{"solver": "ddim", "steps": STEPS, "guidance": 3.0} | more
    )


def test_embeddings_are_their_prompts_to_the_bit(tiny, draw):
    words = ["top", "bag", ""]
    rows = tiny.condition(words)
    expected = draw(words)
    assert torch.equal(draw(rows), expected)
    assert torch.equal(draw(rows["text"]), expected)
    assert torch.equal(
        draw(["top", tiny.condition(["bag"]), tiny.condition([""])["text"]]), expected
    )
    assert torch.equal(draw(tiny.condition(["top"])), draw("top")), "one row is for all images"
    assert torch.equal(draw("top", negative=tiny.condition(["bag"])), draw("top", negative="bag"))


def test_a_constant_schedule_is_no_schedule(draw):
    words = ["top", "bag", ""]
    assert torch.equal(draw(Schedule(((0.0, words),))), draw(words))
    assert torch.equal(draw(Schedule(((0.6, words), (0.3, words), (0.0, words)))), draw(words))
    constant = Schedule(((0.5, "bag"), (0.0, "bag")))
    assert torch.equal(draw(words, negative=constant), draw(words, negative="bag"))


def test_a_schedule_is_its_parts_one_after_the_other(tiny, latents):
    """By hand: DDIM with one prompt above level 0.5, and the other at and below it."""
    levels, latent = tiny.process.levels(STEPS)[::-1], latents
    with torch.no_grad():
        for here, there in pairwise(levels):
            condition = tiny.condition(["top" if here > 0.5 else "bag"] * 3)
            output = tiny.network(latent, tiny.process.timestep(here), condition)
            clean, noise = split(tiny.process, latent, output, here)
            alpha, sigma = tiny.process.alpha_sigma(there)
            latent = alpha * clean + sigma * noise
    switched = Schedule(((0.5, "top"), (0.0, "bag")))
    found = sample(tiny, latents, switched, "ddim", STEPS)
    torch.testing.assert_close(found, tiny.decode(latent))
    each = [switched, "top", Schedule(((0.9, "bag"), (0.5, "top"), (0.0, "bag")))]
    mixed = sample(tiny, latents, each, "ddim", STEPS)
    assert torch.allclose(mixed[0], found[0], atol=1e-5)
    assert torch.allclose(mixed[1], sample(tiny, latents, "top", "ddim", STEPS)[1], atol=1e-5)
    assert not torch.allclose(mixed[2], found[2], atol=1e-2)


def test_two_stages_have_the_suffix_first():
    staged = two_stages(["a cat"], "in snow", 0.3)
    assert staged.at(1.0) == staged.at(0.75) == ["a cat, in snow"]
    assert staged.at(0.7) == staged.at(0.0) == ["a cat"]


def test_text_is_interpolated_with_the_noise_fixed(tiny, latents):
    ends = tiny.condition(["top", "bag"])
    shares = torch.linspace(0, 1, 3)
    between = mix(ends, torch.stack([1 - shares, shares], 1))
    one = latents[:1].expand(3, -1, -1, -1)
    images = sample(tiny, one, between, "ddim", STEPS)
    expected = sample(tiny, one[:2], ["top", "bag"], "ddim", STEPS)
    torch.testing.assert_close(images[[0, 2]], expected, rtol=0, atol=1e-4)
    apart = (images[1] - images[[0, 2]]).square().mean((1, 2, 3))
    assert apart.max() < (images[0] - images[2]).square().mean()


@pytest.fixture(scope="module")
def bank(tmp_path_factory, tiny):
    root = write_fashion(tmp_path_factory.mktemp("images"), "shots", [0])
    for folder in root.iterdir():
        if folder.name not in ("Coat", "Bag"):
            (folder / "000.png").unlink()
            folder.rmdir()
    where = tmp_path_factory.mktemp("bank")
    return fill_bank(where, tiny, Folder(root), {"Coat": "top", "Bag": "bag"}, steps=STEPS)


def test_a_synthesizer_takes_embeddings_schedules_and_blends_by_the_plans_weights(tiny, bank):
    ids = ("Bag/000.png", "Coat/000.png")
    plan = Plan(0, "Bag", ids, (0.25, 0.75), 0.0, 0, 0, 0, ("Bag", "Coat"))
    plain, blended = Synthesizer(tiny, bank), Synthesizer(tiny, bank, blend=True)
    rows = mix(tiny.condition(["bag", "top"]), torch.tensor([[0.25, 0.75]]))
    given = Synthesizer(tiny, bank, prompts={"Bag": rows})
    assert torch.equal(blended.images([plan]), given.images([plan]))
    assert not torch.allclose(blended.images([plan]), plain.images([plan]), atol=1e-3)
    alone = Plan.equal(1, "Coat", ["Coat/000.png"])
    assert torch.equal(blended.images([alone]), plain.images([alone]))
    constant = {"Coat": Schedule(((0.5, "top"), (0.0, "top")))}
    assert torch.equal(
        Synthesizer(tiny, bank, prompts=constant).images([alone]), plain.images([alone])
    )
    with pytest.raises(
        UserError, match="as text where images are kept on disk, got dict for class"
    ):
        given.texts  # noqa: B018


ODD = {
    "another width": (torch.zeros(1, 5), r"text of shape \(N, 128\), got \(1, 5\)"),
    "another number": (torch.zeros(2, 128), "embeddings of 3 images or of one for all"),
    "another name": ({"words": torch.zeros(1, 128)}, "embeddings named text, got words"),
    "too few prompts": (["top"], "expected 3 prompts"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_does_not_fit_is_refused_in_one_sentence(odd, tiny):
    given, message = ODD[odd]
    with pytest.raises(UserError, match=message):
        embed(tiny, rows_of(given, 3))


@pytest.mark.parametrize("bounds", [(), (0.5,), (0.3, 0.6, 0.0), (1.0, 0.0)])
def test_bounds_that_do_not_fall_to_0_are_refused(bounds):
    with pytest.raises(UserError, match="fall to 0"):
        Schedule(tuple((bound, "top") for bound in bounds))
