"""Asks a model about videos of your own.

python tasks/video_qa.py --adapter runs/demo-video/adapter --video clip.mp4 --question "which color comes first?" \\
    --choice red --choice blue

The model sees `--frames` frames: as a video, or as pictures where it takes none, which is said. A VL-BART sees
the frames that it was trained to see, as features that are computed on the way. `--start` and `--end` name a part of
the video, `--subtitle` says what is said in it. A model of TVQA, How2QA or TVC needs a part: it sees the whole video
and reads in its text which part is meant.
Without --question it asks for questions until an empty line.
"""

from functools import partial

from dora_vl.evaluation.ask_command import add_video_options, ask_about_videos, ask_script

main = partial(ask_script, __doc__, partial(add_video_options, required=True), ask_about_videos)

if __name__ == "__main__":
    main()
