"""The promises P1, P3, P4, P5, P6 on tiny random models of every architecture; P2 is in test_stock.py."""

from __future__ import annotations

import copy
import threading
import time

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, TEXTS, make_tokenizer
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from ubmoe_st import UBMoE

PROMPTS = ["the cat sits", "a red bird sleeps in the old tree and", "dog"]


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request, base_of, checkpoint_of):
    return base_of(request.param), checkpoint_of(request.param)


def load(path, **kwargs):
    """AutoTokenizer puts its own class over the tokenizer of some model types; the test's one is wanted."""
    model = UBMoE(str(path), **kwargs)
    model[0].processor = make_tokenizer()
    return model


def padded(prompts=PROMPTS):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p1_logits_are_bit_identical_to_the_base(pair, dtype):
    base, checkpoint = pair
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    model = load(checkpoint, model_kwargs={"dtype": dtype})
    for prompts in (PROMPTS[2:], PROMPTS[:1], PROMPTS):  # one token, one row, a padded batch
        inputs = padded(prompts)
        with torch.inference_mode():
            expected = reference(**inputs).logits
            assert torch.equal(model.generator(**inputs).logits, expected)
            # Not vacuous: the other experts do change the logits.
            assert not torch.equal(model.generator_for("bi")(**inputs).logits, expected)


def test_p1_freezing_the_encoder_changes_no_kernel_of_the_generator(pair):
    """torch multiplies in another order by a flag of the weight, and a tied head is the encoder's."""
    base, checkpoint = pair
    reference = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "logits_to_keep": 1}
    models = [load(checkpoint), load(checkpoint, low_memory=True)]
    models += [copy.deepcopy(model.requires_grad_(False)) for model in models]
    with torch.no_grad():
        expected = reference(**inputs).logits
        assert all(torch.equal(model.generator(**inputs).logits, expected) for model in models)
        both = [load(checkpoint).generator.requires_grad_(False), reference.requires_grad_(False)]
        assert torch.equal(*(lm(**inputs).logits for lm in both))


@pytest.mark.parametrize("low_memory", [False, True])
def test_p1_shared_memory_changes_no_kernel_of_the_generator(checkpoint, low_memory):
    """Encoding in several processes moves all tensors there; where in a cache line they start decides on last bits."""
    model = UBMoE(str(checkpoint), low_memory=low_memory)
    starts = {name: tensor.data_ptr() % 64 for name, tensor in model.generator.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.generator.named_parameters()}
    assert any(starts.values())
    model.encode(["the cat"], device=["cpu"])
    shared = dict(model.generator.named_parameters())
    assert all(tensor.is_shared() for tensor in shared.values())
    assert {name: tensor.data_ptr() % 64 for name, tensor in shared.items()} == starts
    assert all(torch.equal(tensor, values[name]) for name, tensor in shared.items())
    assert not any(tensor.is_inference() for tensor in shared.values())


def test_p1_the_last_logits_of_a_padded_batch_are_bit_identical(pair):
    """What `generate` asks for: rows that do not lie side by side, whose product torch folds by the weight's flag."""
    base, checkpoint = pair
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    generator = load(checkpoint).generator
    inputs = padded(PROMPTS[:2])
    assert not inputs["attention_mask"].all()
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            expected = reference(**inputs, logits_to_keep=1).logits
            assert torch.equal(generator(**inputs, logits_to_keep=1).logits, expected)
    # Whatever else the kernels of torch look at is that of the base, too.
    found = dict(generator.named_parameters())
    for name, parameter in reference.named_parameters():
        for attribute in ("requires_grad", "dtype", "is_contiguous", "stride", "is_inference"):
            ours, theirs = getattr(found[name], attribute), getattr(parameter, attribute)
            assert (ours() if callable(ours) else ours) == (theirs() if callable(theirs) else theirs), (name, attribute)
        assert found[name].data_ptr() % 64 == parameter.data_ptr() % 64, name


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("sample", [True, False])
def test_p1_generate_gives_the_tokens_of_the_base(pair, cache, sample):
    base, checkpoint = pair
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    model = load(checkpoint)
    inputs = padded()
    options = {"max_new_tokens": 8, "use_cache": cache, "do_sample": sample, "pad_token_id": 0}
    torch.manual_seed(3)
    expected = reference.generate(**inputs, **options)
    torch.manual_seed(3)
    found = model.generator.generate(**inputs, **options)
    assert torch.equal(found, expected)
    assert len(set(expected[:, inputs["input_ids"].shape[1] :].flatten().tolist())) > 1


