"""Cut the embedded slice out of Fashion-MNIST's test split: 32 + 200 images a class.

    python scripts/embed_fashion_mnist.py

The backbone and the feature network are trained on the training split alone, so nothing in the
package has seen these images.
"""

from pathlib import Path

import numpy as np
from fashion_mnist import load_split

from augment.sources.fashion import DATA, SHOTS, TESTS


def main() -> None:
    """Write the archive."""
    images, labels = load_split("test")
    rng = np.random.default_rng(0)
    rows = np.stack(
        [rng.permutation(np.flatnonzero(labels.numpy() == c))[: SHOTS + TESTS] for c in range(10)]
    )
    pixels = (images[:, 0] * 255).round().byte().numpy()[rows]
    np.savez_compressed(DATA, pixels=pixels, rows=rows.astype(np.int16))
    print(f"{DATA}: {pixels.shape}, {Path(DATA).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
