"""Transformers' models on Foveal against their own eager attention: logits, gradients, generation, training."""

import os
import pathlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import foveal.hf  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configs():
    """Small configurations of each family."""
    t = transformers
    heads = {"head_dim": 8}
    yield "llama", t.LlamaConfig(**SMALL)
    yield "mistral", t.MistralConfig(**SMALL, sliding_window=7, **heads)
    yield "qwen3", t.Qwen3Config(**SMALL, **heads)
    yield "gemma2", t.Gemma2Config(**SMALL, **heads, sliding_window=6, attn_logit_softcapping=4.0, query_pre_attn_scalar=8)
    yield (
        "gemma3",
        t.Gemma3TextConfig(
            **SMALL, **heads, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
    )
    yield "gpt_oss", t.GptOssConfig(**SMALL, **heads, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    latent = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    own = {**SMALL, "num_key_value_heads": 4}
    yield "deepseek_v3", t.DeepseekV3Config(**own, **latent, **experts, topk_group=1, first_k_dense_replace=1)


CAUSAL = dict(configs())


def causal(name, implementation, dtype=torch.float32):
    torch.manual_seed(0)
    config = type(CAUSAL[name])(**CAUSAL[name].to_dict())
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def padded(left):
    torch.manual_seed(3)
    tokens = torch.randint(3, 97, (3, 21))
    seen = torch.ones_like(tokens)
    for row, length in enumerate((21, 15, 8)):
        if left:
            seen[row, : 21 - length] = 0
        else:
            seen[row, length:] = 0
    return tokens, seen


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_and_gradients(name, padding):
    tokens, seen = padded(padding == "left")
    given = {} if padding == "none" else {"attention_mask": seen}
    results = []
    for implementation in ("eager", "foveal"):
        model = causal(name, implementation)
        logits = model(tokens, **given).logits
        real = logits[seen.bool()] if given else logits
        real.float().log_softmax(-1).square().mean().backward()
        results.append((real.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, d_expected), (got, d_got) = results
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
    assert d_got.keys() == d_expected.keys()
    for n, d in d_expected.items():
        scale = d.abs().max().item() + 1e-6
        assert (d_got[n] - d).abs().max().item() <= 2e-3 * scale + 1e-6, n


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name, cache):
    tokens, seen = padded(left=True)
    texts = []
    for implementation in ("eager", "foveal"):
        model = causal(name, implementation)
        options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        with torch.no_grad():
            texts.append(
                model.generate(tokens, attention_mask=seen, max_new_tokens=12, do_sample=False, eos_token_id=None, **options)
            )
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16(name):
    tokens, seen = padded(left=True)
    with torch.no_grad():
        exact = causal(name, "eager")(tokens, attention_mask=seen).logits[seen.bool()]
        errors = []
        for implementation in ("eager", "foveal"):
            logits = causal(name, implementation, torch.bfloat16)(tokens, attention_mask=seen).logits[seen.bool()]
            errors.append((logits.float() - exact).abs().mean().item())
    assert errors[1] <= 1.2 * errors[0]


def test_packed_sequences():
    torch.manual_seed(4)
    tokens = torch.randint(3, 97, (1, 20))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for name in ("llama", "mistral"):
        outs = []
        for implementation in ("eager", "foveal"):
            model = causal(name, implementation)
            with torch.no_grad():
                outs.append(model(tokens, position_ids=positions, use_cache=False).logits)
        torch.testing.assert_close(outs[1], outs[0], atol=2e-4, rtol=1e-3)
        cuts = torch.tensor([0, 8, 20], dtype=torch.int32)
        packed = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 12, "max_length_k": 12}
        with torch.no_grad():
            again = causal(name, "foveal")(tokens, position_ids=positions, use_cache=False, **packed).logits
        torch.testing.assert_close(again, outs[0], atol=2e-4, rtol=1e-3)


def test_prefill_in_chunks():
    torch.manual_seed(5)
    tokens = torch.randint(3, 97, (2, 30))
    for name in ("llama", "mistral", "gemma3"):
        model = causal(name, "foveal")
        with torch.no_grad():
            expected = causal(name, "eager")(tokens).logits
            cache, parts = None, []
            for piece in tokens.split([11, 1, 18], 1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-4, rtol=1e-3)


def test_windows_take_no_dense_mask(monkeypatch):
    model = causal("mistral", "foveal")
    seen = []
    own = foveal.hf.run

    def run(name, arrays, options):
        seen.append((arrays[3] is None, options[0]))
        return own(name, arrays, options)

    monkeypatch.setattr(foveal.hf, "run", run)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 40)))
    assert seen == [(True, 6), (True, 6)]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_encoders_and_position_bias(kind):
    tokens, seen = padded(left=False)
    t = transformers
    if kind == "bert":
        small = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
        config, family, more = t.BertConfig(**small, max_position_embeddings=64), t.AutoModel, {}
    else:
        config = t.T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.0,
        )
        family, more = t.AutoModelForSeq2SeqLM, {"decoder_input_ids": tokens[:, :9]}
    results = []
    for implementation in ("eager", "foveal"):
        torch.manual_seed(0)
        model = family.from_config(type(config)(**config.to_dict()), attn_implementation=implementation).eval()
        out = model(tokens, attention_mask=seen, **more)
        real = out.last_hidden_state[seen.bool()] if kind == "bert" else out.logits
        real.square().mean().backward()
        results.append((real.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, d_expected), (got, d_got) = results
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
    for n, d in d_expected.items():
        scale = d.abs().max().item() + 1e-6
        assert (d_got[n] - d).abs().max().item() <= 2e-3 * scale + 1e-6, n


def test_dropout_while_training():
    tokens, _ = padded(left=False)
    config = transformers.LlamaConfig(**SMALL, attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="foveal").train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(tokens).logits)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    tokens = torch.arange(3, 83).repeat(8, 1)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    losses = []
    for implementation in ("eager", "foveal"):
        model = causal("llama", implementation).train()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, seed=1,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_what_is_not_supported_is_said():
    model = causal("llama", "foveal")
    with pytest.raises(ValueError, match="eager"):
        model(torch.ones(1, 4, dtype=torch.long), output_attentions=True)
    with pytest.raises(TypeError, match="float64"):
        causal("llama", "foveal", torch.float64)(torch.ones(1, 4, dtype=torch.long))


