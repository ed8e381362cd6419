r"""The embedded default backbone: a small latent diffusion of Fashion-MNIST.

Everything a Stable Diffusion has, at a size that samples on a laptop's CPU: a codec, a scalar
latent scale, a UNet with v-prediction on Stable Diffusion's own schedule, prompts and
guidance. The codec is the orthonormal 2×2 Haar transform: 32×32 grey pixels become a
(4, 16, 16) latent whose channels are one average and three details, and back without loss. White
is zero: Fashion-MNIST keeps negatives of catalogue photographs, and a latent says how dark. So the
average channel has a mean of −2.2 standard deviations. Stable Diffusion's latents are not centred
either (1.4, 0.7, 0.0 and −0.7 on ImageNet, in the code of Karras et al., arXiv 2312.02696), and
without such a mean there is no channel bias for a centroid to amplify.

The network never saw a class label. Its prompts are coarser than the classes (a *top* may be a
T-shirt, a pullover, a dress, a coat or a shirt) and were dropped half of the time, so that only
the few inverted images determine what a centroid knows of its class.
``scripts/train_tiny.py`` makes the weights; ``weights/tiny.md`` is the model card.

*tiny-cifar* is another model of this kind, for small colour photographs: a rectified flow of 64
classes of CIFAR-100, made by ``scripts/train_tiny_cifar.py``; see ``weights/tiny_cifar.md``.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.core.files import write_bytes
from augment.diffusion.backbone import REFERENCE, Condition, Recipe, Timestep, as_times
from augment.diffusion.backbones.resnet12 import features_of, load_trunk
from augment.diffusion.backbones.unet import UNet
from augment.diffusion.checkpoints.adapter import adapter_of
from augment.diffusion.checkpoints.heads import ImageHeads, refuse_beside_heads
from augment.diffusion.checkpoints.lora import find_lora, fuse_lora
from augment.diffusion.checkpoints.tokens import TokenRows, check_vectors, only_tokens
from augment.diffusion.conditions import HEADS
from augment.diffusion.process import Flow, Process, VariancePreserving
from augment.diffusion.usage import Usage

_FOLDER = Path(__file__).parent / "weights"
EMBEDDED = {"tiny": _FOLDER / "tiny.safetensors", "tiny-cifar": _FOLDER / "tiny_cifar.safetensors"}
"""Weights that come with the package, by the backbone's name."""
WEIGHTS = EMBEDDED["tiny"]
PROMPTS = ("", "top", "trousers", "footwear", "bag")
"""Prompts of the embedded weights; the empty one is the unconditional model."""
_PROCESSES: dict[str, Callable[..., Process]] = {"flow": Flow, "diffusion": VariancePreserving}
"""Noising processes by their name in the weights' config."""

HAAR = 0.5 * torch.tensor(
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float32
)
"""Rows: average, horizontal, vertical, diagonal detail of a 2×2 block. Orthonormal, symmetric."""


def haar(pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n C H W"]:
    """Apply one level of the orthonormal Haar transform, which makes four channels of each."""
    blocks = F.pixel_unshuffle(pixels, 2).unflatten(1, (-1, 4))
    return torch.einsum("ij,ncjhw->ncihw", HAAR.to(pixels), blocks).flatten(1, 2)


def inverse_haar(latents: Float[Tensor, "n C h w"]) -> Float[Tensor, "n c H W"]:
    """Invert `haar`."""
    blocks = torch.einsum("ji,ncjhw->ncihw", HAAR.to(latents), latents.unflatten(1, (-1, 4)))
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)


ROWS = 32
"""Rows of every call of the compiled network: another shape takes another minute to compile."""


def build_network(config: Mapping[str, Any]) -> UNet:
    """Build the UNet of the model card, untrained."""
    return UNet(**config).to(memory_format=torch.channels_last)


