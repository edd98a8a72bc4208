"""Neither `import dora_vl` nor `apply_dora` changes anything of the process or of other packages.

What remains is torch's own: an operation of the namespace `dora_vl`, and a post-hook of optimizer steps, registered
with the first adapted layer.
"""

from __future__ import annotations

import subprocess
import sys

LOOKS = """
import os, signal, sys, threading, types
import torch, peft, transformers
from torch import nn
from torch.optim import optimizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

SPACES = (torch, torch.nn, torch.nn.functional, torch.Tensor, nn.Module, nn.Linear, nn.Parameter, torch.optim.Optimizer,
          torch.autograd, transformers, transformers.PreTrainedModel, peft, peft.PeftModel)
MODULE_HOOKS = [name for name in vars(nn.modules.module) if name.startswith('_global')]


def kept(space):
    return {name: value for name, value in vars(space).items() if not isinstance(value, types.ModuleType)}


def process():
    return {
        'finders': (list(sys.meta_path), list(sys.path), list(sys.path_hooks)),
        'process': (sys.excepthook, dict(os.environ), [signal.getsignal(n) for n in range(1, 32)]),
        'threads': threading.active_count(),
        'tables': (dict(CONFIG_MAPPING._extra_content), dict(MODEL_MAPPING._extra_content)),
        'torch': (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        'module hooks': {name: list(getattr(nn.modules.module, name) or ()) for name in MODULE_HOOKS},
        'optimizer hooks before a step': list(optimizer._global_optimizer_pre_hooks),
        **{space.__name__: kept(space) for space in SPACES},
    }


def changed(before, now):
    return sorted(name for name in before if before[name] != now[name])


before, steps = process(), len(optimizer._global_optimizer_post_hooks)
import dora_vl
assert changed(before, process()) == [], changed(before, process())
assert len(optimizer._global_optimizer_post_hooks) == steps
from dora_vl.core import DoRAConfig, apply_dora
import dora_vl.adapters.peft_model
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
apply_dora(model, DoRAConfig(targets=('*',)))
model(torch.randn(2, 6)).sum().backward()
assert changed(before, process()) == [], changed(before, process())
assert len(optimizer._global_optimizer_post_hooks) == steps + 1
apply_dora(nn.Sequential(nn.Linear(6, 5)), DoRAConfig(targets=('*',)))
assert len(optimizer._global_optimizer_post_hooks) == steps + 1
"""


def test_nothing_of_the_process_changes() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
