"""Trains a plain language model on instructions with DoRA, LoRA, only magnitudes, or its full weights.

deepspeed tasks/commonsense.py --config configs/commonsense/<run>.yaml [--variant NAME] [--section.key value ...]

The paper's commonsense reasoning runs are in configs/commonsense; your own data has one question and its output
per sample, in any format of docs/data.md.
"""

from functools import partial

from dora_vl.training.train_command import train_script

main = partial(train_script, "commonsense", __doc__)

if __name__ == "__main__":
    main()