def test_p1_generate_gives_the_text_of_the_base(base, checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = make_tokenizer()
    model = load(checkpoint)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert [model.generate(prompt, max_new_tokens=8) for prompt in PROMPTS] == expected
    assert model.generate(PROMPTS, max_new_tokens=8) == expected
    assert "".join(model.generate(PROMPTS[0], max_new_tokens=8, stream=True)).strip() == expected[0].strip()
    assert any(expected)


def test_p3_shared_tensors_are_in_memory_once(pair):
    base, checkpoint = pair
    base_bytes = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    dense, low = load(checkpoint), load(checkpoint, low_memory=True)
    ffn = sum(t.numel() * 4 for k, t in dense[0].uni_tensors().items() if ".mlp." in k)
    assert dense.memory_report()["base"] == base_bytes
    assert dense.memory_report()["total"] == base_bytes + ffn
    delta = sum((a.numel() + b.numel()) * 4 for a, b in low[0].low_rank.values())
    assert low.memory_report()["total"] == base_bytes + delta
    for model in (dense, low):
        encoder = dict(model[0].model.named_parameters())
        backbone = dict(getattr(model.generator, model.generator.base_model_prefix).named_parameters())
        shared = [name for name in encoder if ".mlp." not in name]
        assert len(shared) > 10
        assert all(encoder[name] is backbone[name] for name in shared)


def test_p3_low_memory_gives_the_same_vectors(pair):
    _, checkpoint = pair
    dense, low = load(checkpoint), load(checkpoint, low_memory=True)
    expected = dense.encode(TEXTS)
    assert np.abs(low.encode(TEXTS) - expected).max() < 1e-5
    reference = dense.generator
    inputs = padded()
    with torch.inference_mode():
        assert torch.equal(low.generator(**inputs).logits, reference(**inputs).logits)


def test_p4_threads_that_encode_and_generate_get_the_serial_results(checkpoint):
    model = load(checkpoint)
    vectors, text = model.encode(TEXTS), model.generate(PROMPTS[0], max_new_tokens=6)
    causal = SentenceTransformer(str(checkpoint), config_kwargs={"use_cache": False})
    causal[0].model.config.is_causal = True
    assert np.abs(causal.encode(TEXTS) - vectors).max() > 1e-3  # a mixed-up thread would be noticed
    wrong: list[str] = []

    def encode():
        return np.array_equal(model.encode(TEXTS), vectors)

    def generate():
        return model.generate(PROMPTS[0], max_new_tokens=6) == text

    def work(check):
        for _ in range(60):
            try:
                if not check():
                    wrong.append(check.__name__)
            except Exception as error:
                wrong.append(f"{check.__name__}: {error}")

    in_threads(work, encode, generate, encode, generate)
    assert not wrong


def test_p4_threads_share_a_tokenizer_that_pads_for_one_and_not_for_the_other(checkpoint_of, monkeypatch):
    """A fast tokenizer keeps its padding as state; without a lock one thread takes another's away."""
    module = load(checkpoint_of("llama"))[0]
    texts, wrong = ["a cat", "the dog sits on the mat", "it"], []
    batch, ids = module.preprocess(texts)["input_ids"], module.token_ids("a cat")
    assert batch.shape[1] > len(ids)  # padded, so that the threads need different states
    set_state = module.tokenizer.set_truncation_and_padding

    def set_slowly(*args, **kwargs):
        set_state(*args, **kwargs)
        time.sleep(0.002)  # every other thread has a turn between state and use

    monkeypatch.setattr(module.tokenizer, "set_truncation_and_padding", set_slowly)

    def pad():
        assert torch.equal(module.preprocess(texts)["input_ids"], batch)

    def leave():
        assert module.token_ids("a cat") == ids

    def work(check):
        try:
            for _ in range(40):
                check()
        except Exception as error:
            wrong.append(f"{check.__name__}: {error}")

    in_threads(work, pad, leave, pad, leave)
    assert not wrong, wrong[0]


def in_threads(work, *checks):
    threads = [threading.Thread(target=work, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_p6_vectors_do_not_depend_on_the_batch(pair, attention, side):
    _, checkpoint = pair
    if attention == "sdpa" and not load(checkpoint)[0].model._supports_sdpa:
        pytest.skip("transformers runs this architecture eagerly only")
    model = load(checkpoint, model_kwargs={"attn_implementation": attention})
    assert model[0].model.config._attn_implementation == attention
    model.tokenizer.padding_side = side
    alone = np.stack([model.encode(text) for text in TEXTS])
    assert np.abs(model.encode(TEXTS) - alone).max() < 1e-5
    assert np.abs(model.encode(TEXTS[::-1], batch_size=3)[::-1] - alone).max() < 1e-5
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_p6_every_token_sees_later_tokens(pair, attention):
    _, checkpoint = pair
    if attention == "sdpa" and not load(checkpoint)[0].model._supports_sdpa:
        pytest.skip("transformers runs this architecture eagerly only")
    model = load(checkpoint, model_kwargs={"attn_implementation": attention})
    encoder = model[0].model
    first, second = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[4, 5, 6, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    pad = torch.zeros(1, 2, dtype=torch.long)
    with torch.inference_mode():
        for a, b, kwargs in (
            (first, second, {}),
            (torch.cat([first, pad], 1), torch.cat([second, pad], 1), {"attention_mask": mask}),
        ):
            difference = (encoder(a, **kwargs)[0] - encoder(b, **kwargs)[0]).abs().amax(-1)[0]
            assert (difference[:4] > 1e-4).all()
        generator = model.generator
        causal = (generator(first).logits - generator(second).logits).abs().amax(-1)[0]
        assert (causal[:3] == 0).all()
        assert causal[3] > 1e-4
