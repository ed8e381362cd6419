"""Every option that a command ever had is still there: scripts and configurations name them."""

import re

import pytest
from conftest import call

from augment.commands import COMMANDS

OPTIONS = {
    "invert": """
        images.help images bank backbone prompt prompts inversion steps guidance batch_size device
        dtype inversion_options backbone_options errors clean max_rejects links nested background
        executor dry_run
    """,
    "synthesize": """
        bank out per_class fill_to tail_only rule alpha seed members noise solver steps guidance
        interval prompt batch_size backbone device dtype backbone_options nearest refine.help
        refine filters candidates images.help images extension quality pixels shard_size executor
        dry_run
    """,
    "train fit": """
        model.network model.network_options model.pretrained model.start model.tune model.rank
        model.targets model.loss model.loss_options model.smoothing model.reweight_from
        model.real_weight model.auxiliary_norms model.mixup model.cutmix model.optimizer model.lr
        model.weight_decay model.momentum model.reference_batch model.warm_up model.tau
        data.train.help data.train data.val.help data.val data.test.help data.test
        data.predict.help data.predict data.synthetic.help data.synthetic data.sampler data.crop
        data.channels data.resolution data.batch_size data.steps_per_epoch data.workers
        data.max_rejects data.background data.mix data.mix.share data.mix.fill_to
        data.mix.per_real data.mix.tail_only data.mix.warm_up data.mix.real_only data.augment
        data.augment.crop data.augment.flip data.augment.rotation data.augment.jitter
        data.augment.randaugment data.augment.magnitude
    """,
    "sweep": "recipe out seeds vary given",
    "episodes": """
        images.help images network out weights episodes n_way n_shot n_query n_tasks seed bank
        rule alpha members noise per_class synthetic_weight solver steps guidance head
        head_options channels resolution device
    """,
    "adapt": """
        images.help images out backbone preset prompt prompts captions words rank image_heads
        text_rank tokens targets steps per batch_size accumulate lr head_lr token_lr drop flip
        checkpointing sheets seed device devices precision workers backbone_options
    """,
    "smooth": """
        images.help images out backbone prompt prompts captions weight rank targets steps
        batch_size accumulate lr drop seed device devices precision workers backbone_options
    """,
    "demo": "out full seeds",
    "evaluate": """
        path real.help real network weights channels resolution bootstrap backbone out device
    """,
    "report": "bank shards out rules classes images.help images pool backbone device",
    "check": "backbone images.help images steps batch_size out device dtype backbone_options",
    "inspect": "path",
    "verify": "path images.help images discard repair",
    "merge": "banks out",
    "split": "bank classes out",
    "export": "shards out parquet model_licence images_licence push",
    "walk": """
        image to out prompt to_prompt path between inversion steps level guidance backbone
        backbone_options device
    """,
    "explore": "bank out images.help images host port backbone device",
}
"""Options by command; those of train are the data's and the model's, the rest are Lightning's."""


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_still_there(command, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, *command.split(), "--help")
    shown = set(re.findall(r"^  (?:-\w[ A-Z]*, )?--([\w.-]+)", out, re.MULTILINE))
    shown = {option.replace("-", "_") for option in shown}
    assert code == 0 and {"help", "config", *OPTIONS[command].split()} - shown == set()


def test_every_option_of_ours_has_a_line_of_help(monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "train", "fit", "--help")
    entries = re.findall(r"^  --((?:data|model)[\w.-]*)(.*(?:\n {8,}.*)*)", out, re.MULTILINE)
    assert len(entries) > 50
    bare = [name for name, text in entries if re.match(r"\S*(, --\S+)?( \S+){0,3}\s*\(type", text)]
    assert bare == []
    order = [out.index(f"  --{name} ") for name in ("print-config", "data", "model", "trainer")]
    assert order == sorted(order) and len(out.split("Runs the")[0]) < 200


def test_the_list_has_every_command():
    assert {command.split()[0] for command in OPTIONS} == set(COMMANDS)
