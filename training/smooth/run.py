"""A run of Smooth Diffusion: `augment.training.adapt.run`, with the regulariser."""

from pathlib import Path

from safetensors.torch import save

from augment.core.files import check_folder, write_bytes
from augment.diffusion import Backbone
from augment.diffusion.checkpoints.lora import LORA
from augment.sources.prompts import prompts_of
from augment.training.adapt.module import PROJECTIONS
from augment.training.adapt.run import digest_of, fit
from augment.training.smooth.regulariser import SmoothDiffusion
from augment.training.smooth.settings import SmoothSettings


def smooth_backbone(settings: SmoothSettings, backbone: Backbone | None = None) -> Path:
    """Train a backbone to be smooth, in place, or resume the run.

    Args:
        settings: of the run.
        backbone: the model, in float32; by default that of the settings is loaded.

    Returns:
        The LoRA, or the place of the whole backbone, which `load_backbone` takes.

    Raises:
        UserError: a wrong backbone, target or prompt; other settings than the run in ``out`` has.
    """
    s, out = settings, Path(settings.out)
    check_folder(out)
    s.source.keep_out(out)
    given = s.check_classes(s.prompts, "prompts")
    texts = s.texts(prompts_of(s.source.classes, s.prompt, given))
    backbone = backbone or s.load()
    targets = [*(s.targets or PROJECTIONS)]
    module = SmoothDiffusion(backbone, s.weight, s.rank, targets, s.lr, seed=s.seed, total=s.steps)
    record = {
        "backbone": backbone.fingerprint,
        "data": {"images": len(texts), "prompts": digest_of(texts), "drop": s.drop},
        **{"weight": s.weight, "rank": s.rank, "targets": targets, "lr": s.lr, "seed": s.seed},
        **{"precision": s.precision, "steps": s.steps, "batch_size": s.batch_size},
        **{"accumulate": s.accumulate, "devices": s.devices},
    }

    def write(_: set[str]) -> Path:
        if not s.rank:
            return module.backbone.save(out)
        write_bytes(out / LORA, save(module.adapters(), module.metadata()))
        return out / LORA

    return fit(module, s, s.recipe, texts, record, write)
