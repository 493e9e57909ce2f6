"""AdapterBank in models of transformers: generate with another adapter in every row."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from weightshare.lora import AdapterBank

sys.path.insert(0, str(Path(__file__).parent))
from bank_nets import TYPES, dense, mos, net

transformers = pytest.importorskip("transformers")

QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def served():
    plain, model = llama(), llama()
    adapters = {
        f"a{n}": mos(plain, n, r=r, e=e, p=1, l=4) for n, (r, e) in enumerate([(4, 2), (6, 3)])
    }
    bank = AdapterBank(model, TYPES, max_adapters=4, max_rank=6, shards=4)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    merged = {name: dense(plain, adapter, torch.float32) for name, adapter in adapters.items()}
    return model, bank, merged | {None: plain}


def prompts(rows, tokens=7, seed=3):
    return torch.randint(1, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_generate_with_an_adapter_per_row(served):
    model, bank, merged = served
    names, ids = ["a1", None, "a0", "a1"], prompts(4)
    with bank.batch(names):
        got = model.generate(ids, max_new_tokens=12, **QUIET)
    alone = [
        merged[name].generate(ids[n : n + 1], max_new_tokens=12, **QUIET)
        for n, name in enumerate(names)
    ]
    assert torch.equal(got, torch.cat(alone))
    with bank.batch([None] * 4):
        base = model.generate(ids, max_new_tokens=12, **QUIET)
    assert torch.equal(base[1], got[1])
    assert not torch.equal(base[0], got[0]) and not torch.equal(base[2], got[2])


def test_logits_of_prefill_and_decoding_with_padding(served):
    model, bank, merged = served
    ids, mask = prompts(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    names = ["a0", "a1", "a0"]
    with torch.no_grad(), bank.batch(names):
        out = model(ids, attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, mask[:, :1] | 1], 1)
        step = model(ids[:, :1], attention_mask=longer, past_key_values=out.past_key_values)
    for n, name in enumerate(names):
        with torch.no_grad():
            one = merged[name](ids[n : n + 1], attention_mask=mask[n : n + 1], use_cache=True)
            assert torch.allclose(out.logits[n, mask[n] > 0], one.logits[0, mask[n] > 0], atol=1e-5)
            past = one.past_key_values
            last = merged[name](
                ids[n : n + 1, :1], attention_mask=longer[n : n + 1], past_key_values=past
            )
        assert torch.allclose(step.logits[n], last.logits[0], atol=1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(served, how):
    model, bank, merged = served
    names, ids, beams = ["a1", "a0"], prompts(2), how["num_beams"]
    settings = QUIET | how | {"max_new_tokens": 8}
    with bank.batch(names, expand=beams):
        got = model.generate(ids, **settings)
    alone = [merged[m].generate(ids[n : n + 1], **settings) for n, m in enumerate(names)]
    assert torch.equal(got, torch.cat(alone))
    wanted = f"{2 * beams} rows.*expand={beams}"
    with pytest.raises(ValueError, match=wanted), bank.batch(names):
        model.generate(ids, **settings)


def test_beams_of_an_encoder_and_a_decoder():
    """The encoder has a row per sequence, the decoder one per beam."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    bank = AdapterBank(model, ["q", "v"], max_adapters=2, max_rank=4, shards=2)
    bank.add("one", mos(model, 1, types=("q", "v")))
    bank.add("two", mos(model, 2, types=("q", "v")))
    names, ids, settings = ["one", None, "two"], prompts(3) % 40, QUIET | {"max_new_tokens": 6}
    with bank.batch(names, expand=3):
        got = model.generate(ids, num_beams=3, **settings)
    for n, name in enumerate(names):
        with bank.batch([name], expand=3):
            alone = model.generate(ids[n : n + 1], num_beams=3, **settings)
        assert torch.equal(got[n : n + 1], alone)


