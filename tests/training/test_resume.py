"""A training that stops anywhere goes on with the batches and weights it would have had."""

import contextlib
import resource
import sys

import pytest
import torch
from conftest import call, dataset_with, paint
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

from augment import ReplayPool, Sampling, SyntheticDataset, UserError, cli
from augment.bank.fill import fill_bank
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.training import lightning
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.models.classifier import Classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]
STEPS, LENGTH = 4, 11  # an epoch, all of it: not a whole number of epochs


class Watched(Callback):
    """Remembers every batch, and may stop after one."""

    def __init__(self, seen: list, stop: int | None) -> None:
        self.seen, self.stop = seen, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as the log has it
        self.seen.append((trainer.current_epoch, step, batch[0].sum().item(), batch[1].tolist()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.stop is not None and trainer.global_step == self.stop:
            raise InterruptedError


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("resume")
    paint(root / "real", {"Bag": 5, "Coat": 3}, size=28)
    paint(root / "val", {"Bag": 2, "Coat": 2}, size=28, seed=1)
    bank = fill_bank(root / "bank", tiny, Folder(root / "real"), steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class=6)
    write_shards(fly.synthesizer, fly.planner, 6, root / "shards", extension="png")
    return root


def synthetic(root, tiny, how):
    if how in ("fly", "kept"):
        options = {"per_class": 6, "steps": 1, "keep": how == "kept", "batch_size": 4}
        return dataset_with(root / "bank", tiny, **options)
    return {"real": None, "shards": str(root / "shards"), "folder": str(root / "val")}[how]


def train(
    root,
    out,
    fakes,
    stop=None,
    start=None,
    mix=None,
    every=1,
    workers=0,
    val=True,
    keep=None,
    **more,
):
    """The batches that were seen, and the weights; checkpoints every so many steps."""
    seen: list = []
    torch.manual_seed(0)
    data = ImageData(
        str(root / "real"), val=str(root / "val") if val else None, synthetic=fakes,
        mix=mix or SyntheticMix(0.5), channels=1, batch_size=4, steps_per_epoch=STEPS,
        workers=workers,
    )  # fmt: skip
    model = Classifier(data.counts, channels=1, mixup=0.5, optimizer="sgd", lr=0.05)
    keep = ModelCheckpoint(
        out, "last", **(keep or {"every_n_train_steps": every}), enable_version_counter=False
    )
    more = {"max_steps": LENGTH} | more
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[Watched(seen, stop), EMAWeightAveraging(decay=0.9), keep],
        plugins=[lightning.SafeCheckpoints()], **more,
    )  # fmt: skip
    with contextlib.suppress(InterruptedError):
        trainer.fit(model, data, ckpt_path=start)
    return seen, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module", params=["real", "fly", "kept", "shards"])
def whole(request, root, tiny):
    """How images are made, and the batches and weights of a training that nobody stopped."""
    made = train(root, root / f"whole-{request.param}", synthetic(root, tiny, request.param))
    return request.param, *made


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 10])
def test_it_goes_on_with_the_same_batches_to_the_same_weights(root, tiny, tmp_path, whole, stop):
    how, batches, weights = whole
    assert [epoch for epoch, *_ in batches] == [step // STEPS for step in range(LENGTH)]
    before, _ = train(root, tmp_path, synthetic(root, tiny, how), stop=stop)
    after, end = train(root, tmp_path, synthetic(root, tiny, how), start=tmp_path / "last.ckpt")
    assert before == batches[:stop]
    assert after == batches[stop:]
    assert all(torch.equal(weights[name], end[name]) for name in weights)


@pytest.mark.parametrize(
    "more", [{"accumulate_grad_batches": 2}, {"val_check_interval": 2}], ids=str
)
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_it_goes_on_between_validations_and_with_gathered_gradients(root, tmp_path, more, stop):
    fakes = str(root / "shards")
    batches, weights = train(root, tmp_path / "whole", fakes, **more)
    train(root, tmp_path / "cut", fakes, stop=stop, **more)
    after, end = train(root, tmp_path / "cut", fakes, start=tmp_path / "cut/last.ckpt", **more)
    assert after == batches[len(batches) - len(after) :]
    assert len(after) == (LENGTH - stop) * more.get("accumulate_grad_batches", 1)
    assert all(torch.equal(weights[name], end[name]) for name in weights)


KEPT = {
    "a batch's end": {"every_n_train_steps": 1},
    "an epoch's end": {"save_on_train_epoch_end": True},
    "an epoch's end, after a validation": {"monitor": "val/accuracy", "mode": "max"},
    "a validation's end": {"save_on_train_epoch_end": False},
    "an error": {"save_on_exception": True},
}
LIMITS = {
    "max_steps": {"max_steps": LENGTH, "max_epochs": None},
    "max_steps first": {"max_steps": LENGTH, "max_epochs": 1000},
    "max_epochs": {"max_steps": -1, "max_epochs": 3},
    "max_epochs first": {"max_steps": 1000, "max_epochs": 3},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("kept", KEPT)
def test_it_goes_on_from_every_kind_of_checkpoint_with_every_limit(root, tmp_path, kept, limits):
    fakes, last = str(root / "shards"), tmp_path / "cut" / "last.ckpt"
    options = {"keep": KEPT[kept], **LIMITS[limits]}
    batches, weights = train(root, tmp_path / "whole", fakes, **options)
    assert len(batches) == (12 if limits.startswith("max_epochs") else LENGTH)
    for stop in (5, 6, 7, 9, None):
        start = last if last.exists() else None
        done = torch.load(last, weights_only=True)["global_step"] if start else 0
        new, end = train(root, tmp_path / "cut", fakes, stop, start, **options)
        assert new == batches[done:stop]
    assert all(torch.equal(weights[name], end[name]) for name in weights)


def test_a_training_that_ended_within_an_epoch_may_be_made_longer(root, tmp_path):
    """The epoch that max_steps cut short is not counted as one that is over."""
    limits = {"keep": {"save_on_train_epoch_end": True}, "max_epochs": 5}
    batches, _ = train(root, tmp_path / "whole", None, **limits, max_steps=20)
    train(root, tmp_path / "cut", None, **limits, max_steps=LENGTH)
    last = tmp_path / "cut" / "last.ckpt"
    after, _ = train(root, tmp_path / "cut", None, start=last, **limits, max_steps=20)
    assert after == batches[LENGTH:]


def test_a_training_that_ends_early_is_an_error(root, tmp_path, monkeypatch, capsys):
    """Whatever makes Lightning stop before the last step, the result is not taken for whole."""
    monkeypatch.setattr(
        "augment.training.models.classifier.prepare_resume", lambda checkpoint: None
    )
    step = Classifier.training_step

    def stopping(self, batch, batch_idx):
        if self.global_step == 5 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", stopping)
    line = (
        f"train fit --data.train {root}/real --data.test {root}/val --data.channels 1 "
        f"--data.batch_size 4 --data.steps_per_epoch 4 --trainer.max_steps 8 "
        f"--trainer.default_root_dir {tmp_path}/run --trainer.accelerator cpu"
    )
    assert call(monkeypatch, capsys, *line.split())[0] == 130
    code, _, err = call(monkeypatch, capsys, *line.split())
    assert code == 2 and "expected 8 steps" in err and "got 5" in err
    assert not (tmp_path / "run" / "test.json").exists()


def test_it_goes_on_twice_from_checkpoints_that_are_rare(root, tiny, tmp_path):
    """Steps since the last checkpoint are done again; images come from worker processes."""
    fakes = str(root / "shards")
    options = {"workers": 1, "mix": SyntheticMix(fill_to=8, warm_up=1, real_only=1), "val": False}
    batches, weights = train(root, tmp_path / "whole", fakes, **options)
    last, seen = tmp_path / "cut" / "last.ckpt", []
    for stop in (5, 9, None):
        start = last if last.exists() else None
        new, end = train(root, tmp_path / "cut", fakes, stop, start, every=3, **options)
        seen.append(new)
    assert [len(part) for part in seen] == [5, 6, 2]
    assert seen[0] == batches[:5] and seen[1] == batches[3:9] and seen[2] == batches[9:]
    assert all(torch.equal(weights[name], end[name]) for name in weights)


def test_draws_from_a_pool_go_on_though_its_images_change(root, tiny, tmp_path):
    """Which draws are synthetic, and all real images, are as they would have been."""
    fly = SyntheticDataset(root / "bank", tiny, sampling=Sampling(steps=1), per_class=6)

    def real(batches):
        return [batch for _, batch in batches]

    def run(out, **options):
        seen = []

        class Real(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                images, labels, fake = batch
                seen.append((fake.tolist(), images[~fake].sum().item(), labels[~fake].tolist()))

        with ReplayPool(fly, 4, warm_up=4) as pool:
            original = ModelCheckpoint.on_train_batch_end
            watched = Real()

            def both(self, *args, **kwargs):
                watched.on_train_batch_end(*args, **kwargs)
                return original(self, *args, **kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ModelCheckpoint, "on_train_batch_end", both)
                train(root, tmp_path / out, pool, **options)
        return seen

    whole = run("whole")
    cut = run("cut", stop=6) + run("cut", start=tmp_path / "cut" / "last.ckpt")
    assert any(True in fakes for fakes, *_ in whole)
    assert cut == whole


def test_the_same_command_goes_on_and_another_is_refused(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def run(*more: str) -> None:
        line = (
            f"train fit --data.train {root}/real --data.test {root}/val --data.channels 1 "
            f"--data.batch_size 4 --data.steps_per_epoch 4 --trainer.max_steps 8 "
            f"--trainer.default_root_dir {out} --trainer.accelerator cpu "
            "--trainer.enable_progress_bar false --checkpoint.every_n_train_steps 2"
        )
        monkeypatch.setattr(sys, "argv", ["latent-augment", *line.split(), *more])
        cli.main()

    step = LightningModule.on_train_batch_start

    def stopping(self, batch, batch_idx):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", stopping)
        with pytest.raises(SystemExit) as stop:
            run()
    assert stop.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    with pytest.raises(SystemExit) as stop:
        run("--model.lr", "0.1")
    assert stop.value.code == 2
    assert "model.lr 0.1, got 0.002" in capsys.readouterr().err
    run()
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    assert (out / "test.json").exists()


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.ckpt"
    safe = lightning.SafeCheckpoints()
    safe.save_checkpoint({"step": torch.tensor(1)}, path)

    class Broken:
        def __reduce__(self):
            raise OSError("no space")

    with pytest.raises((UserError, OSError)):
        safe.save_checkpoint({"step": torch.tensor(2), "more": Broken()}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("where", ["checkpoint", "log"])
def test_a_training_on_a_full_disk_is_one_sentence_and_goes_on(
    where, root, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    line = (
        f"train fit --data.train {root}/real --data.channels 1 --data.batch_size 4 "
        f"--data.steps_per_epoch 4 --trainer.max_steps 4 --trainer.default_root_dir {out} "
        "--trainer.accelerator cpu"
    )
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if where == "log":
        out.mkdir()
        (out / "hparams.yaml").symlink_to("/dev/full")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        code, _, err = call(monkeypatch, capsys, *line.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2 and "run the same command again" in err and "Traceback" not in err
    assert ("No space left" if where == "log" else "last.ckpt, got File too large") in err
    assert not list(out.rglob("*.tmp"))
    (out / "hparams.yaml").unlink(missing_ok=True)
    assert call(monkeypatch, capsys, *line.split())[0] == 0
