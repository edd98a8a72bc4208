"""PEFT adapters whose tensors are moved away from where PEFT starts them."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


@torch.no_grad()
def moved_peft(model: nn.Module, *, seed: int = 0, **settings) -> PeftModel:
    """A PEFT model with alpha unequal to the rank, B not zero and magnitudes that are not the norms."""
    values = {"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = get_peft_model(model, LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "lora_magnitude_vector" in name:
            parameter.mul_(torch.linspace(0.5, 1.6, parameter.numel()).view(parameter.shape))
    return wrapped
