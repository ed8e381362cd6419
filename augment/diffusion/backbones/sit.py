"""The class-conditional SiT of ImageNet, of which diffusers has the blocks but no class.

Ma et al., *SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers*, arXiv 2401.08740, on the linear path with a velocity. Its network is DiT's, and
takes the share of the image, 1 − σ, in place of a timestep; its velocity leads to the image, and
ours to the noise. The names of its layers are those of ``models.py`` in
github.com/willisma/SiT, at commit a87098c, which the published weights have, and which the
checkpoints for diffusers keep.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from augment.core.files import write_json
from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.dit import DiT
from augment.diffusion.checkpoints.checkpoint import Checkpoint, read_index
from augment.diffusion.checkpoints.hub import INDEX, damaged, quiet
from augment.sources.prompts import imagenet_names

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
"""Layers that SiT has once, and diffusers' DiT in every block."""

_INNER = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
"""Layers of a block: SiT's name, and those of diffusers that hold its rows."""


class SiT(DiT):
    """Prompts are class names or numbers; the empty prompt is the class of no class.

    Names are those of the checkpoint or, if it has none, of ImageNet's classes. Guidance changes
    the first three channels alone, as in the published sampler (``forward_with_cfg``); diffusers'
    pipeline of DiT guides all.

    Attributes:
        kind: how the names of its classes begin in a checkpoint.
    """

    name = "sit"
    kind = "SiT"
    guided_channels = 3
    fixed = (*DiT.fixed, "clean_end")

    def load(self, checkpoint: Checkpoint, parts: Sequence[str]) -> Any:
        """Build diffusers' pipeline of DiT around the network."""
        import diffusers

        checkpoint.check(parts)
        folder = checkpoint.folder or Path()
        config, scheduler = map(checkpoint.config, ("transformer", "scheduler"))
        labels = read_index(folder / INDEX).get("id2label")
        with quiet(), damaged(checkpoint.source):
            files = map(load_file, checkpoint.weights("transformer"))
            net = self.build(config, {key: value for file in files for key, value in file.items()})
            if not labels and net.config.num_embeds_ada_norm == len(imagenet_names()):
                labels = dict(enumerate(imagenet_names().values()))
            vae = diffusers.AutoencoderKL.from_pretrained(
                folder / "vae", variant=checkpoint.variant, use_safetensors=True, dtype=self.dtype
            )
            euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
            known = {"_class_name": euler.__name__, "shift": self.shift(scheduler.get("shift"))}
            flow = euler.from_config(known)
            return diffusers.DiTPipeline(net, vae, flow, id2label=labels)

    def build(self, config: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
        """Build the network from its config and its weights by their published names."""
        return _network(config, state)

    def shift(self, written: float | None) -> float:
        """Return the shift of the noise levels from that of the scheduler file, and back."""
        return 1.0 if written is None else written

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's velocity, from the image to the noise."""
        return -super().answer(latent, 1 - times / 1000, condition)

    def settings(self) -> dict[str, Any]:
        """Return the network's config as published."""
        net = self.net.config
        return {
            "input_size": net.sample_size,
            "patch_size": net.patch_size,
            "in_channels": net.in_channels,
            "hidden_size": net.num_attention_heads * net.attention_head_dim,
            "depth": net.num_layers,
            "num_heads": net.num_attention_heads,
            "num_classes": net.num_embeds_ada_norm,
            "learn_sigma": net.out_channels != net.in_channels,
        }

    def published(self) -> dict[str, Tensor]:
        """Return the network's weights by their published names."""
        return published(self.net)

    def save(self, folder: Path) -> Path:
        """Write the model below a folder, its layers named as published."""
        place, network = folder / "model", f"{self.kind}Transformer2DModel"
        transformer = place / "transformer"
        transformer.mkdir(parents=True)
        write_json(transformer / "config.json", {"_class_name": network, **self.settings()})
        save_file(self.published(), transformer / "diffusion_pytorch_model.safetensors")
        self.pipe.vae.save_pretrained(place / "vae")
        scheduler = self.pipe.scheduler
        written = {"_class_name": type(scheduler).__name__, "shift": self.shift(scheduler.shift)}
        (place / "scheduler").mkdir()
        write_json(place / "scheduler" / "scheduler_config.json", written)
        names: dict[int, str] = {}
        for name, number in self.pipe.labels.items():
            names[number] = f"{names[number]}, {name}" if number in names else name
        index = {
            "_class_name": f"{self.kind}Pipeline",
            "transformer": [f"transformer_{self.kind.lower()}", network],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "id2label": names,
        }
        write_json(place / INDEX, index)
        return place


def _network(config: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
    """Build diffusers' DiT with the weights of a SiT."""
    import diffusers

    heads, channels = config["num_heads"], config["in_channels"]
    with torch.device("meta"):
        net: Any = diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=config["hidden_size"] // heads,
            in_channels=channels,
            out_channels=channels * (2 if config["learn_sigma"] else 1),
            num_layers=config["depth"],
            sample_size=config["input_size"],
            patch_size=config["patch_size"],
            num_embeds_ada_norm=config["num_classes"],
            norm_eps=1e-6,
        )
    shared = net.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in net.transformer_blocks:
        block.norm1.emb = shared
    net.pos_embed.pos_embed = state.pop("pos_embed")
    net.load_state_dict(_renamed(state, config["depth"]), assign=True)
    return net


def _renamed(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the weights of a SiT by diffusers' names."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, kind = key.rsplit(".", 1)
        if layer in _SHARED:
            for number in range(depth):
                named[f"transformer_blocks.{number}.norm1.emb.{_SHARED[layer]}.{kind}"] = value
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", layer):
            places = _INNER.get(match[2], (match[2],))
            for place, rows in zip(places, value.chunk(len(places)), strict=True):
                named[f"transformer_blocks.{match[1]}.{place}.{kind}"] = rows
        else:
            named[f"{_OUTER.get(layer, layer)}.{kind}"] = value
    return named


def published(net: Any) -> dict[str, Tensor]:
    """Return the weights of diffusers' DiT by SiT's names."""
    layers = _OUTER | {k: f"transformer_blocks.0.norm1.emb.{v}" for k, v in _SHARED.items()}
    pieces: dict[str, tuple[str, ...]] = {name: (layer,) for name, layer in layers.items()}
    for number in range(len(net.transformer_blocks)):
        for name, places in _INNER.items():
            inner = tuple(f"transformer_blocks.{number}.{place}" for place in places)
            pieces[f"blocks.{number}.{name}"] = inner
    state, named = net.state_dict(), {"pos_embed": net.pos_embed.pos_embed}
    for name, places in pieces.items():
        for kind in ("weight", "bias"):
            if f"{places[0]}.{kind}" in state:
                rows = [state[f"{place}.{kind}"] for place in places]
                named[f"{name}.{kind}"] = torch.cat(rows)
    return {key: value.contiguous() for key, value in named.items()}
