"""The models that `benchmarks.backbones` times: configurations of the public ones, and small ones.

Weights are random, so that nothing is downloaded. Text encoders are small, of the right width; they
are off the hot path, because ours keeps their output and the pipeline asks once a batch.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from augment.diffusion.checkpoints.hub import quiet

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import checkpoints

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds: str) -> dict[str, tuple[str, ...]]:
    """Return a UNet's block types from those of its way down."""
    down, up = (tuple(kind.format(way) for kind in kinds) for way in ("Down", "Up"))
    return {"down_block_types": down, "up_block_types": up[::-1]}


SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    **blocks(CROSS, CROSS, CROSS, PLAIN),
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    **blocks(PLAIN, CROSS, CROSS),
}
SD35: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "scaling_factor": 0.13025, "force_upcast": True}
VAE_3 = {**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_3 |= {"use_quant_conv": False, "use_post_quant_conv": False}
SMALL_VAE = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "norm_num_groups": 8}
VP = {**checkpoints.SCHEDULE, "timestep_spacing": "trailing", "steps_offset": 1}


@dataclass(frozen=True)
class Model:
    """What a benchmark builds.

    Attributes:
        kind: its pipeline, a key of `PIPELINES`.
        network, vae: their configurations.
        widths: of the text encoders.
        millions: expected parameters of the network; not checked if 0.
        resolution: pixels.
        steps: of DDIM (or Euler), which also inverts, and of DPM++.
        half: precision on a GPU.
        options: of `load_backbone`, so that the network gets the same condition as from diffusers.
    """

    kind: str
    network: dict[str, Any]
    vae: dict[str, Any]
    widths: tuple[int, ...]
    millions: float = 0.0
    resolution: int = 512
    steps: tuple[int, int] = (50, 20)
    half: str = "float16"
    options: dict[str, Any] = field(default_factory=dict)


FLOW = {"half": "bfloat16", "options": {"t5": True, "max_sequence_length": 256}}
SMALL = {"millions": 0.0, "resolution": 64, "steps": (4, 4)}
# 32 groups would leave two numbers to normalise where the UNet ends
SMALL_UNET = {"cross_attention_dim": 32, "norm_num_groups": 8}
SMALL_XL = {
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 56,
    "attention_head_dim": (2, 4, 4),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
SMALL_3 = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32 + 24,
    "dual_attention_layers": (0,),
}
SMALL_SD = SD15 | SMALL_UNET | {"block_out_channels": (32, 64, 64, 64)}
MODELS = {
    "sd15": Model("sd", SD15, VAE, (768,), 859.5),
    "sdxl": Model("sdxl", SDXL, VAE_XL, (768, 1280), 2567.5),
    "sd35-medium": Model("sd3", SD35, VAE_3, (768, 1280, 4096), 2243.2, **FLOW),
    "small": Model("sd", SMALL_SD, VAE | SMALL_VAE, (32,), **SMALL),
    "small-xl": Model("sdxl", SDXL | SMALL_XL, VAE_XL | SMALL_VAE, (32, 24), **SMALL),
    "small-3": Model("sd3", SD35 | SMALL_3, VAE_3 | SMALL_VAE, (32, 24, 64), **SMALL, **FLOW),
}
"""The models by name."""


PIPELINES: dict[str, Any] = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
"""diffusers' pipelines by kind."""


def network(model: Model) -> Any:
    """Return the untrained network of a model."""
    kind = diffusers.SD3Transformer2DModel if model.kind == "sd3" else None
    return (kind or diffusers.UNet2DConditionModel)(**model.network)


def operations(model: Model, resolution: int) -> dict[str, float]:
    """Count the network's parameters, and TFLOP of network, encoder and decoder for an image.

    A multiplication and an addition are two operations. Nothing is computed.
    """
    with torch.device("meta"):
        net, vae = network(model), diffusers.AutoencoderKL(**model.vae)
        millions = sum(weight.numel() for weight in net.parameters()) / 1e6
        if model.millions and abs(millions - model.millions) > 0.1:
            raise SystemExit(f"expected {model.millions} M parameters, got {millions:.1f} M")
        side = resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
        latent = torch.empty(1, model.vae["latent_channels"], side, side)
        given: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 77, model.widths[0])}
        if model.kind == "sdxl":
            text, pooled = torch.empty(1, 77, sum(model.widths)), torch.empty(1, model.widths[1])
            given = {"encoder_hidden_states": text}
            given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        if model.kind == "sd3":
            given = {"encoder_hidden_states": torch.empty(1, 77 + 256, model.widths[2])}
            given["pooled_projections"] = torch.empty(1, sum(model.widths[:2]))
        calls = {
            "network": lambda: net(latent, timestep=torch.empty(1), **given),
            "encoder": lambda: vae.encode(torch.empty(1, 3, resolution, resolution)),
            "decoder": lambda: vae.decode(latent),
        }
        counts = {"millions": millions}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            counts[name] = counter.get_total_flops() / 1e12
    return counts


def build(model: Model, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """Write a pipeline of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        net, vae = network(model), diffusers.AutoencoderKL(**model.vae)
    for part in (net, vae):
        torch.nn.Module.to(part, dtype)
    clip = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]
    kinds = {"sd": clip[:1], "sdxl": clip, "sd3": clip[1:] * 2}[model.kind]
    parts: dict[str, Any] = {"vae": vae, "transformer" if model.kind == "sd3" else "unet": net}
    for number, (kind, width) in enumerate(zip(kinds, model.widths, strict=False)):
        tail = f"_{number + 1}" if number else ""
        parts["text_encoder" + tail] = kind(checkpoints.clip_config(width))
        parts["tokenizer" + tail] = checkpoints.clip_tokenizer()
    if model.kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    if model.kind == "sd3":
        small: dict[str, Any] = {"vocab_size": 30, "d_kv": 8, "d_ff": 37}
        small |= {"num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(d_model=model.widths[2], **small)
        parts["text_encoder_3"] = transformers.T5EncoderModel(config)
        parts["tokenizer_3"] = checkpoints.t5_tokenizer()
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        parts["scheduler"] = diffusers.DDIMScheduler(**VP, clip_sample=False)
    with quiet():
        return checkpoints.save(PIPELINES[model.kind](**parts), folder, {})
