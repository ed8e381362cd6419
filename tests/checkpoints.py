"""Pipeline folders of diffusers' own classes, randomly initialised, of a few hundred kilobytes.

The networks are too small to make images, but every part is real: tokenizers, text encoders,
autoencoder, network, scheduler file, model_index.json.
"""

import hashlib
import json
import math
import re
import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

LATENT, FACTOR = 16, 2
RESOLUTION = LATENT * FACTOR
PROMPT = "a cat on a mat"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
UNET = {
    "sample_size": LATENT,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def clip_tokenizer() -> Any:
    """Return a byte-pair tokenizer of letters and one word."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[("c", "a"), ("ca", "t</w>")], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0)]
    tokens += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=tokens, extra_ids=0, model_max_length=512)


def clip_config(width: int = 32, **changes: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=56,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=54,
        eos_token_id=55,
        pad_token_id=55,
        projection_dim=width,
        **changes,
    )


def autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": RESOLUTION,
    }
    return AutoencoderKL(**config | changes)


def save(pipe: Any, folder: Path, scheduler: dict[str, Any]) -> Path:
    """Write the pipeline, with larger weights of the text encoders."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        if encoder is not None:
            for key, weight in encoder.named_parameters():
                weight.data *= 30 if "embedding" in key else 1
    pipe.save_pretrained(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return folder


def stable_diffusion(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Write Stable Diffusion 1 or 2: one CLIP, a UNet, DDIM's scheduler file as SD 1 has it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=4.0),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder, scheduler)


LANDSCAPES = Path(__file__).with_name("landscapes.safetensors")
LANDSCAPE = "a photo of a landscape"
_LEARNED = ("vae", "unet", "text_encoder")


def learned(folder: Path) -> Path:
    """Write Stable Diffusion with a v-network that knows three landscapes by heart.

    The landscapes are those of ``latent-augment check``, and their prompt is `LANDSCAPE`. The
    weights are of `learn_landscapes`.
    """
    from safetensors.torch import load_file

    pipe, weights = _pipeline(folder), load_file(LANDSCAPES)
    pipe.vae.register_to_config(scaling_factor=weights.pop("scaling_factor").item())
    parts = torch.nn.ModuleDict({name: getattr(pipe, name) for name in _LEARNED})
    parts.load_state_dict(weights)
    pipe.save_pretrained(folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def _pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(stable_diffusion(folder)))


def learn_landscapes(steps: int = 500) -> None:
    """Train the weights of `LANDSCAPES`, in a few minutes: ``python tests/checkpoints.py``.

    Args:
        steps: of the training of the autoencoder, and of the network.
    """
    from safetensors.torch import save_file

    from augment.report.check import pictures

    with TemporaryDirectory() as place:
        source = pictures(None, 3, Path(place))
        (ids,) = source.ids.values()
        pixels = 2 * torch.stack([source.load(i, 3, RESOLUTION) for i in ids]) - 1
        pipe = _pipeline(Path(place) / "model")
    vae, unet = pipe.vae, pipe.unet
    for optimizer in _cooling(vae, steps):
        loss = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample - pixels).square().mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        clean = vae.encode(pixels).latent_dist.mode()
        scale = clean.std()
        clean = clean / scale
        text = torch.cat(pipe.encode_prompt(LANDSCAPE, "cpu", 1, True)[:2])
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    generator = torch.Generator().manual_seed(0)
    for optimizer in _cooling(unet, steps):
        times = torch.randint(1000, (len(clean) * 2,), generator=generator)
        rows, alpha = clean.repeat(2, 1, 1, 1), kept[times].sqrt()[:, None, None, None]
        noise = torch.randn(rows.shape, generator=generator)
        sigma = (1 - alpha**2).sqrt()
        words = text[torch.randint(2, (len(rows),), generator=generator)]
        found = unet(alpha * rows + sigma * noise, times, words).sample
        loss = (found - (alpha * noise - sigma * rows)).square().mean()
        loss.backward()
        optimizer.step()
    parts = torch.nn.ModuleDict({name: getattr(pipe, name) for name in _LEARNED})
    weights = {key: weight.half() for key, weight in parts.state_dict().items()}
    save_file(weights | {"scaling_factor": 1 / scale}, LANDSCAPES)


def _cooling(network: torch.nn.Module, steps: int) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimiser a step, whose rate falls along a cosine."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        yield optimizer
        schedule.step()


def sdxl(folder: Path, seed: int = 0, zeros: bool = True, **scheduler: Any) -> Path:
    """Write SDXL: two text encoders of 32 and 24 channels, a pooled row, size conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    changes = {
        "cross_attention_dim": 32 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "use_linear_projection": True,
    }
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=4.0, force_upcast=True),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(24)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(**UNET | changes),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
    )
    return save(pipe, folder, scheduler)


def check_batches(
    backbone: Any, prompts: list[str], latents: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """Check that a prompt has the same rows and answer in every batch; return both of all."""
    mixed = backbone.condition(prompts)
    together = backbone.network(latents, 500.5, mixed)
    for row, prompt in enumerate(prompts):
        single = backbone.condition([prompt])
        assert all(torch.equal(mixed[key][row : row + 1], single[key]) for key in mixed)
        alone = backbone.network(latents[row : row + 1], 500.5, single)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert together.dtype == torch.float32
    return mixed, together


def sd3(folder: Path, seed: int = 0, t5: bool = True, **scheduler: Any) -> Path:
    """Write SD 3.5: two CLIPs and T5, a transformer with normalised queries and keys."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=32 + 24,
        pos_embed_max_size=LATENT,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    config = T5Config(vocab_size=30, d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    pipe = StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(24)),
        text_encoder_3=T5EncoderModel(config) if t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return save(pipe, folder, scheduler)


def dit(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Write DiT: class conditions and a learned variance; the labels are ImageNet's first three."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=LATENT, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=4,
        attention_head_dim=8, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    first, *others = (b.norm1.emb.class_embedder for b in transformer.transformer_blocks)
    for other in others:  # as in the weights of the paper
        other.embedding_table.weight.data.copy_(first.embedding_table.weight)
    labels = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "great white shark"}
    pipe = DiTPipeline(
        transformer=transformer,
        vae=autoencoder(scaling_factor=4.0),
        scheduler=DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
    )
    save(pipe, folder, scheduler)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": labels}))
    return folder


SIT = {"input_size": LATENT, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2}
SIT |= {"num_heads": 4, "num_classes": 1000, "learn_sigma": True}


def sit_state(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random weights of a SiT by its layers' published names."""
    width, channels = config["hidden_size"], config["in_channels"]
    patch, sides = config["patch_size"], config["input_size"] // config["patch_size"]
    layers = {
        "x_embedder.proj": (width, channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch**2 * channels * (1 + config["learn_sigma"]), width),
    }
    for number in range(config["depth"]):
        layers |= {
            f"blocks.{number}.attn.qkv": (3 * width, width),
            f"blocks.{number}.attn.proj": (width, width),
            f"blocks.{number}.mlp.fc1": (4 * width, width),
            f"blocks.{number}.mlp.fc2": (width, 4 * width),
            f"blocks.{number}.adaLN_modulation.1": (6 * width, width),
        }
    state = {"pos_embed": torch.randn(1, sides**2, width)}
    state["y_embedder.embedding_table.weight"] = torch.randn(config["num_classes"] + 1, width)
    for name, shape in layers.items():
        state[f"{name}.weight"] = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) / 4
    return state


def sit(folder: Path, seed: int = 0, labels: bool = True, **config: Any) -> Path:
    """Write SiT as its checkpoints for diffusers are: own classes, the published names."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = SIT | config
    (folder / "transformer").mkdir(parents=True)
    place = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(sit_state(config), place)
    place.with_name("config.json").write_text(json.dumps(config))
    autoencoder(scaling_factor=4.0).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": ["pipeline", "SiTPipeline"],
        "transformer": ["transformer_sit", "SiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    index |= {"id2label": {"1": "goldfish, Carassius auratus"}} if labels else {}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


LIGHTNINGDIT = {"input_size": LATENT, "patch_size": 1, "in_channels": 4, "hidden_size": 32}
LIGHTNINGDIT |= {"depth": 2, "num_heads": 4, "num_classes": 1000, "learn_sigma": False}
LIGHTNINGDIT |= {"use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
LIGHTNINGDIT |= {"wo_shift": False}


def lightningdit_state(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random weights of a LightningDiT by its layers' published names."""
    width, depth = config["hidden_size"], config["depth"]
    inner = int(2 / 3 * int(4.0 * width))
    state = {key: value for key, value in sit_state(config).items() if ".mlp.fc" not in key}
    state["final_layer.norm_final.weight"] = 1 + torch.randn(width) / 4
    for number in range(depth):
        block = f"blocks.{number}"
        for norm in ("norm1", "norm2"):
            state[f"{block}.{norm}.weight"] = 1 + torch.randn(width) / 4
        for name, shape in {"w12": (2 * inner, width), "w3": (width, inner)}.items():
            state[f"{block}.mlp.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            state[f"{block}.mlp.{name}.bias"] = torch.randn(shape[0]) / 4
        for norm in ("q_norm", "k_norm") if config["use_qknorm"] else ():
            head = width // config["num_heads"]
            state[f"{block}.attn.{norm}.weight"] = 1 + torch.randn(head) / 4
    return state


def lightningdit(
    folder: Path, seed: int = 0, shift: float | None = 0.3, vae: Any = None, **config: Any
) -> Path:
    """Write LightningDiT as its checkpoints for diffusers are: own classes, the published names.

    ``vae`` is its autoencoder, a small one by default.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = LIGHTNINGDIT | config
    (folder / "transformer").mkdir(parents=True)
    place = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(lightningdit_state(config), place)
    place.with_name("config.json").write_text(json.dumps(config))
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.2, 0.25, 0.3, 0.2]}
    (vae or autoencoder(**statistics)).save_pretrained(folder / "vae")
    scheduler = {"_class_name": "FlowMatchHeunDiscreteScheduler"}
    scheduler |= {} if shift is None else {"shift": shift}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": ["pipeline", "LightningDiTPipeline"],
        "transformer": ["transformer_lightningdit", "LightningDiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"],
        "id2label": {"1": "goldfish, Carassius auratus"},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>"
    "{% endfor %}<|im_start|>assistant{% if not enable_thinking %} no{% endif %}"
)


def qwen_tokenizer() -> Any:
    """Return a tokenizer of bytes with a chat template, and Qwen's length of 131072."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(ByteLevel.alphabet()), *special]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=special[1:],
        model_max_length=131072,
        chat_template=CHAT,
    )


def qwen(kind: str, layers: int) -> Any:
    """Return a language model of 16 channels, of one of Qwen3's classes."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000},
    )
    return getattr(transformers, kind)(config).eval()


def z_image(folder: Path, seed: int = 0, time: float = 1.0, **scheduler: Any) -> Path:
    """Write Z-Image: Qwen3, a transformer of two layers, FLUX.1's kind of autoencoder.

    ``time`` scales what the network makes of the noise level, which at random changes wildly.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[200, 16, 16],
    )  # fmt: skip
    transformer.t_embedder.mlp[2].weight.data *= time
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False),
        text_encoder=qwen("Qwen3Model", 3),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    return save(pipe, folder, scheduler)


