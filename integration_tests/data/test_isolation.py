"""Documents in one row never see each other: same logits and gradients as when run alone.

Models have their default config, ``use_cache=True`` included, under which transformers would let
packed documents attend to each other.
"""

import pytest
import torch

from barqtrain_hf.data import BarqDataCollator, PackedDataset

transformers = pytest.importorskip("transformers")

VOCAB = 64
TOLERANCE = 1e-5  # fp32 rounding in another order gives about 1e-6, the slightest leak above 0.1
SMALL = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    # A window shorter than the documents takes another mask, with its own chance to leak.
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=32),
    # Learned positions: a wrong position id shows even where attention is right.
    "gpt2": lambda: transformers.GPT2Config(
        **SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=4096
    ),
}


def make_model(name, attention):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    assert config.use_cache
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Larger than the initialisation, so that attention is far from uniform and a leak is loud.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()  # no dropout; gradients flow all the same


def make_documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    documents = []
    for length in lengths:
        input_ids = torch.randint(VOCAB, (length,), generator=generator)
        labels = input_ids.clone()
        labels[: length // 4] = -100  # a prompt
        documents.append({"input_ids": input_ids, "labels": labels})
    return documents


def run(model, batch):
    """Logits, and the gradients of the loss summed over targets."""
    model.zero_grad()
    output = model(**batch, num_items_in_batch=torch.tensor(1))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return output.logits[0].detach(), gradients


def run_alone(model, documents):
    """Each document as a batch of its own, in no packed layout; gradients summed."""
    logits, total = [], {}
    for document in documents:
        alone, gradients = run(
            model,
            {"input_ids": document["input_ids"][None], "labels": document["labels"][None]},
        )
        logits.append(alone)
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient
    return logits, total


def worst_difference(packed, alone):
    """Largest error of (logits, gradients), each relative to the largest value of its tensor."""

    def relative(got, wanted):
        return float((got - wanted).abs().max() / wanted.abs().max())

    logits = torch.cat(alone[0])
    errors = [relative(packed[0][: len(logits)], logits)]
    errors += [relative(packed[1][name], wanted) for name, wanted in alone[1].items()]
    return float(torch.tensor(errors).max())  # unlike max(), does not lose a NaN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_40_and_4000_tokens_in_one_row(name, attention):
    model = make_model(name, attention)
    short, long = make_documents(40, 4000)
    (logits_short, logits_long), gradients = run_alone(model, [short, long])

    packed = PackedDataset([short, long], 4096)
    assert len(packed) == 1
    assert packed[0]["seq_lengths"].tolist() == [4000, 40]
    row = run(model, BarqDataCollator(pad_to_multiple_of=64)([packed[0]]))
    assert worst_difference(row, ([logits_long, logits_short], gradients)) < TOLERANCE

    # The other way round, where it is the long document that could see the short one.
    flattened = run(model, BarqDataCollator()([short, long]))
    assert worst_difference(flattened, ([logits_short, logits_long], gradients)) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_many_documents_and_single_tokens(name, attention):
    model = make_model(name, attention)
    documents = make_documents(1, 17, 1, 1, 64, 33)
    batch = BarqDataCollator(pad_to_multiple_of=32)(documents)
    assert worst_difference(run(model, batch), run_alone(model, documents)) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_a_leak_would_be_noticed(name):
    """Positions that run on make one document of two, so the comparison must see them."""
    model = make_model(name, "sdpa")
    documents = make_documents(20, 40)
    batch = BarqDataCollator()(documents)
    batch["position_ids"] = torch.arange(60)[None]
    assert worst_difference(run(model, batch), run_alone(model, documents)) > 0.1
