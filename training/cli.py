"""``latent-augment train …``: Lightning's own command line over our classifier and data."""

import shlex
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from augment.core.errors import UserError
from augment.core.files import JsonObject, locked, remember, write_json, write_table
from augment.core.registry import Dashed
from augment.networks.timm import check_names, read_weights
from augment.training import lightning
from augment.training.data.identity import IMAGES
from augment.training.data.module import ImageData, ReuseLogger
from augment.training.models.classifier import Classifier, agreed

_MAY_CHANGE = (
    *("accelerator", "logger", "log_every_n_steps", "default_root_dir", "profiler", "barebones"),
    *("enable_progress_bar", "enable_model_summary", "detect_anomaly", "num_sanity_val_steps"),
    *("limit_val_batches", "limit_test_batches", "val_check_interval", "check_val_every_n_epoch"),
)
"""Settings of the trainer that may differ when a training is resumed."""

_FORM = ("channels", "resolution")
"""Settings of the images that belong to the weights."""


def _missing_package(error: BaseException | None) -> str:
    """Return what an error, or one that caused it, says of a missing package; or nothing."""
    while error and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return " ".join(str(error or "").split())


class _Parser(Dashed, LightningArgumentParser): ...


def _rank(title: str) -> int:
    """Return the place of a group of options in the help: general ones, the data, … the trainer."""
    places = {"positional": 0, "options": 0, "Real": 1, "Customize": 3}  # by the first word
    return next((places[word] for word in title.split()[:1] if word in places), 2)


