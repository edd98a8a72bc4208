"""VL-BART on pictures: VQAv2, GQA, NLVR2 and COCO captions, one of them or mixed; NLVR; your own short answers.

deepspeed tasks/vlbart_image.py --config configs/vlbart/image.yaml --variant dora [--section.key value ...]

Which tasks are trained is what `data.train` names.
"""

from functools import partial

from dora_vl.training.train_command import train_script

main = partial(train_script, "vlbart", __doc__)

if __name__ == "__main__":
    main()
