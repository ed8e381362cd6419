"""Random generators, one for each purpose of each sample.

Every random number of this package comes from ``rng(seed, purpose, *counters)``: NumPy's Philox, a
counter-based generator, keyed through SeedSequence by the run's seed and the sample's coordinates.
So a sample has the same draws in any batch, order, worker or rank. They are made on the CPU
whatever the device, for the same reason.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PURPOSES = {
    **{"plan": 0, "noise": 1, "mix": 2, "order": 3, "forward": 4},
    **{"episode": 5, "augment": 6, "step": 7, "level": 8, "context": 9, "prior": 10},
    **{"heads": 11},
}
"""The independent streams of one sample."""


def rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the generator of one purpose of one sample.

    Args:
        seed: of the run, a non-negative integer.
        purpose: a key of `PURPOSES`.
        counters: non-negative integers, such as (epoch, index).

    >>> a, b = (rng(0, "plan", 1, 2).random(8).tolist() for _ in range(2))
    >>> a == b
    True
    """
    sequence = np.random.SeedSequence([seed, PURPOSES[purpose], *counters])
    return np.random.Generator(np.random.Philox(sequence))


def normal(generator: np.random.Generator, *shape: int) -> Float[Tensor, "..."]:
    """Draw standard normal noise in float32."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