def test_return_sequences(served):
    model, bank, merged = served
    settings = QUIET | {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
    ids = prompts(1)
    torch.manual_seed(5)
    with bank.batch(["a1"], expand=2):
        got = model.generate(ids, **settings)
    torch.manual_seed(5)
    assert torch.equal(got, merged["a1"].generate(ids, **settings))


def test_sequences_come_and_go_between_steps(served):
    """A server's loop: a batch per step over rows of a cache that grow, leave and come."""
    model, bank, merged = served
    wanted = {"a0": 6, "a1": 3, None: 5}
    starts = {"a0": 0, None: 1, "a1": 4}
    texts, done = {}, {}
    with torch.no_grad():
        for step in range(20):
            for name, start in starts.items():
                if start == step:
                    texts[name] = prompts(1, seed=10 + start)[0]
            if not texts:
                break
            names, longest = list(texts), max(map(len, texts.values()))
            ids, mask = torch.zeros(2, len(names), longest, dtype=torch.int64)
            for n, name in enumerate(names):
                ids[n, longest - len(texts[name]) :] = texts[name]
                mask[n, longest - len(texts[name]) :] = 1
            with bank.batch(names):
                nexts = model(ids, attention_mask=mask).logits[:, -1].argmax(-1)
            for n, name in enumerate(names):
                texts[name] = torch.cat([texts[name], nexts[n : n + 1]])
                if len(texts[name]) == 7 + wanted[name]:
                    done[name] = texts.pop(name)
    for name, count in wanted.items():
        alone = merged[name].generate(
            prompts(1, seed=10 + starts[name]), max_new_tokens=count, **QUIET
        )
        assert torch.equal(done[name], alone[0])


def test_generate_in_a_thread_and_changes_meanwhile(served):
    """Streaming servers generate in a thread of their own; the batch is the bank's, not one's."""
    model, bank, merged = served
    ids, found = prompts(2), []
    with bank.batch(["a0", "a1"]):
        thread = threading.Thread(
            target=lambda: found.append(model.generate(ids, max_new_tokens=25, **QUIET))
        )
        thread.start()
        for n in range(4):
            bank.add("late", mos(merged[None], 50 + n, l=4))
            bank.remove("late")
        thread.join()
    alone = [
        merged[m].generate(ids[n : n + 1], max_new_tokens=25, **QUIET)
        for n, m in enumerate(("a0", "a1"))
    ]
    assert torch.equal(found[0], torch.cat(alone))


def test_bfloat16(served):
    _, _, merged = served
    model = copy.deepcopy(merged[None]).bfloat16()
    bank = AdapterBank(model, TYPES, max_adapters=2, max_rank=4, shards=4)
    bank.add("a0", mos(merged[None], 0, l=4))
    assert {s.a.pool.dtype for s in bank.memory.slabs.values()} == {torch.bfloat16}
    ids = prompts(2)
    with torch.inference_mode(), bank.batch(["a0", None]):
        got = model(ids).logits.float()
    with torch.no_grad():
        exact = torch.cat([merged["a0"](ids[:1]).logits, merged[None](ids[1:]).logits])
        like = torch.cat(
            [
                copy.deepcopy(merged[m]).bfloat16()(ids[n : n + 1]).logits
                for n, m in ((0, "a0"), (1, None))
            ]
        ).float()
    assert (got - exact).abs().max() <= 2 * (like - exact).abs().max()


def test_four_bit_base(served):
    bnb = pytest.importorskip("bitsandbytes")
    _, _, merged = served
    plain = copy.deepcopy(merged[None])
    for path, module in list(plain.named_modules()):
        if path.rpartition(".")[2] in TYPES:
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4"
            )
            four.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4")
            parent, _, name = path.rpartition(".")
            setattr(plain.get_submodule(parent), name, four.to("cpu"))
    ids = prompts(2)
    with torch.no_grad():
        before = plain(ids).logits
        dequantised = copy.deepcopy(merged[None])
        for path, module in plain.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                dequantised.get_submodule(path).weight.copy_(weight)
        adapter = mos(merged[None], 0, l=4)
        bank = AdapterBank(plain, TYPES, max_adapters=2, max_rank=4, shards=4)
        assert {s.a.pool.dtype for s in bank.memory.slabs.values()} == {torch.float32}
        bank.add("a0", adapter)
        with bank.batch(["a0", None]):
            got = plain(ids).logits
        assert torch.allclose(got[1], before[1], atol=1e-5)
        exact = dense(dequantised, adapter, torch.float32)(ids[:1]).logits
        assert torch.allclose(got[:1], exact, atol=1e-4)
        bank.detach()
        assert torch.equal(plain(ids).logits, before)


