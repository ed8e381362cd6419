"""CIFAR-FS: CIFAR-100's classes, split for learning from few images.

Bertinetto et al., *Meta-learning with Differentiable Closed-form Solvers*, ICLR 2019: 64 base
classes to learn from, 16 to choose settings on, 20 novel ones. The images are CIFAR-100's training
images in class folders, 500 a class.
"""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from augment.core.errors import UserError
from augment.sources import Folder

SUPERCLASSES: dict[str, tuple[str, str, str]] = {
    "aquatic_mammals": ("dolphin seal", "beaver otter", "whale"),
    "fish": ("aquarium_fish ray trout", "flatfish shark", ""),
    "flowers": ("orchid sunflower tulip", "", "poppy rose"),
    "food_containers": ("bottle bowl can cup plate", "", ""),
    "fruit_and_vegetables": ("apple mushroom orange pear", "", "sweet_pepper"),
    "household_electrical_devices": ("clock keyboard", "lamp television", "telephone"),
    "household_furniture": ("chair couch", "", "bed table wardrobe"),
    "insects": ("bee caterpillar cockroach", "beetle butterfly", ""),
    "large_carnivores": ("bear lion tiger wolf", "", "leopard"),
    "large_man-made_outdoor_things": ("bridge castle house road skyscraper", "", ""),
    "large_natural_outdoor_scenes": ("cloud forest mountain", "sea", "plain"),
    "large_omnivores_and_herbivores": ("elephant kangaroo", "camel cattle", "chimpanzee"),
    "medium_mammals": ("porcupine possum raccoon skunk", "", "fox"),
    "non-insect_invertebrates": ("lobster spider", "crab", "snail worm"),
    "people": ("boy girl", "", "baby man woman"),
    "reptiles": ("dinosaur lizard snake turtle", "crocodile", ""),
    "small_mammals": ("hamster mouse rabbit shrew squirrel", "", ""),
    "trees": ("oak_tree palm_tree pine_tree willow_tree", "maple_tree", ""),
    "vehicles_1": ("bus train", "motorcycle", "bicycle pickup_truck"),
    "vehicles_2": ("lawn_mower streetcar tank", "tractor", "rocket"),
}
"""The base, validation and novel classes of each of CIFAR-100's 20 superclasses."""

PARTS = ("base", "validation", "novel")


def classes_of(part: str) -> dict[str, str]:
    """Map each class of a part, in alphabetical order, to its superclass."""
    column = PARTS.index(part)
    pairs = {c: name for name, row in SUPERCLASSES.items() for c in row[column].split()}
    return dict(sorted(pairs.items()))


def load_part(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Load a part's images (n, 3, 32, 32) in [0, 1], and their labels.

    Args:
        root: CIFAR-100's training images in class folders.
        part: one of `PARTS`; its labels follow `classes_of`.

    Raises:
        UserError: a class has no folder.
    """
    folder = Folder(root)
    missing = [name for name in classes_of(part) if name not in folder.ids]
    if missing:
        raise UserError(
            f"expected CIFAR-100 in class folders in {root}, got no {missing[0]!r}; unpack it there"
        )
    pairs = [(i, k) for k, name in enumerate(classes_of(part)) for i in folder.ids[name]]
    images = torch.stack([folder.load(i, 3, 32) for i, _ in tqdm(pairs, part, unit="image")])
    return images, torch.tensor([k for _, k in pairs])
