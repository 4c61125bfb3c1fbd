"""A task of your own: `python train.py --task examples/polite.py`, then `eval.py`. Being polite counts twice."""

from rewards import Channel, Example, Task

THINGS = (
    "a chair",
    "a ticket to Oslo",
    "the bill",
    "some water",
    "a map",
    "the time",
    "an apple",
    "a blanket",
)
CHATS = [
    Example([{"role": "user", "content": f"Write one sentence that asks for {thing}."}])
    for thing in THINGS
]


def polite(prompts, responses, references):
    return [float("please" in response.lower()) for response in responses]


def short(prompts, responses, references):
    return [float(len(response) < 100) for response in responses]


def task(options):
    return Task(
        lambda n_train, n_test: (CHATS[2:][:n_train], CHATS[:2][:n_test]),
        [Channel("polite", polite, weight=2.0), Channel("short", short)],
    )
