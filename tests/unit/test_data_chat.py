"""Conversations to tokens: which of them are answers, and what is told of a faulty line."""

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.config.tuning import TooLong
from nemo_minitron.data.chat import encode_conversations, held_out, read_conversations
from nemo_minitron.errors import DataError
from nemo_minitron.megatron.chat_files import ConversationDataset, write_chat_files
from tests.tiny import write_tokenizer

# ChatML, as SmolLM2 and Qwen write it, with spaces where those break lines: the tiny tokenizer knows no line break.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    fast = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = TEMPLATE
    return fast


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def say(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encoded(path: Path, tokenizer):
    return encode_conversations(read_conversations([path]), tokenizer, len(tokenizer))


def test_only_answers_and_the_ends_of_their_turns_are_learned(tmp_path, tokenizer):
    talk = say(
        ("system", "the king"),
        ("user", "the river"),
        ("assistant", "the city"),
        ("user", "the war"),
        ("assistant", "peace"),
    )
    (example,) = encoded(write(tmp_path / "a.jsonl", talk), tokenizer)
    assert tokenizer.decode(example.tokens) == tokenizer.apply_chat_template(talk["messages"], tokenize=False)
    assert tokenizer.decode(example.tokens[example.answer]) == " the city<|im_end|> peace<|im_end|>"


def test_a_pair_is_a_conversation_of_two(tmp_path, tokenizer):
    pair = write(tmp_path / "a.jsonl", {"prompt": "the river", "answer": "the city"})
    talk = write(tmp_path / "b.jsonl", say(("user", "the river"), ("assistant", "the city")))
    (first,), (second,) = encoded(pair, tokenizer), encoded(talk, tokenizer)
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.answer, second.answer)


def test_without_a_template_pairs_are_joined_and_messages_refused(tmp_path):
    plain = write_tokenizer(tmp_path / "plain")
    pair = write(tmp_path / "a.jsonl", {"prompt": "the river ", "answer": "the city"})
    (example,) = encoded(pair, plain)
    assert plain.decode(example.tokens) == "the river the city<|end|>"
    assert plain.decode(example.tokens[example.answer]) == "the city<|end|>"
    talk = write(tmp_path / "b.jsonl", {"prompt": "a", "answer": "b"}, say(("user", "a"), ("assistant", "b")))
    with pytest.raises(DataError, match=r"b\.jsonl:2: messages, but the model's tokenizer has no chat template"):
        encoded(talk, plain)


def test_every_faulty_line_is_named(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        say(("user", "a"), ("assistant", "b")),
        {"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]},
        "{not json",
        {"messages": []},
        say(("user", "a")),
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]},
        [1],
    )
    with pytest.raises(DataError) as caught:
        read_conversations([path])
    told = str(caught.value)
    assert "a.jsonl:2: message 1 needs a role (a text); it has none" in told
    assert "a.jsonl:3: not JSON" in told
    assert "a.jsonl:4: messages is not a list with something in it" in told
    assert "a.jsonl:5: no message of the assistant has any text" in told
    assert "a.jsonl:6: neither messages nor a text under 'answer' (found: prompt)" in told
    assert 'a.jsonl:7: message 1 needs a content (a text); it has ["a"]' in told
    assert "a.jsonl:8: a JSON list" in told
    assert "a.jsonl:1:" not in told


def test_many_faulty_lines_are_counted(tmp_path):
    with pytest.raises(DataError, match="and 15 more"):
        read_conversations([write(tmp_path / "a.jsonl", *([{}] * 25))])


