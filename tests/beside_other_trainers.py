"""What another trainer's environment must run: torch, safetensors, transformers, PEFT, and this package without others.

    python tests/beside_other_trainers.py FOLDER

Trains a tiny Llama by `apply_dora` and by PEFT with `accelerate_peft`; saves, merges, and reloads in a new process.
"""

import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl import DoRAConfig, accelerate_peft, apply_dora, load_adapter, merge_dora, save_adapter, trained_parts

TOKENS = torch.arange(12).view(2, 6)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def trained(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The logits after five steps, in which the loss fell."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return logits(model)


def own(folder: Path) -> None:
    """Our layers: trained, saved, merged; their logits for the new process."""
    model = base()
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj"), rank=4, alpha=12.0, rank_pattern={"*.0.*": 2}))
    expected = trained(model, [p for part in trained_parts(model) for p in part.parameters.values()])
    save_adapter(model, folder / "own")
    merge_dora(model)
    torch.testing.assert_close(logits(model), expected)
    torch.save(expected, folder / "own.pt")


def of_peft(folder: Path) -> None:
    """PEFT's model on this core, saved by PEFT."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = get_peft_model(base(), config)
    done = accelerate_peft(model)
    assert len(done.layers) == 4
    assert not done.left
    expected = trained(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder / "peft")
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)
    torch.save(expected, folder / "peft.pt")


def again(folder: Path) -> None:
    """Both folders by `load_adapter`, and PEFT's and ours by PEFT where it takes a folder of several ranks."""
    for name in ("own", "peft"):
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        model = base()
        load_adapter(model, folder / name)
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), str(folder / name))), expected)


if __name__ == "__main__":
    to = Path(sys.argv[1])
    if "--again" in sys.argv:
        again(to)
    else:
        own(to)
        of_peft(to)
        subprocess.run([sys.executable, __file__, str(to), "--again"], check=True)
