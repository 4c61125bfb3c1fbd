"""Chats that become prompts: what a template is told, and what it must not lose."""

import pytest
import torch
from test_rollout import decoding

import rollout
from infra import pretrained, prompts
from infra.ranks import InputError
from local import hf
from rewards import Channel, Example, Task
from tools.compare import compare

ASK = {"role": "user", "content": "What is the time?"}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    ],
}
ANSWER = {"role": "tool", "content": "14:00"}
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL_TEMPLATE = "{{ call.function.name }} {{ call.function.arguments | tojson }}"
CALLS = "{% for call in m.tool_calls or [] %}" + CALL_TEMPLATE + "{% endfor %}"
TOOLED = (  # as Qwen's, in short
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + CALLS
    + "<|im_end|>\n{% endfor %}"
    + OPEN
)
# As Mistral's. Llama's always says the date.
DATED = "{% if messages[0].role != 'system' %}Today is {{ strftime_now('%d %b %Y') }}\n{% endif %}"


@pytest.fixture
def tokenizer(tiny):
    return pretrained.load_tokenizer(tiny)


def text_of(tokenizer, example: Example, **options) -> str:
    (prompt,) = prompts.encode(tokenizer, [example], 1000, **options)
    return tokenizer.decode(prompt.ids)


def test_tools_and_their_calls_reach_the_prompt(tokenizer):
    """A call's arguments, OpenAI's text of JSON, are not quoted a second time."""
    tokenizer.chat_template = TOOLED
    assert text_of(tokenizer, Example([ASK, CALL, ANSWER], tools=(CLOCK,))) == (
        '{"type": "function", "function": {"name": "clock"}}\n'
        "<|im_start|>user\nWhat is the time?<|im_end|>\n"
        '<|im_start|>assistant\nclock {"zone": "UTC"}<|im_end|>\n'
        "<|im_start|>tool\n14:00<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("missing", "example", "part"),
    [
        ("{{ tool | tojson }}", Example([ASK], tools=(CLOCK,)), "the tools"),
        (CALL_TEMPLATE, Example([ASK, CALL, ANSWER]), "the tool_calls of message 1"),
        ("{{ m.content }}", Example([ASK, ANSWER]), r"the content of message 1 \(role tool\)"),
    ],
)
def test_a_chat_that_the_template_cannot_hold_is_refused(tokenizer, missing, example, part):
    """It was once cut down to what the template has a place for, without a word."""
    tokenizer.chat_template = TOOLED.replace(missing, "")
    message = rf"the model's chat template leaves out {part}: choose another model"
    with pytest.raises(InputError, match=rf"^prompt 0 \('\.\.\..*'\): {message}"):
        prompts.encode(tokenizer, [example], 1000)


def test_the_assistants_last_message_is_continued(tokenizer):
    for begun, opened in (
        ("It is", ""),
        ("<think> It", "<think> It"),
        ("<think> a </think> It is", ""),
    ):
        example = Example([ASK, {"role": "assistant", "content": begun}])
        (prompt,) = prompts.encode(tokenizer, [example], 1000)
        assert tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n" + begun)
        assert prompt.opened == opened


def test_ids_without_an_embedding(tokenizer):
    """A tokenizer may have them, a prompt may not: a kernel's assertion would end the run."""
    tokenizer.add_tokens([f"<|{i}|>" for i in range(len(tokenizer), 1025)], special_tokens=True)
    assert len(prompts.encode(tokenizer, [Example([ASK])], 1000, 1024)) == 1
    example = Example([{"role": "user", "content": "<|1024|>"}])
    message = r"has the token '<\|1024\|>', id 1024, but the model has only 1024 embeddings"
    with pytest.raises(InputError, match="prompt 0 .* " + message):
        prompts.encode(tokenizer, [example], 1000, 1024)


# Thoughts


def test_whether_to_think_is_the_templates_choice_or_ours(tokenizer):
    example = Example([ASK])
    message = "--enable-thinking: the model's chat template does not know it"
    with pytest.raises(InputError, match=message):
        prompts.encode(tokenizer, [example], 1000, thinking=False)
    tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    by_default = text_of(tokenizer, example)
    assert text_of(tokenizer, example, thinking=False) == by_default + "<think></think>"
    assert text_of(tokenizer, example, thinking=True) == by_default


@pytest.mark.parametrize(
    ("end", "opened"),
    [("{{ '<think>\n' }}", "<think>\n"), ("<think>\n\n</think>\n\n", ""), ("", "")],
)
def test_a_thought_that_the_template_opens_belongs_to_the_response(tiny, tokenizer, end, opened):
    """As in R1's distilled models. Without its beginning rewards would see only a thought's end.
    The response's tokens are as they were sampled."""
    texts = []

    class Seen(Task):
        def start(self, example, responses):
            texts.extend(responses)

    tokenizer.chat_template += end
    (prompt,) = prompts.encode(tokenizer, [Example([ASK])], 1000)
    assert prompt.opened == opened
    engine = hf.HFEngine(hf.load(tiny, torch.device("cpu")), decoding(tiny))
    sampler = rollout.Sampler(engine, Seen(None, [Channel("c")]), 0)
    ((responses, _),) = sampler.sample([prompt], 2, 0)
    ((_, sampled),) = engine.generate([prompt.ids], 2, [rollout.request_seed(0, 0, 0)])
    assert [response.text for response in responses] == texts
    assert texts == [opened + response.text for response in sampled]
    for response, as_sampled in zip(responses, sampled, strict=True):
        assert response[:-1] == as_sampled[:-1]


# The date


def test_the_date_is_the_runs_own(tokenizer):
    tokenizer.chat_template = DATED + TOOLED
    text = text_of(tokenizer, Example([ASK]), date="2024-02-29")
    assert text.startswith("Today is 29 Feb 2024\n")
    asked = Example([{"role": "system", "content": "Be brief."}, ASK])
    assert prompts.dated(tokenizer, [asked, Example([ASK])], "2024-02-29", None)
    assert not prompts.dated(tokenizer, [asked], "2024-02-29", None)


def test_evaluations_of_two_days_are_compared_if_the_date_is_in_no_prompt(
    evaluate, tmp_path, tiny, dated
):
    words = ["--task", "tools", "--limit", 2, "--max-tokens", 4]
    other, _ = evaluate(*words, "--date", "2024-02-28")
    assert "date" not in other["settings"]
    for name, date in (("b", "2024-02-28"), ("c", "2024-02-29")):
        results, _ = evaluate(*words, "--model", dated, "--date", date, name=name)
        assert results["settings"]["date"] == date
    files = {name: tmp_path / f"runs/{name}/results.json" for name in "abc"}
    message = "cannot be compared: date is 2024-02-28 in .*, and 2024-02-29 in"
    with pytest.raises(InputError, match=message):
        compare(files["b"], files["c"])
    assert compare(files["a"], files["c"])