class TrainCLI(LightningCLI):
    """`fit`, which resumes where it was interrupted and ends with a test; and what uses weights.

    ``last.ckpt`` is where a training resumes, ``best.ckpt`` what ``--checkpoint.monitor`` says; the
    test of `fit`, `validate`, `test` and `predict` take the best one if there is one.

    Attributes:
        stored: settings of the checkpoint to resume, to test or to predict by; empty if none.
        measured: the figures of the test.
    """

    subcommand: str
    stored: JsonObject
    measured: dict[str, float] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stored = {}
        with ExitStack() as self.held:
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose faults `augment.cli.main` puts in one sentence."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the model to the data, and all random generators to one seed."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.usage = "latent-augment train COMMAND [OPTIONS]"  # all names fill two screens
        groups = cast(list[Any], parser._action_groups)  # argparse's own, sorted in place
        groups.sort(key=lambda group: _rank(group.title or ""))
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/train",
                "trainer.use_distributed_sampler": False,  # our draws know their rank
                "checkpoint.filename": "last",
                "checkpoint.mode": None,
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )
        for source, target in (("counts", "counts"), ("classes", "class_names")):
            parser.link_arguments(
                f"data.{source}", f"model.{target}", apply_on="instantiate",
                compute_fn=lambda given, key=target: self._classes_of(key, given),
            )  # fmt: skip
        for name in _FORM:
            parser.link_arguments(f"data.{name}", f"model.{name}")
        for part in ("data", "model"):
            parser.link_arguments("seed_everything", f"{part}.seed")

    def _parse_ckpt_path(self) -> None:
        """Leave it to `instantiate_classes`, which refuses what contradicts a checkpoint."""

    @property
    def root(self) -> Path:
        """The folder of the run."""
        return Path(self.config[self.subcommand]["trainer"]["default_root_dir"])

    def before_instantiate_classes(self) -> None:
        """Keep checkpoints in the folder of the run."""
        checkpoint = self.config[self.subcommand]["checkpoint"]
        if checkpoint["dirpath"] is None:
            checkpoint["dirpath"] = str(self.root / "checkpoints")

    def instantiate_classes(self) -> None:
        """Build all as the command says, and what belongs to weights as their checkpoint says."""
        config = self.config[self.subcommand]
        fit, path = self.subcommand == "fit", self._checkpoint()
        if fit and config["data"]["train"] is None:
            raise UserError("expected images to train on, got none; give --data.train")
        kept = config["checkpoint"]
        parts = [vars(part) for part in (config["data"], config["model"], kept)]
        asked = [part.copy() for part in parts]
        if path:
            self.stored = read_weights(path).settings
            self._follow(path)
        if not fit:
            config["ckpt_path"] = path
        self.monitor, self.checkpoints = (kept["monitor"], kept["mode"]), Path(kept["dirpath"])
        if kept["save_top_k"] not in (-1, 0, 1):
            raise UserError(
                f"expected checkpoint.save_top_k 1, for best.ckpt, got {kept['save_top_k']}; to "
                "keep more, add a ModelCheckpoint to trainer.callbacks"
            )
        kept["monitor"], kept["mode"] = None, "min"  # for what keeps the last
        kept["save_last"] = kept["filename"] != "last"
        try:
            super().instantiate_classes()
        except (ModuleNotFoundError, ValueError) as error:
            missing = _missing_package(error)
            if not missing:
                raise
            raise UserError(
                "expected the packages of all settings, such as --trainer.logger, got one that is "
                f"not installed: {missing}"
            ) from None
        for part, settings in zip(parts, asked, strict=True):  # config.yaml says what was asked for
            part.update(settings)

    def _checkpoint(self) -> str | None:
        """Return the checkpoint to begin with: for a training the last one, else the best."""
        config, fit = self.config[self.subcommand], self.subcommand == "fit"
        given, folder = config["ckpt_path"], Path(config["checkpoint"]["dirpath"])
        if given in (None, "best", "last"):
            names = [given] if given else ["last"] if fit else ["best", "last"]
            path = next((p for p in (folder / f"{n}.ckpt" for n in names) if p.exists()), None)
            if path is None and fit and not given:
                return None
        else:
            path = Path(given)
        if path is None or not path.is_file():
            raise UserError(
                f"expected a checkpoint to {self.subcommand}, got none at {path or folder}; give "
                "--ckpt-path, or the run's --trainer.default-root-dir"
            )
        return str(path)

    def _follow(self, path: str) -> None:
        """Take from a checkpoint what belongs to its weights, so that no hub has to be asked.

        A test takes all that the classifier was made with from it, but for ``tau`` and the seed.
        """
        config, stored, fit = self.config[self.subcommand], self.stored, self.subcommand == "fit"
        data, model = config["data"], config["model"]
        if "counts" not in stored:
            raise UserError(
                f"expected a checkpoint that latent-augment train wrote, got {path}; take weights "
                "of others with --model.start"
            )
        for name in _FORM:
            data[name] = model[name] = agreed(name, data[name], stored.get(name), None, path)
        data["crop"] = data["crop"] or stored.get("crop")
        if data["resolution"] is None:
            raise UserError(
                f"expected a checkpoint with its resolution, got {path} of an older version; "
                "give --data.resolution, which was 32 by default"
            )
        defaults = vars(self._parser(self.subcommand).get_defaults()["model"])
        free = {"network", *_FORM, "counts", "class_names", "seed", "tau"}
        for name in [] if fit else sorted({*vars(model)} & {*stored} - free):
            if model[name] not in (defaults[name], stored[name]):
                raise UserError(
                    f"expected {name} {stored[name]}, which {path} was trained with, got "
                    f"{model[name]}; leave --model.{name} out"
                )
            model[name] = stored[name]
        asked = None if model["network"] == stored.get("source") else model["network"]
        model["network"] = agreed("network", asked, stored["network"], None, path)
        model["network_options"] = stored.get("network_options")
        model["pretrained"], model["start"] = False, None
        if model["tau"] is None and not fit:
            model["tau"] = stored.get("tau")

    def _classes_of(self, key: str, given: list[Any]) -> list[Any]:
        """Return counts or names of the classes: of a checkpoint to test, or of the images."""
        return given if self.subcommand == "fit" or not self.stored else self.stored[key]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, which by default logs to ``metrics.csv``."""
        config, fit = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        self.datamodule.keep_out(self.root)
        if fit and lightning.is_first_rank():
            lock = self.held.enter_context(locked(self.root))
            folder = self.config[self.subcommand]["checkpoint"]["dirpath"]
            lightning.remove_partial(lock, self.root, Path(folder))
        if config["logger"] is None:
            kwargs["logger"] = lightning.csv_log(self.root, self.subcommand)
        if fit:
            steps = len(self.datamodule.draws)
            kwargs["log_every_n_steps"] = min(config["log_every_n_steps"] or 50, steps)
            limit, each = config["max_steps"], self.datamodule.draws.asked
            if config["max_epochs"] is None and limit > 0 and each:  # for the progress bar
                steps = -(-each // config["accumulate_grad_batches"])
                kwargs["max_epochs"] = -(-limit // steps)
            kwargs["callbacks"] = [*_listed(config["callbacks"]), *self._best()]
        plugins = [*_listed(config["plugins"]), lightning.SafeCheckpoints()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def _best(self) -> list[ModelCheckpoint]:
        """Return what keeps ``best.ckpt`` by ``--checkpoint.monitor``, beside ``last.ckpt``."""
        monitor, mode = self.monitor
        if monitor is None:
            return []
        if monitor.startswith("val/"):
            self.datamodule.all_of("val")  # which refuses none
        mode = mode or ("min" if monitor.endswith(("loss", "ece")) else "max")
        return [
            ModelCheckpoint(
                self.checkpoints, "best", monitor, mode=mode,
                save_on_train_epoch_end=True, enable_version_counter=False,
            )
        ]  # fmt: skip

    def before_fit(self) -> None:
        """Resume the last checkpoint of the same run, if there is one."""
        config, last = self.config_init["fit"], self.checkpoints / "last.ckpt"
        self.datamodule.check_trainer(self.trainer)
        if self.model.hp.tau == "val" and "test" in self.datamodule.held_out:
            self.datamodule.all_of("val")  # which refuses none, before hours of training
        begun = config["ckpt_path"] is None and last.exists()
        remember(self.root / "run.json", self._settings(), "--trainer.default-root-dir", begun)
        if begun:  # before contents are compared: a renamed class explains more
            check_names(self.stored.get("class_names"), self.datamodule.classes, str(last))
        if lightning.is_first_rank():
            self.datamodule.check_images(self.root / IMAGES, begun)
        if begun:
            config["ckpt_path"] = str(last)

    def _settings(self) -> JsonObject:
        """Return what a resumed training must have in common with the one before."""
        text = self.parser.dump(self.config, skip_link_targets=False)
        config = yaml.safe_load(text)["fit"]
        trainer = {k: v for k, v in config["trainer"].items() if k not in _MAY_CHANGE}
        same = {key: config.get(key) for key in ("model", "data", "seed_everything")}
        best = {"monitor": list(self.monitor)} if self.monitor[0] else {}
        return {**same, "trainer": trainer, **best}

    def after_fit(self) -> None:
        """Test with the best weights, or the last ones, if there are images to test on."""
        steps, done = self.model.total_steps(), self.trainer.global_step
        if done < steps and not self.trainer.should_stop:
            raise UserError(
                f"expected {steps} steps of training in {self.root}, got {done}; train in another "
                "--trainer.default-root-dir"
            )
        self._keep_last()
        if "test" in self.datamodule.held_out:
            best, last = (self.checkpoints / f"{name}.ckpt" for name in ("best", "last"))
            path = best if self.monitor[0] and best.exists() else last
            if path.exists():  # what a test measures later: averaged weights, if there are any
                self.model.load_state_dict(read_weights(str(path)).record["state_dict"])
            self.trainer.test(self.model, datamodule=self.datamodule)
            self.after_test()
        if self.trainer.is_global_zero:
            self._summarize()

    def _summarize(self) -> None:
        """Print the accuracy, where everything is, and what to do next."""
        root, tested = self.root, self.measured is not None
        said = f"trained for {self.trainer.global_step} steps, not tested"
        if self.measured:
            said = f"test accuracy {100 * self.measured['test/accuracy']:.1f} %"
        places = {
            root / "test.json": "all figures of the test",
            root / "per_class.csv": "accuracy by class",
            root / "confusion.csv": "which class was taken for which",
            root / "metrics.csv": "losses by step",
            self.checkpoints / "best.ckpt": f"the weights of the best {self.monitor[0]}",
            self.checkpoints / "last.ckpt": "the last weights",
        }
        print(f"\n{root}: {said}")
        for path, what in places.items():
            if path.exists():
                print(f"  {path}: {what}")
        data = "predict --data.predict NEW_IMAGES" if tested else "test --data.test TEST_IMAGES"
        place = shlex.quote(str(root))
        print(f"next: latent-augment train {data} --trainer.default-root-dir {place}")

    def _keep_last(self) -> None:
        """Write ``last.ckpt`` again if steps were taken since, as where checkpoints are rare."""
        last, trainer = self.checkpoints / "last.ckpt", self.trainer
        stale = last.exists() and (
            read_weights(str(last)).record["global_step"] != trainer.global_step
        )
        if trainer.strategy.broadcast(stale):
            trainer.save_checkpoint(last)

    def before_validate(self) -> None:
        """Refuse to validate without images."""
        self.datamodule.all_of("val")

    def before_test(self) -> None:
        """Refuse to test without images."""
        self.datamodule.all_of("test")

    def after_predict(self) -> None:
        """Write a row an image: its file, its label, and the probability of each class."""
        if not self.trainer.is_global_zero:
            return
        batches = cast("list[torch.Tensor]", self.trainer.predict_loop.predictions)
        rows = torch.cat(batches).double()
        names = self.model.hparams.class_names or [str(label) for label in range(rows.shape[1])]
        images = self.datamodule.to_label
        table = [["file", "label", *names]]
        for (file, _), row in zip(images.samples, rows, strict=True):
            table.append([file, names[int(row.argmax())], *(f"{p:.6g}" for p in row.tolist())])
        path = self.root / "predict" / "predictions.csv"
        write_table(path, table)
        print(f"{path}: {len(rows)} images of {images.root} labelled")

    def after_test(self) -> None:
        """Keep what was measured beside the log."""
        if self.trainer.is_global_zero:
            logged = self.trainer.logged_metrics.items()
            self.measured = {k: float(v) for k, v in logged if k.startswith("test/")}
            folder = self.root if self.subcommand == "fit" else self.root / self.subcommand
            write_json(folder / "test.json", self.measured)


def _listed(value: object) -> list[Any]:
    """Return a setting that may be None, one or several as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def main(args: list[str]) -> TrainCLI:
    """Run ``latent-augment train ARGS``."""
    lightning.silence_lightning()
    # the arguments stay where they are too, for ranks are started with them
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    with lightning.interruptible():
        return TrainCLI(
            Classifier,
            ImageData,
            args=args,
            parser_kwargs={"prog": "latent-augment train"},
            save_config_kwargs={"overwrite": True},  # of the config beside the run's own logs
            trainer_defaults={
                "callbacks": [ReuseLogger(), lightning.PlainSignals(), lightning.Lines()],
                "enable_progress_bar": sys.stderr.isatty(),  # elsewhere Lines
            },
            seed_everything_default=0,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
        )
