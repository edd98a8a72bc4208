"""Converts records to LLaVA's training JSON: asked as by `dora-vl evaluate`, with the first answer as the reply.

A benchmark whose prompt asks for an option's letter (ScienceQA, MMBench, SEED) gets the right choice's letter.

    dora-vl prepare nlvr --from downloads/nlvr --to records --set shares=train:0.8,validation:0.1,test:0.1
    python -m data_prep.llava_conversations --records records/nlvr/train.jsonl --benchmark nlvr --to nlvr_train.jsonl

So a LLaVA can be trained on any set that `dora-vl prepare` knows, with the benchmark's own wording. The order is
shuffled by the seed, because publishers' files hold a picture's items side by side. Records that carry no answer (with
choices: do not say which is right), or a video, are counted and named at the end, not written.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from dora_vl.data.example import JSON, Example, iterate_examples, right_choice
from dora_vl.data.turns import SPEAKERS
from dora_vl.errors import BadSample, UserError, exit_on_user_error
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores.benchmark import Benchmark, letters, prompt_turns
from dora_vl.files import write_json_lines


def conversation_of(example: Example, benchmark: Benchmark) -> dict[str, JSON]:
    """Converts one record to LLaVA's form."""
    if example.videos:
        raise BadSample(example.id, "it is about a video; LLaVA's training JSON holds pictures")
    turns = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in prompt_turns(example, benchmark.prompt)]
    if benchmark.chooses and not example.turns:  # a whole conversation is asked and answered as it is
        correct, alphabet = right_choice(example), letters(example)
        if len(example.choices) > len(alphabet):
            raise BadSample(example.id, f"it has {len(example.choices)} choices; there are letters for {len(alphabet)}")
        reply = alphabet[correct]
    else:  # the last turn of a conversation, or the first answer to a question
        texts = [turn.text for turn in example.turns[-1:] if turn.role == "assistant"]
        reply = next(iter(texts if example.turns else [answer.text for answer in example.answers]), "")
        if not reply.strip():
            raise BadSample(example.id, "it has no answer to train on")
    answer = {"from": SPEAKERS["assistant"], "value": reply}
    record: dict[str, JSON] = {"id": example.id, "conversations": [*turns, answer]}
    if pictures := list(example.images):
        record["image"] = pictures if len(pictures) > 1 else pictures[0]
    return record


@exit_on_user_error
def main() -> None:
    """Reads the options, writes the file and reports what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, metavar="FILE", help="what `dora-vl prepare` wrote")
    parser.add_argument("--benchmark", choices=sorted(BENCHMARKS), required=True, help="whose wording is used")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="LLaVA's JSON lines")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    options = parser.parse_args()
    conversations: list[dict[str, JSON]] = []
    dropped: list[BadSample] = []
    for example in iterate_examples(options.records):
        try:
            conversations.append(conversation_of(example, BENCHMARKS[options.benchmark]))
        except BadSample as problem:
            dropped.append(problem)
    random.Random(options.seed).shuffle(conversations)
    if not conversations:
        raise UserError(f"{options.records}: none of its {len(dropped)} records can be trained on; {dropped[0]}")
    write_json_lines(options.to, conversations)
    print(f"{options.to}: {len(conversations):,} conversations, {len(dropped):,} records left out")
    for problem in dropped[:5]:
        print(f"  left out: {problem}")


if __name__ == "__main__":
    main()