def test_folders_that_peft_saved(tmp_path, served):
    """Plain LoRAs of PEFT, with ranks by module, against PEFT's own mixed batch."""
    peft = pytest.importorskip("peft")
    _, _, merged = served
    config = {"target_modules": list(TYPES), "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(merged[None]), peft.LoraConfig(r=4, **config), "x")
    more = {"r": 2, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"q_proj": 3}}
    theirs.add_adapter("y", peft.LoraConfig(**more, **config))
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data *= 0.2 if "lora_B" in name else 0.5
    theirs.eval().save_pretrained(tmp_path)
    model = copy.deepcopy(merged[None])
    bank = AdapterBank(model, TYPES, max_adapters=2, max_rank=4, shards=4)
    bank.add("x", tmp_path / "x")
    bank.add("y", tmp_path / "y")
    ids = prompts(4)
    with torch.no_grad(), bank.batch(["y", "x", None, "y"]):
        got = model(ids).logits
        exact = theirs(ids, adapter_names=["y", "x", "__base__", "y"]).logits
    assert torch.allclose(got, exact, atol=2e-5)
    assert (got - merged[None](ids).logits).abs().amax((1, 2)).gt(1e-3).tolist() == [1, 1, 0, 1]


def test_folders_that_the_tuner_saved(tmp_path, served):
    """Mixtures of Shards trained in PEFT, of some layers alone as well, against the tuner's own."""
    peft = pytest.importorskip("peft")
    from weightshare.lora import MoSConfig

    _, _, merged = served
    config = {"shards": 4, "target_modules": list(TYPES), "alpha": 2}
    first = MoSConfig(r=4, equivalent_rank=2, **config)
    theirs = peft.get_peft_model(copy.deepcopy(merged[None]), first, "x")
    theirs.add_adapter("y", MoSConfig(r=6, equivalent_rank=3, seed=1, **config))
    torch.manual_seed(3)
    for name, weight in theirs.named_parameters():
        if name.endswith(".b"):
            weight.data = torch.randn_like(weight) / weight.shape[1]
    theirs.eval().save_pretrained(tmp_path)
    some = MoSConfig(r=4, equivalent_rank=2, layers_to_transform=[0, 2], private_rank=0, **config)
    part = peft.get_peft_model(copy.deepcopy(merged[None]), some, "z").eval()
    for name, weight in part.named_parameters():
        if name.endswith(".b"):
            weight.data = torch.randn_like(weight) / weight.shape[1]
    part.save_pretrained(tmp_path)
    model = copy.deepcopy(merged[None])
    bank = AdapterBank(model, TYPES, max_adapters=3, max_rank=6, shards=8)
    for name in "xyz":
        bank.add(name, tmp_path / name)
    ids = prompts(4)
    with torch.no_grad(), bank.batch(["y", "x", None, "z"]):
        got = model(ids).logits
        exact = theirs(ids, adapter_names=["y", "x", "__base__", "y"]).logits
        exact[3:] = part(ids[3:]).logits
    assert torch.allclose(got, exact, atol=2e-5)
    assert (got - merged[None](ids).logits).abs().amax((1, 2)).gt(1e-3).tolist() == [1, 1, 0, 1]


def test_compiled_without_breaks():
    plain, model = net(1), net(1)
    adapters = {"one": mos(plain, 1, r=2), "two": mos(plain, 2, r=2)}
    bank = AdapterBank(model, TYPES, max_adapters=3, max_rank=4, shards=2)
    bank.add("one", adapters["one"])
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)

    def check(names, tokens):
        x = torch.randn(len(names), tokens, 16)
        with torch.no_grad():
            with bank.batch(names):
                got = compiled(x)
            rows = [
                dense(plain, adapters.get(n))(x[i : i + 1].double()) for i, n in enumerate(names)
            ]
        assert torch.allclose(got.double(), torch.cat(rows), atol=1e-5)

    check(["one", None, "one"], 5)
    check(["one", "one"], 3)  # sizes that a module reaches are taken for constants at first
    seen = len(graphs)
    for n in range(4):
        bank.add("two", adapters["two"])
        check(["two", "one", None, "two", "one"][n:], 6 + n)
        bank.remove("two")
    assert len(graphs) == seen
    with torch.no_grad():
        x = torch.randn(2, 3, 16)
        assert torch.allclose(compiled(x), plain(x), atol=1e-6)
    torch._dynamo.reset()
