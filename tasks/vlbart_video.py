"""VL-BART on videos: TVQA, How2QA, TVC and YC2C of VALUE, one of them or mixed; your own clips.

deepspeed tasks/vlbart_video.py --config configs/vlbart/video.yaml --variant dora [--section.key value ...]

Which tasks are trained is what `data.train` names.
"""

from functools import partial

from dora_vl.training.train_command import train_script

main = partial(train_script, "vlbart", __doc__)

if __name__ == "__main__":
    main()