def flux2(folder: Path, seed: int = 0, distilled: bool = False, **scheduler: Any) -> Path:
    """Write FLUX.2 [klein]: Qwen3 of 30 layers, an autoencoder with a batch norm of patches."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        sample_size=RESOLUTION,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 0.5)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen("Qwen3ForCausalLM", 30),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )
    return save(pipe, folder, scheduler)


def flux(folder: Path, seed: int = 0, guided: bool = True, **scheduler: Any) -> Path:
    """Write FLUX.1: CLIP's pooled row and T5, packed latents, the guidance as an input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
        guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    config = T5Config(vocab_size=30, d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(config),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )
    return save(pipe, folder, scheduler)


FAMILIES = (
    *("stable_diffusion", "sdxl", "sd3", "dit", "sit", "lightningdit"),
    *("z_image", "flux", "flux2"),
)
"""The functions above that write a family's pipeline."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet(key: str) -> str:
    """Return a UNet's key in the original releases; of two levels with one layer each."""
    name, kind = key.rsplit(".", 1)
    if name in OUTER:
        return f"{OUTER[name]}.{kind}"
    side, *rest = name.split(".")
    if side == "mid_block":
        part, number, tail = rest[0], int(rest[1]), ".".join(rest[2:])
        place = f"middle_block.{1 if part == 'attentions' else 2 * number}"
    else:
        block, part, number, tail = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
        down, last = side == "down_blocks", part.endswith("samplers")
        place = f"{'in' if down else 'out'}put_blocks.{2 * block + (1 if last else number) + down}"
        if last:  # behind the attention, if the block has one: here the first up block has none
            return f"{place}.{'0.op' if down else '1.conv'}.{kind}"
        place += ".1" if part == "attentions" else ".0"
    return f"{place}.{tail if part == 'attentions' else RESNET[tail]}.{kind}"