def test_gated_delta_rules(monkeypatch):
    t = transformers
    if not hasattr(t, "Qwen3NextConfig"):
        pytest.skip("this version of Transformers has no Qwen3-Next")
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = t.Qwen3NextConfig(**SMALL, **linear, **experts, head_dim=8, layer_types=["linear_attention", "full_attention"])
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="foveal").eval()
    # Where flash-linear-attention is installed, Transformers calls its kernels, which need a GPU: not what is compared.
    import transformers.models.qwen3_next.modeling_qwen3_next as home

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(home, name, getattr(getattr(home, name), "__wrapped__", getattr(home, name)))
    tokens = torch.randint(3, 97, (2, 20))
    expected = model(tokens).logits
    d_expected = torch.autograd.grad(expected.square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        text = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with foveal.hf.use_linear_kernels(model) as layers:
        assert layers == 1
        got = model(tokens).logits
        d_got = torch.autograd.grad(got.square().mean(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        with torch.no_grad():
            assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None), text)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    for a, b in zip(d_got, d_expected):
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-2)


def smollm2():
    """The file of SmolLM2-135M-Instruct that the project's other tests have fetched by its hash."""
    cache = pathlib.Path(os.environ.get("FOVEAL_CACHE") or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "foveal")
    folder = cache / "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return next(iter(sorted(folder.rglob("*.gguf"))), None) if folder.is_dir() else None


def test_smollm2():
    pytest.importorskip("gguf")
    file = smollm2()
    if file is None:
        pytest.skip("SmolLM2's file has not been fetched; cargo xtask test does it")
    tokens = torch.tensor([[504, 3575, 282, 4649, 314]])
    logits = []
    for implementation in ("eager", "foveal"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, attn_implementation=implementation, dtype=torch.float32
        )
        with torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)
    best = logits[1][0, -1].topk(3)
    assert best.indices.tolist() == [7042, 260, 4528]
    assert best.values.tolist() == pytest.approx([17.371, 14.889, 13.245], abs=0.02)
    with torch.no_grad():
        text = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert text[0, 5].item() == 7042