def test_what_a_template_refuses_is_told_with_the_line(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", say(("narrator", "a"), ("assistant", "b")))
    strict = "{{ raise_exception('only users and assistants talk here') }}"
    before, tokenizer.chat_template = tokenizer.chat_template, strict
    try:
        with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template does not take it: only users"):
            encoded(path, tokenizer)
    finally:
        tokenizer.chat_template = before


def test_a_template_that_rewrites_earlier_answers_is_refused(tmp_path, tokenizer):
    last_only = "{% for m in messages %}[{{ m['role'] }}]{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    talk = say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    before, tokenizer.chat_template = tokenizer.chat_template, last_only
    try:
        with pytest.raises(DataError, match="writes message 2 differently once others follow"):
            encoded(write(tmp_path / "a.jsonl", talk), tokenizer)
    finally:
        tokenizer.chat_template = before


def test_the_same_conversations_are_held_out_in_any_order_of_lines(tmp_path):
    lines = [{"prompt": f"question {number % 18}", "answer": "yes"} for number in range(20)]
    there = read_conversations([write(tmp_path / "a.jsonl", *lines)])
    back = read_conversations([write(tmp_path / "b.jsonl", *reversed(lines))])
    chosen, reverse = held_out(there, 0.2, 7), held_out(back, 0.2, 7)
    assert chosen == reverse[::-1]
    assert 4 <= sum(chosen) <= 6
    assert (chosen[0], chosen[1]) == (chosen[18], chosen[19]), "equal conversations stay together"
    assert sum(held_out(there, 0.001, 7)) >= 1
    with pytest.raises(DataError, match="at least two"):
        held_out(there[:1], 0.5, 7)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """Train conversations of 7, 7, 9, 20 and 8 tokens, samples of 16."""
    from nemo_minitron.data.chat import Example

    def example(length: int, first: int) -> Example:
        return Example(np.arange(first, first + length), np.arange(length) >= 3)

    train = [example(length, 50 * number) for number, length in enumerate((7, 7, 9, 20, 8))]
    write_chat_files(
        {"train": train, "validation": train[:2]},
        tmp_path / "chat",
        sequence_length=16,
        too_long=TooLong.CUT,
        vocab_size=300,
        fill=299,
    )
    return tmp_path / "chat"


def test_one_conversation_a_sample_predicts_its_answer_alone(folder):
    item = ConversationDataset(folder, "validation")[1]
    kept = item["loss_mask"].bool()
    assert item["labels"][kept].tolist() == [53, 54, 55, 56]
    assert item["tokens"][kept].tolist() == [52, 53, 54, 55]
    assert item["tokens"][7:].tolist() == [299] * 9
    assert not ConversationDataset(folder, "validation")[None]["loss_mask"].any()


def test_a_long_conversation_is_cut(folder):
    item = ConversationDataset(folder, "train")[3]
    assert item["labels"].tolist() == list(range(151, 167))
    assert item["loss_mask"].sum() == 14


def test_packed_conversations_keep_their_answers_and_never_predict_each_others_beginning(folder):
    rows = ConversationDataset(folder, "train", pack=True)
    first, second, third = (rows[index] for index in range(3))
    assert first["tokens"][:14].tolist() == [*range(7), *range(50, 57)]
    assert first["labels"][first["loss_mask"].bool()].tolist() == [3, 4, 5, 6, 53, 54, 55, 56]
    assert second["labels"][second["loss_mask"].bool()].tolist() == [103, 104, 105, 106, 107, 108]
    assert third["tokens"].tolist() == list(range(150, 166))
    assert len(rows) == 4


def test_packed_conversations_are_kept_apart_unless_told_otherwise(folder):
    first = ConversationDataset(folder, "train", pack=True)[0]
    assert first["position_ids"].tolist() == [*range(7), *range(9)], "what fills up goes with the last one"
    leaking = ConversationDataset(folder, "train", pack=True, reset_attention_mask=False)[0]
    assert leaking["position_ids"].tolist() == list(range(16))
    for name in ("tokens", "labels", "loss_mask"):
        assert first[name].tolist() == leaking[name].tolist()


def test_every_conversation_comes_once_before_any_comes_again(folder):
    samples = ConversationDataset(folder, "train", samples=12, seed=3)
    firsts = [int(samples[index]["tokens"][0]) for index in range(12)]
    everything = [0, 50, 100, 150, 200]
    assert sorted(firsts[:5]) == sorted(firsts[5:10]) == everything
    assert firsts[:5] != firsts[5:10]
    assert firsts == [int(samples[index]["tokens"][0]) for index in range(12)], "at any access"
    other = ConversationDataset(folder, "train", samples=12, seed=4)
    assert firsts != [int(other[index]["tokens"][0]) for index in range(12)]


def test_what_does_not_fit_can_be_left_out(tmp_path):
    from nemo_minitron.data.chat import Example

    long = Example(np.arange(40), np.arange(40) >= 30)
    short = Example(np.arange(5), np.arange(5) >= 3)
    info = write_chat_files(
        {"train": [long, short], "validation": [short]},
        tmp_path / "chat",
        sequence_length=16,
        too_long=TooLong.CUT,
        vocab_size=300,
        fill=299,
    )
    assert info["splits"]["train"]["left_out"] == 1, "its answer lies behind the cut"
    with pytest.raises(DataError, match="no train conversation fits 16 tokens"):
        write_chat_files(
            {"train": [long], "validation": [short]},
            tmp_path / "other",
            sequence_length=16,
            too_long=TooLong.LEAVE_OUT,
            vocab_size=300,
            fill=299,
        )
