"""LoRA: the model's own weights stay as they are, and small matrices beside them are trained.

A linear layer with the weights W computes W x + alpha / rank * B A x. Only A and B, its adapter,
are trained. The layers are those of the package peft. Whatever leaves the trainer is merged, that
is W + alpha / rank * B A: neither the engine nor who loads a checkpoint needs to know of adapters.
Source: LoRA, arXiv 2106.09685.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ADAPTER = "default"  # its name within peft


class Lora(NamedTuple):
    rank: int
    alpha: float
    seed: int  # of A's initial values
    base: str  # the model that adapter_config.json names


def inject(lm, lora: Lora) -> None:
    """Gives each linear layer of the decoder an adapter in float32, and freezes all other weights.

    The adapters have no values yet, see `initialize`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = set()
    for name, module in lm.base_model.layers.named_modules():
        if isinstance(module, nn.Linear):
            names.add(name.rpartition(".")[2])
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted(names),
        base_model_name_or_path=lora.base,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, lm)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def initialize(lm, seed: int, fill: Callable[[nn.Parameter, Tensor], None]) -> None:
    """Gives A random values as peft does, and B zeros: at first the policy is its base model.

    fill: copies a whole tensor into a parameter, which may be sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in own_parameters(lm):
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        fill(parameter, values)


def own_parameters(lm) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every A and B; nothing of a model without adapters."""
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            yield name, parameter


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def plain_name(name: str) -> str:
    """A parameter's name in a model without adapters."""
    return name.replace(".base_layer.", ".")


def merge(model, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model with adapters as those of a model without: (plain name, tensor)."""
    for name, parameter in parameters:
        if is_adapter(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            parameter = parameter.float() + layer.get_delta_weight(ADAPTER)
        yield plain_name(name), parameter


class Base:
    """The frozen model of a policy with adapters: the same weights, computed without them."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def __call__(self, *args) -> Tensor:
        layers = [module for module in self.policy.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self.policy(*args)
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def save(lm, tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes the adapter as peft does: adapter_config.json and adapter_model.safetensors.

    tensors: every A and B by its name in the model, whole.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir()
    saved = {}
    # Embeddings are never trained here. Looking for them peft would ask the hub.
    plain = get_peft_model_state_dict(lm, state_dict=tensors, save_embedding_layers=False)
    for name, tensor in plain.items():
        saved[f"base_model.model.{name}"] = tensor.contiguous()
    save_file(saved, folder / "adapter_model.safetensors")
    lm.peft_config[ADAPTER].save_pretrained(folder)
