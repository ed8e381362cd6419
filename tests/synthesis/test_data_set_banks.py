"""Banks of data sets, whose images are no files: filters, refinement and reports see them."""

import pytest
import torch
import yaml
from conftest import call
from torch.utils.data import TensorDataset

from augment import LatentBank, Planner, Synthesizer, UserError, fill_bank, open_shards
from augment.explore.session import Explorer
from augment.report import write_report
from augment.shards.verify import verify
from augment.shards.write import write_shards
from augment.sources import Items
from augment.synthesis.filters import make_filter
from augment.synthesis.refine import SeedSelect


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(6, 1, 32, 32, generator=generator), torch.arange(6) % 2)


def hugging_face(seed=0):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = [Image.fromarray((x[0] * 255).byte().numpy()) for x, _ in tensors(seed)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["disc", "bar"])}
    rows = {"image": images, "label": [0, 1] * 3}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.mark.parametrize("make", [tensors, hugging_face])
def test_what_compares_with_real_images_takes_a_data_set(make, tiny, tmp_path):
    data = make()
    fill_bank(tmp_path / "bank", tiny, Items(data), steps=3)
    bank = LatentBank.open(tmp_path / "bank")
    judges = {"duplicate": make_filter("duplicate", minimum=None)}
    planner = Planner(bank.members)

    def synthesize(name, **given):
        made = Synthesizer(tiny, bank, **given)
        write_shards(made, planner, 1, tmp_path / name, filters=judges, extension="png")
        return open_shards(tmp_path / name)

    shards = synthesize("refined", source=data, refine=SeedSelect(1))
    assert len(shards) == 2 and all("duplicate" in shards.about(k)["scores"] for k in range(2))
    real = Synthesizer(tiny, bank, source=data).real(bank.classes[1])
    expected = [Items(data).load(i, 1, 32) for i in bank.members[bank.classes[1]]]
    torch.testing.assert_close(real, torch.stack(expected))
    with pytest.raises(UserError, match=r"Dataset, .* no such file .*--images, a folder or"):
        synthesize("nowhere")
    with pytest.raises(UserError, match="another image"):
        synthesize("others", source=make(1))
    assert verify(tmp_path / "bank", data) == []
    assert len(verify(tmp_path / "bank", make(1))) == 6
    page = write_report(bank, tmp_path / "report.html", images=data).read_text()
    assert "real images are not in" not in page
    explorer = Explorer(bank, tiny, bank.recipe, source=Items(data))
    assert explorer._real(bank.classes[0], bank.members[bank.classes[0]][0]) is not None


def test_a_command_takes_the_data_set_that_was_inverted(tmp_path, monkeypatch, capsys):
    data = {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 6}}
    data["init_args"] |= {"image_size": [1, 32, 32], "num_classes": 2}
    source = {"images": {"class_path": "Items", "init_args": {"dataset": data}}}
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(source))
    config = ("--config", tmp_path / "images.yaml")
    given = ("--bank", tmp_path / "bank", "--steps", 2, "--device", "cpu")
    assert call(monkeypatch, capsys, "invert", *config, *given)[0] == 0
    given = ("--bank", tmp_path / "bank", "--out", tmp_path / "shards", "--per-class", 1)
    command = ("synthesize", *given, "--filters", "{duplicate: {minimum: null}}", "--device", "cpu")
    code, _, message = call(monkeypatch, capsys, *command)
    assert code == 2 and "say where they are with --images" in message
    assert call(monkeypatch, capsys, *command, *config)[0] == 0
    assert call(monkeypatch, capsys, "verify", "--path", tmp_path / "bank", *config)[0] == 0
