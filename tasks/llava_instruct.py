"""Trains a LLaVA, or any vision-language model of transformers, on visual instructions with DoRA, LoRA, only
magnitudes, or its full weights.

deepspeed tasks/llava_instruct.py --config configs/llava/<run>.yaml [--variant NAME] [--section.key value ...]
"""

from functools import partial

from dora_vl.training.train_command import train_script

main = partial(train_script, "llava", __doc__)

if __name__ == "__main__":
    main()