def original_vae(key: str) -> str:
    """Return an autoencoder's key in the original releases; of two levels."""
    name, kind = key.rsplit(".", 1)
    for new, old in (
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("down_blocks", "down"),
        ("up_blocks.0", "up.1"),
        ("up_blocks.1", "up.-"),
        ("up.-", "up.0"),
    ):
        name = name.replace(new, old)
    if "mid_block.attentions.0." in name:
        side, layer = name.split(".mid_block.attentions.0.")
        name = f"{side}.mid.attn_1.{ATTENTION[layer]}"
    return f"{name}.{kind}"


TRANSFORMERS = {
    "sd3": {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "transformer_blocks": "joint_blocks",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.to_q": "x_block.attn.qkv",
        "attn.add_q_proj": "context_block.attn.qkv",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.to_q": "x_block.attn2.qkv",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    },
    "z-image": {
        "all_final_layer.2-1": "final_layer",
        "all_x_embedder.2-1": "x_embedder",
        "attention.to_out.0": "attention.out",
        "attention.norm_q": "attention.q_norm",
        "attention.norm_k": "attention.k_norm",
        "attention.to_q": "attention.qkv",
    },
    "flux2": {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_q": "img_attn.qkv",
        "attn.add_q_proj": "txt_attn.qkv",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    },
}
"""Layers of transformers: diffusers' names, and those of the original releases."""


def original_transformer(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a transformer of two blocks by the names of the original releases."""
    from safetensors.torch import load_file

    state = load_file(path)
    named: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if layer.endswith(("to_k", "to_v", "add_k_proj", "add_v_proj")):
            continue
        if layer.endswith(("to_q", "add_q_proj")):
            value = torch.cat([state[re.sub("_q", f"_{x}", key)] for x in "qkv"])
        if layer.endswith("norm_out.linear") or "blocks.1.norm1_context" in layer:
            value = torch.cat(value.chunk(2)[::-1])  # the shift is before the scale
        if key == "pos_embed.pos_embed":
            layer, kind = key, ""
        for new, old in TRANSFORMERS[name].items():
            layer = re.sub(rf"(^|(?<=\.)){re.escape(new)}($|(?=\.))", old, layer)
        if layer.startswith("single_blocks"):
            layer = layer.replace("img_attn.norm", "norm")
        if name == "flux2" and layer.endswith("_norm"):
            kind = "scale"
        named[f"{layer}.{kind}".strip(".")] = value.contiguous()
    return named


def single_file(folder: Path, path: Path) -> Path:
    """Write the weights of a `stable_diffusion` folder to one file, named as in the releases."""
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    unet, vae = load_file(folder / "unet" / name), load_file(folder / "vae" / name)
    text = load_file(folder / "text_encoder" / "model.safetensors")
    state = {f"model.diffusion_model.{original_unet(key)}": unet[key] for key in unet}
    for key, value in vae.items():
        square = value.ndim == 2  # linear layers of attention, once convolutions
        value = value[..., None, None].contiguous() if square else value
        state[f"first_stage_model.{original_vae(key)}"] = value
    prefix = "cond_stage_model.transformer.text_model."
    state |= {prefix + key.removeprefix("text_model."): value for key, value in text.items()}
    save_file(state, path)
    return path


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that downloads use, on this machine.

    Args:
        repositories: folders by ``owner/name``, or an error: a status and a code.
    """

    def __init__(self, repositories: dict[str, Path | tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.repositories, self.asked = repositories, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @contextmanager
    def used(self, monkeypatch: Any, cache: Path) -> Iterator[None]:
        """Take the place of the Hugging Face hub, with a cache of its own."""
        from huggingface_hub import constants, hf_api

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield
        self.shutdown()
        self.server_close()


class Desk(BaseHTTPRequestHandler):
    """Answers one request to a `Hub`."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if re.match("/api/(?!models/)", self.path):  # the client's own, at most once a day
            self.reply(404, b"")
            return
        path = self.path.split("?")[0].strip("/").removeprefix("api/models/")
        owner, name, *rest = path.split("/")
        found = self.server.repositories.get(f"{owner}/{name}", (404, "RepoNotFound"))
        self.server.asked.append("/".join(rest))
        if isinstance(found, tuple):
            self.reply(found[0], b"", {"X-Error-Code": found[1]})
            return
        files = sorted(str(p.relative_to(found)) for p in found.rglob("*") if p.is_file())
        if rest[:1] == ["resolve"]:
            self.send_file(found / "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            entry = {"type": "file", "oid": "0" * 40, "size": 1}
            self.reply(200, json.dumps([entry | {"path": file} for file in files]).encode())
        else:
            info = {"id": f"{owner}/{name}", "sha": "0" * 40}
            siblings = [{"rfilename": file} for file in files]
            self.reply(200, json.dumps(info | {"siblings": siblings}).encode())

    do_HEAD = do_GET

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40})

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def save_clip(folder):
    """Write a CLIP of two layers, for 16×16 images and prompts of small letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    config = CLIPConfig(
        text_config=clip_config().to_dict(), vision_config=vision.to_dict(), projection_dim=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    for key, weight in model.named_parameters():
        weight.data *= 10 if weight.ndim > 1 and "position" not in key else 1
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return model


def resampler(embed: int, width: int, hidden: int = 64, tokens: int = 3) -> dict[str, Any]:
    """Return the projection of an IP-Adapter *plus* of four layers, named as it is published."""
    shapes = {
        "latents": (1, tokens, hidden),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for name, (rows, columns) in {"in": (hidden, embed), "out": (width, hidden)}.items():
        shapes |= {f"proj_{name}.weight": (rows, columns), f"proj_{name}.bias": (rows,)}
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        sizes = {"0.to_q": 64, "0.to_kv": 128, "0.to_out": 64, "1.1": 4 * hidden}
        shapes |= {f"layers.{layer}.{k}.weight": (n, hidden) for k, n in sizes.items()}
        shapes[f"layers.{layer}.1.3.weight"] = (hidden, 4 * hidden)
    return {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def ip_adapter(folder: Path, pipeline: Path, kind: str = "plain", seed: int = 0) -> Path:
    """Write an IP-Adapter for a pipeline's UNet, and a CLIP for 16×16 images beside it."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4, "projection_dim": 24}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision))
    for key, weight in encoder.named_parameters():
        weight.data *= 10 if weight.ndim > 1 and "position" not in key else 1
    encoder.save_pretrained(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    width = unet.config.cross_attention_dim
    if kind == "plus":
        projection = resampler(32, width)
    else:
        shapes = {"proj.weight": (4 * width, 24), "proj.bias": (4 * width,)}
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)} if kind == "plain" else {}
        projection = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    layers = [key for key in unet.state_dict() if key.endswith("attn2.to_k.weight")]
    for number, name in enumerate(unet.attn_processors):
        if not name.endswith("attn1.processor"):
            rows = unet.get_parameter(name.replace("processor", "to_k.weight")).shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                state[f"ip_adapter.{number}.{part}.weight"] = torch.randn(rows, width)
    assert len(layers) * 2 == sum(key.startswith("ip_adapter") for key in state)
    save_file(state, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"


if __name__ == "__main__":
    learn_landscapes()
