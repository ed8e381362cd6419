"""``latent-augment train …``: Lightning's own command line over our classifier and data."""

import logging
import sys
import warnings
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from training.classifier import Classifier
from training.data import FewShotData


class TrainCLI(LightningCLI):
    """`fit`, `validate` and `test` with the number of classes taken from the data."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose faults `augment.cli.main` puts in one sentence."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the model to the data."""
        parser.set_defaults({"trainer.default_root_dir": "runs/train"})
        for name in ("num_classes", "channels"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")


def main(args: list[str]) -> None:
    """Run ``latent-augment train ARGS``."""
    # without TensorBoard Lightning logs to CSV, which is what we want, and warns
    warnings.filterwarnings("ignore", ".*tensorboardX.*")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # "Seed set to 0"
    sys.argv = ["latent-augment train", *args]  # where Lightning wants them
    overwrite = {"overwrite": True}  # of the config beside the run's own logs
    TrainCLI(Classifier, FewShotData, save_config_kwargs=overwrite, seed_everything_default=0)
