"""Heads, and the ways to train a part of a network.

What decouples features from classifier (cRT, τ-normalisation, LWS, episodes) is written on
`get_head`, `set_head` and `features`; these raise a `UserError` for a network without one head.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from augment.core.errors import UserError, lookup
from augment.diffusion.checkpoints.lora import inject_adapters
from augment.training.checks import at_least
from augment.training.models.networks import Images

TUNES = ("all", "head", "lora")


class CosineHead(nn.Module):
    """Cosines between features and one direction a class, in [−1, 1]; for LDAM, arXiv 1906.07413.

    Args:
        in_features, out_features: as of ``nn.Linear``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight))

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the cosines."""
        return F.linear(F.normalize(features), F.normalize(self.weight))


class ScaledHead(nn.Module):
    """Learnable weight scaling, f_k·(w_k·x + b_k) with f alone learnt; arXiv 1910.09217, sec. 4.

    The paper scales w; its code scales the bias too, and so does this. W and b are buffers, copied
    from a trained linear head.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        linear = _linear(head)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", bias)
        self.scales = nn.Parameter(torch.ones_like(self.weight[:, 0]))

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return scaled logits."""
        return self.scales * F.linear(features, self.weight, self.bias)


Head = nn.Linear | CosineHead | ScaledHead


def _linear(head: nn.Module) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise UserError(f"expected a linear head, got {type(head).__name__}; train one first")
    return head


@torch.no_grad()
def tau_normalised(head: nn.Module, tau: float) -> nn.Linear:
    """Return a head with w_k / ‖w_k‖^τ and no bias; Kang et al., arXiv 1910.09217, sec. 4.

    Args:
        head: the trained linear head, which is left as it is.
        tau: 0 keeps the weights, 1 makes all classes' equally long; choose it on validation images.
    """
    weight = _linear(head).weight
    scaled = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight)
    scaled.weight.copy_(weight / weight.norm(dim=1, keepdim=True) ** tau)
    return scaled


def head_name(network: nn.Module) -> str:
    """Return the dotted name of the last layer."""
    name = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(name, str):
        raise UserError(
            f"expected a network with one head, got {type(network).__name__} with "
            f"{name or 'none'}; choose another network"
        )
    return name


def get_head(network: nn.Module) -> Head:
    """Return the last layer."""
    head = network.get_submodule(head_name(network))
    if not isinstance(head, Head):
        raise UserError(
            f"expected a network with a linear head, got {type(head).__name__} in "
            f"{type(network).__name__}; choose another network"
        )
    return head


def set_head(network: nn.Module, head: Head) -> None:
    """Put another last layer in place."""
    get_head(network)
    network.set_submodule(head_name(network), head)


def features(network: nn.Module, images: Images) -> Float[Tensor, "n d"]:
    """Return what the head is given."""
    given: list[Tensor] = []
    hook = get_head(network).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    return given[0]


def freeze(network: nn.Module) -> None:
    """Let no parameter learn but the head's; buffers need `train_mode` too."""
    network.requires_grad_(False)
    get_head(network).requires_grad_(True)


def train_mode(network: nn.Module, tune: str = "all") -> None:
    """Set training mode for what learns; what is frozen keeps its batch statistics.

    Args:
        network: the network.
        tune: ``all``; ``head``, with all else in evaluation mode, dropout included; or ``lora``,
            with the batch norms in evaluation mode.
    """
    lookup(dict.fromkeys(TUNES), tune, "way to tune")
    network.train(tune != "head")
    if tune == "head":
        get_head(network).train()
    if tune == "lora":
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _attention(network: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers in every ``attn``.

    Layers whose weight is used without calling them are left out, for an adapter there would be
    idle: in timm, ``qkv`` beside a ``q_bias`` of its own (BEiT, EVA, Swin v2).
    """
    for name, module in network.named_modules():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and parent.rpartition(".")[-1] == "attn":
            around = network.get_submodule(parent)
            if leaf != "qkv" or getattr(around, "q_bias", None) is None:
                yield name


def add_lora(network: nn.Module, rank: int, targets: Sequence[str] | None = None) -> nn.Module:
    """Freeze a network but for low-rank adapters and its head; Hu et al., arXiv 2106.09685.

    W x becomes W x + B A x with A (rank, in) and B (out, rank), B = 0 at first, so that the logits
    are what they were. The network is changed in place, and its parameters get other names.

    Args:
        network: the network.
        rank: of the adapters.
        targets: ends of names of linear or convolutional layers; by default those of the attention.

    Raises:
        UserError: peft is not installed, or nothing matches.
    """
    at_least(1, rank=rank)
    head, last = get_head(network), head_name(network)
    if targets is None:
        names = [*_attention(network)]
    else:
        kinds = nn.Linear | nn.Conv2d
        names = [n for end in targets for n, m in ends_in(network, end) if isinstance(m, kinds)]
    names = [name for name in names if name != last]
    if not names:
        raise UserError(
            f"expected layers named {', '.join(targets or ['attn'])} for LoRA in "
            f"{type(network).__name__}, got none; name its linear or convolutional layers"
        )
    network = inject_adapters(network, rank, "|".join(map(re.escape, names)))
    head.requires_grad_(True)
    return network


def ends_in(network: nn.Module, end: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules, by name, whose dotted names end in a part."""
    for name, module in network.named_modules():
        if f".{name}".endswith(f".{end}"):
            yield name, module


class AuxiliaryBatchNorm(nn.Module):
    """A batch norm with second statistics, scales and shifts for synthetic images.

    Xie et al., *Adversarial examples improve image recognition*, arXiv 1911.09665, sec. 4.2; for
    synthetic images *Diversify, don't fine-tune*, arXiv 2312.02253. In evaluation only the main
    one is used.

    Args:
        norm: any batch norm, with an activation or without; the second one begins as its copy.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.main, self.aux = norm, deepcopy(norm)
        self.synthetic = False

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Normalise by the one or the other."""
        return (self.aux if self.synthetic and self.training else self.main)(x)


def with_auxiliary_norms(network: nn.Module) -> nn.Module:
    """Replace every batch norm by an `AuxiliaryBatchNorm`, in place, and only once."""
    if added_norms(network):
        return network
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise UserError(
            f"expected a network with batch norms, got {type(network).__name__} without; "
            "choose another network or no auxiliary norms"
        )
    for name in norms:
        network.set_submodule(name, AuxiliaryBatchNorm(network.get_submodule(name)))
    return network


def added_norms(network: nn.Module) -> list[AuxiliaryBatchNorm]:
    """Return the batch norms that `with_auxiliary_norms` has put in."""
    return [module for module in network.modules() if isinstance(module, AuxiliaryBatchNorm)]


@contextmanager
def auxiliary(network: nn.Module) -> Iterator[None]:
    """Take batches for synthetic: the second norms are used, if in training mode."""
    norms = added_norms(network)
    if not norms:
        raise UserError(
            f"expected a network with auxiliary norms, got {type(network).__name__} without; "
            "call with_auxiliary_norms first"
        )
    try:
        for norm in norms:
            norm.synthetic = True
        yield
    finally:
        for norm in norms:
            norm.synthetic = False
