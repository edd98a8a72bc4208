"""Asks a model about pictures of your own.

python tasks/image_qa.py --adapter runs/demo/adapter --image cat.png --question "what color is the shape?"
python tasks/image_qa.py --adapter runs/demo/adapter --image my/*.jpg --question "what color is the shape?"

Every question is put to every picture, each on its own; `--together` puts all pictures into one prompt, and
`--conversation` lets later questions see the earlier ones with their answers. Without --question it asks for
questions until an empty line. The adapter is any run's, or PEFT's; --model asks a model without one. What a VL-BART
reads of a picture is computed on the way.
"""

from functools import partial

from dora_vl.evaluation.ask_command import add_picture_options, ask_about_pictures, ask_script

main = partial(ask_script, __doc__, add_picture_options, ask_about_pictures)

if __name__ == "__main__":
    main()
