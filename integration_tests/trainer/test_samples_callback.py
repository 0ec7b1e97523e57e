"""Samples from fixed prompts: what is generated, when, where it goes, and that training does not notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from small_tokenizers import small_tokenizer
from test_parity import Rows, arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from barqtrain_hf import BarqSamplesCallback, BarqTrainer, patch_model, unpatch_model
from barqtrain_hf.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from barqtrain_hf.samples import Sampling, encode, generate

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "the quick dog"}]
TEXTS = ["The quick brown fox", "a", CHAT]


def tokenizer() -> Any:
    made = small_tokenizer()
    made.chat_template = TEMPLATE
    return made


def model(family: str = "llama", **overrides: Any) -> Any:
    return tiny_model(family, vocab_size=len(tokenizer()), **overrides)


def train(
    path: Path,
    callback: BarqSamplesCallback | None,
    kind: type[Trainer] = Trainer,
    trained: Any = None,
    others: Any = (),
    **options: Any,
) -> Any:
    trainer = kind(
        model() if trained is None else trained,
        TrainingArguments(**arguments(path, **options)),
        train_dataset=Rows(40, seed=1),
        eval_dataset=Rows(7, seed=2),
        processing_class=tokenizer(),
        callbacks=[*others, *([] if callback is None else [callback])],
    )
    trainer.train()
    return trainer


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("kind", [Trainer, BarqTrainer])
def test_training_is_the_same_bit_for_bit(kind: type[Trainer], tmp_path: Path) -> None:
    # Dropout and the order of rows come from the generator that samples are drawn from.
    options = {**EVALUATED, "train_sampling_strategy": "random", "gradient_checkpointing": True}
    runs = []
    for callback in (None, BarqSamplesCallback(TEXTS, max_new_tokens=5, show=True)):
        trainer = train(tmp_path, callback, kind, model("llama", attention_dropout=0.3), **options)
        losses = [e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history]
        runs.append((losses, [p.detach() for p in trainer.model.parameters()]))
        assert not trainer.model.config.use_cache
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_when_it_generates_and_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def printed(callback: BarqSamplesCallback, **options: Any) -> list[str]:
        train(tmp_path, callback, **options)
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[-1] for line in lines if "samples at step" in line]

    def callback(**options: Any) -> BarqSamplesCallback:
        return BarqSamplesCallback(["[bold]the[/bold]", CHAT], max_new_tokens=3, **options)

    assert printed(callback(show=True), **EVALUATED) == ["2", "4"]
    assert printed(callback(show=True)) == ["4"]  # when training ends
    # Several evaluations in one step.
    twice = {"eval_strategy": "epoch", "max_steps": 4, "eval_on_start": True}
    assert printed(callback(show=True), **twice) == ["0", "4"]
    # No logger is on.
    assert printed(callback(), **EVALUATED) == printed(callback(show=False), **EVALUATED) == []
    train(tmp_path, callback(show=True))
    out = capsys.readouterr().out
    assert "[bold]the[/bold]" in out and "user" in out and "assistant" in out


def test_evaluation_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        model(),
        TrainingArguments(**arguments(tmp_path)),
        eval_dataset=Rows(7, seed=2),
        processing_class=tokenizer(),
        callbacks=[BarqSamplesCallback(TEXTS, max_new_tokens=3, show=True)],
    )
    trainer.model.train()
    trainer.evaluate()
    trainer.evaluate()  # nothing has changed since
    assert capsys.readouterr().out.count("samples at step 0") == 1


def samples(made: Any, batch_size: int = 8, **options: Any) -> list[str]:
    reader = tokenizer()
    sampling = Sampling(**{"max_new_tokens": 6, **options})
    return generate(made, reader, encode(TEXTS, reader), sampling, batch_size)


def test_padding_on_the_left_changes_nothing() -> None:
    made = model()
    reader = tokenizer()
    alone = []
    for prompt in encode(TEXTS, reader):
        ids = torch.tensor([prompt.ids])
        out = made.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        alone.append(reader.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 2, 8):
        assert samples(made, batch_size, do_sample=False) == alone
    assert encode(TEXTS, reader)[2].text == "<s>user\nthe quick dog</s>\n<s>assistant\n"


def test_greedy_and_drawn() -> None:
    made = model()
    greedy = samples(made, do_sample=False)
    assert samples(made, temperature=0) == samples(made, top_k=1) == greedy
    assert samples(made, top_p=1e-9) == samples(made, temperature=1e-4) == greedy
    drawn = samples(made, temperature=5.0)
    assert drawn != greedy and drawn == samples(made, temperature=5.0)
    assert drawn != samples(made, temperature=5.0, seed=1)
    # What the model's own generation config says does not count.
    made.generation_config.update(do_sample=True, temperature=0.01, top_k=1, num_beams=2)
    assert samples(made, temperature=5.0) == drawn
    assert made.generation_config.num_beams == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_patched_models_write_the_same(family: str) -> None:
    made = model(family)
    stock = samples(made, do_sample=False)
    patch_model(made)
    assert samples(made, do_sample=False) == stock
    unpatch_model(made)


def test_peft_and_every_mode_stays(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    made = peft.get_peft_model(model(), config)
    made.train()
    frozen = made.get_base_model().model.norm
    frozen.eval()
    before = torch.get_rng_state()
    assert len(samples(made)) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert made.training and not frozen.training
    # Also if something goes wrong.
    made.generate = None
    with pytest.raises(TypeError):
        samples(made)
    assert made.training and not frozen.training


def test_without_a_pad_token_and_with_several_ends() -> None:
    made, reader = model(), tokenizer()
    reader.pad_token = None
    made.generation_config.pad_token_id = None
    first = generate(made, reader, encode(TEXTS, reader), Sampling(do_sample=False), 8)
    # The first token that it writes after the second prompt ends the sample from now on.
    ids = torch.tensor([encode(TEXTS, reader)[1].ids])
    made.generation_config.eos_token_id = [2, int(made(ids).logits[0, -1].argmax())]
    second = generate(made, reader, encode(TEXTS, reader), Sampling(do_sample=False), 8)
    assert len(second[1]) < len(first[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts=\[\] is empty: pass at least one"),
        ({"prompts": "once"}, r"prompts='once' must be a list .*: pass \['once'\]"),
        ({"processing_class": "gpt2"}, r"processing_class is 'gpt2', a name: pass AutoTokenizer"),
        ({"prompts": [3]}, r"prompts\[0\]=3 must be a text, or a list of messages"),
        ({"prompts": ["a", [{"text": "b"}]]}, r"prompts\[1\]=.* must be a text"),
        ({"prompts": ["a", []]}, r"prompts\[1\]=\[\] has no message"),
        ({"temperature": -0.5}, r"temperature=-0.5 must be 0 or more: pass 1.0"),
        ({"temperature": math.nan}, "temperature=nan must be 0 or more"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1: pass None"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1: pass a larger one or None for all"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be an integer"),
        ({"do_sample": "no"}, "do_sample='no' must be True or False"),
        ({"do_sample": False, "top_p": 0.9}, "so top_p=0.9 has no effect: drop it, or pass"),
        ({"do_sample": False, "temperature": 0.7}, "so temperature=0.7 has no effect"),
    ],
)
def test_what_cannot_be_right(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        BarqSamplesCallback(**{"prompts": ["a"], **arguments})


def test_tokenizers_that_cannot_read_the_prompts(tmp_path: Path) -> None:
    plain = small_tokenizer()
    with pytest.raises(
        ArgumentError, match=r"prompts\[1\] is a chat, .* has no chat_template: set"
    ):
        BarqSamplesCallback(["a", CHAT], plain)
    # Of the Trainer's own it is known when training begins, before anything is trained.
    args = TrainingArguments(**arguments(tmp_path))
    for reader, prompt, message in (
        (None, "a", "has no tokenizer to read prompts with: pass processing_class="),
        (plain, CHAT, "has no chat_template"),
        (small_tokenizer("word_piece"), "", r"prompts\[0\]='' has no tokens"),
    ):
        if prompt == "":
            reader.backend_tokenizer.post_processor = None
        trainer = Trainer(
            model(),
            args,
            train_dataset=Rows(8, seed=1),
            processing_class=reader,
            callbacks=[BarqSamplesCallback([prompt], show=True)],
        )
        with pytest.raises(ArgumentError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_models_that_cannot_be_sampled_from(tmp_path: Path) -> None:
    class Parallelism:
        non_data_parallel_size = 2

    args = TrainingArguments(**arguments(tmp_path))
    callback = BarqSamplesCallback(["a"], tokenizer(), show=True)

    def refusal(made: Any) -> str:
        with pytest.raises(UnsupportedError) as error:
            callback.on_train_begin(args, None, None, model=made)  # type: ignore[arg-type]
        return str(error.value)

    made = model()
    made.lm_head.weight.ds_id = 0
    assert "ZeRO-3 splits the weights" in refusal(made) and "train with DDP" in refusal(made)
    args.parallelism_config = Parallelism()
    assert "context or sequence parallelism" in refusal(model())
    assert "Linear has no generate()" in refusal(torch.nn.Linear(2, 2))


def test_only_the_main_process_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Second(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            state.is_world_process_zero = False

    callback = BarqSamplesCallback(["a"], max_new_tokens=3, show=True)
    train(tmp_path, callback, others=[Second()], **EVALUATED)
    assert "samples at step" not in capsys.readouterr().out
