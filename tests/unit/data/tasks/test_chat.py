import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmos_cli.data.sources.records import BadRecord
from llmos_cli.data.tasks.chat import CHATML, CHATML_TOKENS, ChatTemplate, encode_chats, load_template
from llmos_cli.errors import UsageError

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
LAST_ONLY = (  # says less of a turn once another follows, as templates do that drop earlier thoughts
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAY = [
    {"role": "system", "content": "You are Lear."},
    {"role": "user", "content": "Nothing, my lord."},
    {"role": "assistant", "content": "Nothing?"},
    {"role": "user", "content": "Nothing."},
    {"role": "assistant", "content": "Nothing will come of nothing: speak again."},
]


def said(template: ChatTemplate, messages: Any) -> list[str]:
    rendered = template.render(messages)
    return [rendered.text[start:stop] for start, stop in rendered.learned]


def files(template: object, **config: object) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"chat_template": template, **config}).encode()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["Nothing will come of nothing"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(control, special=True) for control in CHATML_TOKENS])
    return made


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_the_assistants_turns_are_learned_with_their_end_and_nothing_else(source: str) -> None:
    template = ChatTemplate(source, {}, CHATML_TOKENS)
    assert said(template, PLAY) == ["Nothing?<|im_end|>", "Nothing will come of nothing: speak again.<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    assert said(ChatTemplate(CHATML, {}, CHATML_TOKENS), PLAY[2:3])[0].endswith("Nothing?<|im_end|>")


def test_ids_and_loss_are_what_transformers_gives_for_a_template_that_marks(tokenizer: Tokenizer) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=MARKED)
    theirs = fast.apply_chat_template(PLAY, return_dict=True, return_assistant_tokens_mask=True)
    for source in (MARKED, CHATML):
        ((ids, loss),) = encode_chats(tokenizer, [ChatTemplate(source, {}, CHATML_TOKENS).render(PLAY)])
        assert ids.tolist() == theirs["input_ids"]
        assert loss.tolist() == theirs["assistant_masks"]
    assert tokenizer.token_to_id("<|im_end|>") in ids[loss == 1]
    assert tokenizer.token_to_id("<|im_start|>") not in ids[loss == 1]


def test_text_beyond_ascii_keeps_its_loss_in_place(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "你好 \U0001f600"}, {"role": "assistant", "content": "很好 \U0001f600"}]
    ((ids, loss),) = encode_chats(tokenizer, [ChatTemplate(CHATML, {}, CHATML_TOKENS).render(messages)])
    assert (
        tokenizer.decode(ids[np.flatnonzero(loss)].tolist(), skip_special_tokens=False) == "很好 \U0001f600<|im_end|>"
    )


def test_a_template_that_renders_a_turn_otherwise_later_is_refused() -> None:
    with pytest.raises(UsageError, match="chat template of tok cannot be used") as caught:
        load_template(files(LAST_ONLY), (), "tok")
    assert "generation" in (caught.value.hint or "")


def test_a_template_that_writes_the_day_is_refused() -> None:
    with pytest.raises(UsageError, match="the day it is used"):
        load_template(files("{{ strftime_now('%d %b') }}" + CHATML), CHATML_TOKENS, "tok")


def test_the_default_of_several_templates_is_taken_and_special_tokens_have_their_names() -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}" + CHATML}]
    template = load_template(files(several, bos_token={"content": "<s>"}), CHATML_TOKENS, "tok")
    assert template.render(PLAY).text.startswith("<s><|im_start|>system")


def test_a_template_in_a_file_of_its_own_comes_first() -> None:
    held = files("old") | {"chat_template.jinja": CHATML.encode()}
    assert load_template(held, CHATML_TOKENS, "tok").source == CHATML


def test_no_template_is_an_error_that_names_the_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer of tok has no chat template"):
        load_template({}, (), "tok")


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("hello", "not a list of messages"),
        ([], "not a list of messages"),
        ([{"content": "x"}], r"without a role \(turn 1\)"),
        ([{"role": "user", "content": 3}], r"without text as its content \(turn 1\)"),
        (PLAY[:2], "no turn of the assistant"),
        ([*PLAY, {"role": "user", "content": "<|im_end|>"}], "control token '<|im_end|>' in the text of turn 6"),
    ],
)
def test_what_is_no_conversation_is_a_bad_record(messages: object, why: str) -> None:
    with pytest.raises(BadRecord, match=why.replace("|", r"\|")):
        ChatTemplate(CHATML, {}, CHATML_TOKENS).render(messages)
