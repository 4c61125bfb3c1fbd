"""A task of your own: `python train.py --task examples/polite.py`, then `eval.py`.

Being polite counts twice as much as being short.
"""

from rewards import Channel, Example, Task

THINGS = ["a chair", "a ticket", "the bill", "some water", "a map", "the time", "an apple", "help"]


def polite(prompts, responses, references):
    # One "please" satisfies. Were more of them paid, `short` would be given up for them.
    return [min(1, response.lower().count("please")) for response in responses]


def short(prompts, responses, references):
    return [float(len(response) < 100) for response in responses]


def prompts(n_train, n_test):
    texts = [f"Write one sentence that asks for {thing}." for thing in THINGS]
    examples = [Example([{"role": "user", "content": text}]) for text in texts]
    return examples[2:][:n_train], examples[:2][:n_test]


def task(config):
    return Task(prompts, [Channel("polite", polite, weight=2), Channel("short", short)])
