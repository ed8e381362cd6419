"""RandAugment of a batch has the bits of torchvision's of each image."""

import pytest
import torch
from torchvision.transforms import v2

from augment.core.rng import rng
from augment.training.data.randaugment import OPERATIONS, draw, randaugment
from augment.training.data.transforms import Augmentation

COUNT = 96  # so that every operation and sign is there


def pictures(channels: int, side: int) -> torch.Tensor:
    """Noise, and smooth pictures of little contrast, in turn."""
    generator = torch.Generator().manual_seed(side)
    noise = torch.rand(COUNT, channels, side, side, generator=generator)
    coarse = torch.rand(COUNT, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear") * 0.7 + 0.1
    return (torch.stack([noise, smooth], 1).flatten(0, 1)[:COUNT] * 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("channels", "side", "count", "magnitude"),
    [(3, 32, 2, 9), (1, 32, 2, 9), (3, 33, 3, 17), (3, 65, 2, 30), (1, 28, 3, 0)],
)
def test_a_batch_has_the_bits_of_torchvisions_images(channels, side, count, magnitude):
    images, single = pictures(channels, side), v2.RandAugment(count, magnitude)
    drawn, expected = [], []
    with torch.random.fork_rng(devices=[]):
        for seed, image in enumerate(images):
            torch.manual_seed(seed)
            expected.append(single(image))
            torch.manual_seed(seed)
            drawn.append(draw(count))
    kinds = {name: {sign for row in drawn for n, sign in row if n == name} for name in OPERATIONS}
    assert all(signs in ({0}, {-1, 1}) for signs in kinds.values()), "each was drawn, both ways"
    assert torch.equal(randaugment(images, drawn, magnitude), torch.stack(expected))


@pytest.mark.parametrize("crop", [None, "resized"])
def test_the_draws_follow_those_of_the_steps_before(crop):
    """An image has the bits that torchvision's own chain of transforms gives it."""
    images = pictures(3, 32)
    augment = Augmentation(crop=crop, flip=False, rotation=15, jitter=0.4, randaugment=2)
    first = [v2.RandomResizedCrop(32, antialias=True)] if crop else []
    chain = v2.Compose(
        [*first, v2.RandomRotation([-15, 15]), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandAugment(2, 9)]
    )
    made = augment.random(32)(list(images), [rng(0, "augment", 0, n) for n in range(COUNT)])
    with torch.random.fork_rng(devices=[]):
        for number, image in enumerate(images):
            generator = rng(0, "augment", 0, number)
            if crop is None:  # what shifting and mirroring draw
                generator.integers(0, 1, 2)
                generator.random()
            torch.manual_seed(int(generator.integers(2**63)))
            expected = v2.functional.to_dtype(chain(image), torch.float32, scale=True)
            assert torch.equal(made[number], expected)