class Tiny:
    """The embedded backbone, or another of its kind; see `augment.diffusion.backbone.Backbone`.

    Args:
        weights: safetensors file of ``scripts/train_tiny.py``, whose config has the prompts and
            the noising process.
        device: of the network.
        dtype: precision of the network; latents and solver stay in float32.
        lora: low-rank weights to add: a safetensors file, a folder, or ``owner/name``.
        lora_scale: factor of the low-rank weights.
        adapter: folder of ``latent-augment adapt``, or ``owner/name``: low-rank weights, prompts,
            or both.
        reference: safetensors file of ``scripts/train_resnet12.py``, which makes references of
            images; for weights of ``scripts/train_tiny_cifar.py`` that learned from its features.
        compile: compile the network and its weights at the first `ROWS` latents: a minute or two
            of a CPU, less with a warm cache of inductor, for four fifths of the time a call.
            Gradients, and rows beyond a multiple of `ROWS`, use the plain network.
        local_files_only: take LoRA and adapter from the hub's cache alone.

    Raises:
        UserError: the weights file is missing or of another kind, or the LoRA or the reference
            network of another model.
    """

    part = "unet"
    resolution = 32
    usage = Usage()

    def __init__(
        self,
        weights: Path = WEIGHTS,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        adapter: str | Path | None = None,
        reference: str | Path | None = None,
        compile: bool = False,
        local_files_only: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        given, lora = adapter_of(adapter, lora, local_files_only)
        try:
            with safe_open(weights, framework="pt") as file:
                self.config = config = json.loads(file.metadata()["config"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.scale: float = config["scale"]
            self.white: float = config["white"]
            self.channels: int = config["unet"]["in_channels"] // 4
            self.latent_shape: tuple[int, int, int] = (4 * self.channels, 16, 16)
            self.prompts = tuple(config.get("prompts", PROMPTS))
            kind, options = config.get("process", ("diffusion", {"prediction": "v"}))
            self.process: Process = _PROCESSES[kind](**options)
            names = ("feature.weight", "feature.bias")
            self.feature = {key: state.pop(key) for key in names if key in state}
            self.unet = build_network(config["unet"])
            self.unet.load_state_dict(state)
            # the prompts' embeddings are looked up here, so that null-text can optimise them
            texts = state["class_embedding.weight"].float().to(self.device)
            self.table: nn.Module = nn.Embedding.from_pretrained(texts)
            self.unet.class_embedding = nn.Identity()
        except Exception as error:  # of any type, since files may be hostile
            raise UserError(
                f"expected weights of the tiny backbone at {weights}, got "
                f"{' '.join(str(error).split())[:120] or error!r}; "
                "reinstall latent-augment or run scripts/train_tiny.py"
            ) from None
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        name = next((name for name, path in EMBEDDED.items() if path == weights), "tiny")
        self.fingerprint = {"name": name, "weights": digest, "process": repr(self.process)}
        self.adapted_prompts = given.prompts if given else {}
        self.trunk = self._load_trunk(Path(reference)) if reference else None
        if given:
            given.check(digest)
        if lora:
            self.fingerprint |= fuse_lora(self.unet, find_lora(lora, local_files_only), lora_scale)
        if given:
            self.fingerprint |= given.fingerprint()
            if rows := only_tokens(given.vectors(), "tiny"):
                self._append(rows).requires_grad_(False)
        self.heads: ImageHeads | None = None
        if given and given.heads:
            refuse_beside_heads(compile=compile, reference=reference)
            heads = ImageHeads.load(self.unet, given.heads)
            self.heads = heads.to(self.device, dtype)
        self.unet.to(self.device, dtype).eval().requires_grad_(False)
        # its weights are laid out for the CPU, and the steps between products fused
        options = {"dynamic": False, "options": {"freezing": True}}
        self.compiled = torch.compile(self.unet, **options) if compile else None
        self.recipe: Recipe = {}

    def _load_trunk(self, path: Path) -> nn.Module:
        """Load the network that makes references, and enter it in the fingerprint."""
        if not self.feature:
            raise UserError(
                "expected weights that learned from features, which reference is for, got others; "
                "leave reference out, or take those of scripts/train_tiny_cifar.py"
            )
        network = load_trunk(path, self.feature["feature.weight"].shape[1])
        self.fingerprint[REFERENCE] = hashlib.sha256(path.read_bytes()).hexdigest()
        return nn.Module.to(network, self.device)

    def encode(self, images: Float[Tensor, "n c 32 32"]) -> Float[Tensor, "n C 16 16"]:
        return haar(images.to(self.device) - self.white) * self.scale

    def decode(self, clean: Float[Tensor, "n C 16 16"]) -> Float[Tensor, "n c 32 32"]:
        return (inverse_haar(clean / self.scale) + self.white).clamp(0, 1)

    def condition(self, prompts: Sequence[str]) -> Condition:
        for prompt in prompts:
            if prompt not in self.prompts:
                near = get_close_matches(prompt, self.prompts)
                few = len(self.prompts) < 10
                words = ", ".join(filter(None, self.prompts if few else near or self.prompts[1:4]))
                raise UserError(
                    f"expected a prompt out of those of {self.fingerprint['name']}, such as "
                    f"{words}, got {prompt!r}; choose one of its .prompts or none"
                )
        numbers = [self.prompts.index(prompt) for prompt in prompts]
        known = {"text": self.table(torch.tensor(numbers, dtype=torch.long, device=self.device))}
        if self.trunk is not None:
            width = self.feature["feature.weight"].shape[1]
            known["reference"] = torch.zeros(len(prompts), width, device=self.device)
        if self.heads is not None:
            known[HEADS] = self.heads.of(prompts)
        return known

    embedded = condition

    @property
    def texts(self) -> Float[Tensor, "p width"]:
        """Return the embeddings of all prompts."""
        numbers = torch.arange(len(self.prompts), device=self.device)
        return self.table(numbers).detach()

    def encoders(self) -> dict[str, nn.Module]:
        """Return no text encoder: prompts are looked up."""
        return {}

    def add_tokens(self, words: Mapping[str, str], keep_norm: bool) -> dict[str, TokenRows]:
        """Add prompts that begin as others; return their rows, to be trained.

        Args:
            words: a prompt by new prompt.
            keep_norm: not used, as few prompts are no vocabulary.
        """
        rows = self.condition([*words.values()])["text"]
        return {"text_encoder": self._append(dict(zip(words, rows, strict=True)))}

    def _append(self, rows: Mapping[str, Tensor]) -> TokenRows:
        """Add prompts behind those of the weights."""
        texts, first = self.texts, len(self.prompts)
        check_vectors(rows, texts.shape[1], self.prompts)
        self.prompts += tuple(rows)
        added = torch.stack([*rows.values()]).to(texts)
        self.table = table = TokenRows(nn.Embedding.from_pretrained(texts), added, first)
        return table

    def refer(self, images: Float[Tensor, "n c 32 32"]) -> Float[Tensor, "n f"]:
        """Embed images as references: features of length 1 of a ResNet-12, or their image heads.

        Raises:
            UserError: the backbone was loaded without both.
        """
        if self.heads is not None:
            return self.heads.refer(images)
        if self.trunk is None:
            raise UserError("expected the tiny backbone with reference=, its ResNet-12, got none")
        return features_of(self.trunk, images.to(self.device))

    def _project(self, references: Float[Tensor, "n f"]) -> Float[Tensor, "n width"]:
        """Return what references add to a prompt's embedding: of zeros, which are none, nothing."""
        weight, bias = (part.to(references) for part in self.feature.values())
        return (references @ weight.T + bias) * (references != 0).any(1, keepdim=True)

    def network(
        self, latent: Float[Tensor, "n C 16 16"], timestep: Timestep, condition: Condition
    ) -> Float[Tensor, "n C 16 16"]:
        """Return the UNet's output, in the process's prediction."""
        text = condition["text"]
        if self.heads is not None:
            self.heads.weights = condition[HEADS]
        if "reference" in condition:
            text = text + self._project(condition["reference"]).to(text)
        rows = latent.to(self.dtype), as_times(timestep, latent), text.to(self.dtype)
        if self.compiled is None or torch.is_grad_enabled():
            return self.unet(*rows).float()
        from torch._dynamo.exc import BackendCompilerFailed

        outputs = []
        try:
            for part in zip(*(tensor.contiguous().split(ROWS) for tensor in rows), strict=True):
                call = self.compiled if len(part[0]) == ROWS else self.unet
                outputs.append(call(*part))
            return torch.cat(outputs).float()
        except BackendCompilerFailed as error:
            raise UserError(
                "expected to compile the network, for which a C++ compiler has to be there, got "
                f"{str(error).splitlines()[0]}; leave compile out"
            ) from None

    def trainable(self) -> nn.Module:
        """Return the network, to be trained further; the compiled one has the old weights."""
        self.compiled = None
        return self.unet

    def save(self, folder: Path) -> Path:
        """Write the weights below a folder; return the path for `load_backbone`."""
        state = self.unet.state_dict() | {"class_embedding.weight": self.texts} | self.feature
        state = {key: value.cpu().contiguous() for key, value in state.items()}
        path = folder / "tiny.safetensors"
        write_bytes(path, save(state, {"config": json.dumps(self.config)}))
        return path
