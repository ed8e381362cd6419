"""The synthesizer: plans to centroids and images, in batches, and what it reads of a bank."""

import dataclasses
import math
import warnings

import pytest
import torch
from conftest import paint, planner_with

import augment.synthesis.synthesizer
from augment import (
    BankMismatch,
    LatentBank,
    Mixing,
    Planner,
    Rule,
    Sampling,
    Synthesizer,
    UserError,
    fill_bank,
    write_shards,
)
from augment.core.errors import BiasWarning
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.sources import Folder


def test_a_synthesizer_refuses_a_bank_of_another_backbone(bank):
    with pytest.raises(BankMismatch):
        Synthesizer(GaussianBackbone(mean=0.7, latent_shape=(1, 8, 8)), bank)


def test_no_plans_are_no_images(bank, gaussian):
    made = Synthesizer(gaussian, bank)
    assert made.mix([]).centroids.shape == (0, 1, 8, 8)
    assert len(made.images([])) == 0


def test_some_real_images_are_read_alone_and_spread_over_the_class(bank, gaussian, monkeypatch):
    made, read = Synthesizer(gaussian, bank), []
    original = augment.synthesis.synthesizer.read_original
    monkeypatch.setattr(
        augment.synthesis.synthesizer,
        "read_original",
        lambda root, image_id, digest: read.append(image_id) or original(root, image_id, digest),
    )
    whole = made.real("bee")
    assert len(whole) == len(read) == 4
    read.clear()
    assert torch.equal(made.real("bee", 2), whole[[0, 3]])
    assert read == ["bee/0.png", "bee/3.png"]
    assert torch.equal(made.reference.real(bank.classes.index("bee"), 9), whole)


def test_images_that_are_not_finite_are_refused(bank):
    class Overflowing(GaussianBackbone):
        def decode(self, clean):
            return super().decode(clean) * torch.inf

    made = Synthesizer(Overflowing(mean=0.1, latent_shape=(1, 8, 8)), bank)
    with pytest.raises(UserError, match="expected images of finite pixels"):
        made.images([Planner(bank.members, Mixing())(0, 0)])


def test_a_bias_that_the_rule_enlarges_is_told_once(gaussian, tmp_path):
    bank = fill_bank(tmp_path / "bank", gaussian, Folder(paint(tmp_path / "p", {"a": 9, "b": 9})))
    planner = Planner(bank.members, Mixing(alpha=math.inf))
    plans = [planner(0, index) for index in range(4)]
    generator = torch.Generator().manual_seed(0)
    biased = bank.to("cpu")
    for chunks in biased.chunks.values():
        latents = 0.3 + torch.randn(9, 1, 8, 8, generator=generator)
        biased._resident[chunks[0].file("latents")] = latents
        chunks[0] = dataclasses.replace(chunks[0], means=(latents.mean().item(),))

    def warned(rule):
        synthesizer = Synthesizer(gaussian, bank, Rule.parse(rule), Sampling(steps=1))
        synthesizer.bank = biased
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            synthesizer.images(plans)
            synthesizer.images(plans)
        return [str(warning.message) for warning in seen if warning.category is BiasWarning]

    (message,) = warned("fix/0")
    assert message.startswith("class 'a': fix/0 makes the channel means 2.1 times")
    assert "fix/chm keeps them" in message
    assert warned("fix/chm") == []


def test_lol_takes_the_mean_of_the_bank(gaussian, bank):
    synthesizer = Synthesizer(gaussian, bank, Rule.parse("lol"), Sampling(steps=1))
    everything = torch.cat([bank.latents(name) for name in bank.classes])
    torch.testing.assert_close(synthesizer.mu, everything.mean(0))
    plan = Planner(bank.members)(0, 1)
    points = bank.gather([plan])[0][0]
    expected = Rule.parse("lol")(points[None], torch.tensor([plan.weights]), everything.mean(0))
    torch.testing.assert_close(synthesizer.centroid(plan), expected[0])
    assert Synthesizer(gaussian, bank, Rule.parse("fix/chm"), Sampling(steps=1)).mu is None


BATCHED = ("fade/chm", "fix/0", "nin/lp2.5", "nao/chm", "vp/mu", "lin/0", "lol")


@pytest.mark.parametrize("rule", BATCHED)
def test_plans_mixed_together_are_those_mixed_alone_to_the_bit(bank, gaussian, rule):
    made = Synthesizer(gaussian, bank, Rule.parse(rule), Sampling(steps=1))
    plans = [
        planner_with(bank.members, noise=noise, members=members, seed=seed)(0, index)
        for seed in range(3)
        for noise in (0.0, 0.3)
        for members in (2, None)
        for index in range(3)
    ]
    alone = torch.stack([made.centroid(plan) for plan in plans])
    assert torch.equal(made.mix(plans).centroids, alone)


def test_plans_of_equally_many_members_are_one_read_and_one_call(bank, gaussian, monkeypatch):
    calls = []
    gather, rule = LatentBank.gather, Rule.__call__
    monkeypatch.setattr(LatentBank, "gather", lambda *given: calls.append("read") or gather(*given))
    monkeypatch.setattr(Rule, "__call__", lambda *given: calls.append("rule") or rule(*given))
    made = Synthesizer(gaussian, bank, sampling=Sampling(steps=1))
    plans = [planner_with(bank.members, members=2)(0, 3 * index) for index in range(5)]
    assert made.mix(plans).centroids.shape == (5, *gaussian.latent_shape)
    assert calls == ["read", "rule"]
    monkeypatch.setattr(augment.synthesis.synthesizer, "MAX_POINTS", 2 * 3 * 64)
    made.mix(plans)
    assert calls == ["read", "rule"] * 4, "two plans at a time, of (2 members + 1) · 64 numbers"


def test_synthesis_reads_the_chunks_of_its_plans_alone(gaussian, tmp_path, monkeypatch):
    root = paint(tmp_path / "p", {"ant": 2, "bee": 2, "cat": 2})
    path = fill_bank(tmp_path / "bank", gaussian, Folder(root), steps=1).path
    opened = []
    read = LatentBank._read

    def reading(bank, chunk, kind, *keys):
        opened.append(chunk.stem.parent.name)
        return read(bank, chunk, kind, *keys)

    monkeypatch.setattr(LatentBank, "_read", reading)
    bank = LatentBank.open(path)
    made = Synthesizer(gaussian, bank, sampling=Sampling(steps=1))
    write_shards(made, Planner(bank.members), {"bee": 4}, tmp_path / "shards")
    assert set(opened) == {"0001"}
