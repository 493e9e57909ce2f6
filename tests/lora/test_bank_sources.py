"""What AdapterBank takes adapters from, and what it refuses."""

import sys
from pathlib import Path

import pytest
import torch
from weightshare.lora import AdapterBank
from weightshare.lora.tuner.files import save_adapter

sys.path.insert(0, str(Path(__file__).parent))
from bank_nets import TYPES, dense, dense_lora, lora, mos, net


def bank_of(model, **options):
    return AdapterBank(model, TYPES, **dict(max_adapters=3, max_rank=6, shards=4) | options)


def outputs(model, bank, name, x):
    with torch.no_grad(), bank.batch([name] * len(x)):
        return model(x)


def wanted(made, x):
    with torch.no_grad():
        return made(x.double())


def test_folders(tmp_path):
    plain, model = net(), net()
    bank = bank_of(model)
    x = torch.randn(2, 3, 16)
    mixture, plain_lora = mos(plain, 1, types=TYPES[:4]), lora(plain, 2, types=TYPES[2:])
    save_adapter(tmp_path / "mos", *mixture)
    save_adapter(tmp_path / "lora", *plain_lora)
    bank.add("mos", tmp_path / "mos")
    bank.add("lora", str(tmp_path / "lora"))
    assert torch.allclose(
        outputs(model, bank, "mos", x).double(), wanted(dense(plain, mixture), x), atol=1e-5
    )
    exact = wanted(dense_lora(plain, plain_lora), x)
    assert torch.allclose(outputs(model, bank, "lora", x).double(), exact, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*adapter_config\.json"):
        bank.add("gone", tmp_path / "nowhere")


def test_shards_are_cut_to_the_banks(tmp_path):
    """One, two and four shards per vector in a bank of four, and shards that are absent."""
    plain, model = net(), net()
    bank = bank_of(model)
    x = torch.randn(2, 3, 16)
    for l in (1, 2, 4):
        config, tensors = mos(plain, l, l=l)
        tensors["q_proj.a_index"][1, 2] = -1
        bank.add(f"l{l}", (config, tensors))
        gone = {name: tensor.clone() for name, tensor in tensors.items()}
        gone["q_proj.a"] = torch.cat([gone["q_proj.a"], torch.zeros(1, 16 // l)])
        gone["q_proj.a_index"][1, 2] = len(gone["q_proj.a"]) - 1
        exact = wanted(dense(plain, (config, gone)), x)
        assert torch.allclose(outputs(model, bank, f"l{l}", x).double(), exact, atol=1e-5)
    with pytest.raises(ValueError, match="8 shards per vector, which does not divide the bank's 4"):
        bank.add("l8", mos(plain, 1, l=8))


def test_scales(tmp_path):
    plain, model = net(), net()
    bank = bank_of(model)
    config, tensors = mos(plain, 1)
    x = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="scale None; pass scale=alpha / r"):
        bank.add("bare", tensors)
    bank.add("bare", tensors, scale=0.25)
    bank.add("own", (config, tensors), scale=0.25)
    assert torch.equal(outputs(model, bank, "bare", x), outputs(model, bank, "own", x))
    exact = wanted(dense(plain, (config | {"alpha": 1.0}, tensors)), x)
    assert torch.allclose(outputs(model, bank, "bare", x).double(), exact, atol=1e-5)


def test_layers_to_transform():
    """Tables of some layers alone; the others are the model's."""
    plain, model = net(), net()
    bank = bank_of(model)
    x = torch.randn(2, 3, 16)
    config, tensors = mos(net(2), 1, r=3)
    whole = dict(tensors)
    for kind in TYPES:
        for side in "ab":
            table = tensors[f"{kind}.{side}_index"]
            zero = len(tensors[f"{kind}.{side}"])
            whole[f"{kind}.{side}_index"] = torch.stack(
                [table[0], torch.full_like(table[0], zero), table[1]]
            )
            pool = tensors[f"{kind}.{side}"]
            whole[f"{kind}.{side}"] = torch.cat([pool, torch.zeros(1, pool.shape[1])])
    bank.add("some", (config | {"layers_to_transform": [0, 2]}, tensors))
    exact = wanted(dense(plain, (config, whole)), x)
    assert torch.allclose(outputs(model, bank, "some", x).double(), exact, atol=1e-5)
    for layers in ({"layers_to_transform": 1}, {"layers_to_transform": [0, 7]}):
        with pytest.raises(ValueError, match="the model has 3 layers"):
            bank.add("bad", (config | layers, tensors))


def test_lora_scales_of_modules():
    """rslora, and a rank and an alpha of some modules' own."""
    plain, model = net(), net()
    bank = bank_of(model)
    x = torch.randn(2, 3, 16)
    config, tensors = lora(plain, 1, ranks={"layers.1.q_proj": 1})
    extra = {"use_rslora": True, "alpha_pattern": {"q_proj": 4.0, r"layers\.\d\.up_proj": 1.0}}
    bank.add("it", (config | extra, tensors))
    exact_model = dense(plain, None)
    for name, a in tensors.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            kind = path.rpartition(".")[2]
            alpha = {"q_proj": 4.0, "up_proj": 1.0}.get(kind, 2.0)
            b = tensors[name.replace("lora_A", "lora_B")].double()
            delta = alpha / len(a) ** 0.5 * b @ a.double()
            exact_model.get_submodule(path).weight.data += delta
    assert torch.allclose(outputs(model, bank, "it", x).double(), wanted(exact_model, x), atol=1e-5)


def without(adapter, name):
    config, tensors = adapter
    return config, {key: value for key, value in tensors.items() if key != name}


def changed(adapter, **new):
    config, tensors = adapter
    return config, tensors | {key.replace("__", "."): value for key, value in new.items()}


PLAIN = net()
MOS, LORA = mos(PLAIN), lora(PLAIN)
FIRST = "base_model.model.layers.0.q_proj"
REFUSED = {
    "type": (({"peft_type": "IA3"}, {}), "is of type IA3; a bank serves MOS and LORA"),
    "layers": (
        mos(net(2), r=3),
        r"q_proj.a_index: has shape \(2, 3, 2\), but the model has 3 layers",
    ),
    "widths": (mos(net(d=24, kv=12)), "make 24, but the model's q_proj is 16 wide.*another base"),
    "target": (
        ({"base_model_name_or_path": "other"} | MOS[0], MOS[1] | {"lm_head.a": torch.ones(1, 1)}),
        "weights for 'lm_head', which is no target.*made for 'other'",
    ),
    "part": (without(MOS, "k_proj.b_index"), "k_proj lacks b_index"),
    "key": (changed(MOS, q_proj__bias=torch.ones(3)), r"has a tensor 'q_proj.bias'"),
    "index": (
        changed(MOS, q_proj__a_index=MOS[1]["q_proj.a_index"] + 4),
        r"q_proj.a_index: shard \d+ is outside the pool of 12",
    ),
    "ranks": (
        changed(MOS, q_proj__a_index=MOS[1]["q_proj.a_index"][:, :3]),
        "q_proj has rank 3 in A, but 4 in B",
    ),
    "pool": (changed(MOS, q_proj__a=torch.ones(12, 8).int()), r"expected shards \[P, c\]"),
    "rank": (mos(PLAIN, r=7, e=7, p=7), r"rank 7, above the bank's max_rank 6; grow\(max_rank"),
    "dora": (
        changed(LORA, **{f"{FIRST}.lora_magnitude_vector.weight": torch.ones(16)}),
        "no DoRA",
    ),
    "half": (without(LORA, f"{FIRST}.lora_B.weight"), "layers.0.q_proj has A of A and B alone"),
    "other_layer": (
        lora(net(4)),
        r"weights for 'layers\.3\.\w+', which is no target",
    ),
    "lora_width": (lora(net(d=24, kv=12)), "is 16 wide there; is it an adapter of another base"),
    "twice": (changed(LORA, **{f"{FIRST}.lora_A.other.weight": torch.ones(3, 16)}), "has two A"),
    "pissa": (
        (LORA[0] | {"init_lora_weights": "pissa_niter_4"}, LORA[1]),
        "changes the base model's weights",
    ),
    "no_alpha": ((MOS[0] | {"alpha": None}, MOS[1]), "alpha = None, which is no number"),
    "rank_zero": ((MOS[0] | {"r": 0}, MOS[1]), "r = 0, which is no number of at least 1"),
    "no_rank": ((LORA[0] | {"r": None}, LORA[1]), "r = None"),
    "qalora": ((LORA[0] | {"use_qalora": True}, LORA[1]), "has use_qalora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    adapter, message = REFUSED[case]
    bank = bank_of(net())
    bank.add("good", MOS)
    before = bank.resident_bytes()
    for change in (lambda: bank.add("bad", adapter), lambda: bank.swap("good", adapter)):
        with pytest.raises(ValueError, match=message):
            change()
    assert bank.names == ("good",) and bank.resident_bytes() == before
    assert sum(map(len, [bank.memory.slots])) == 2


def test_refused_kinds():
    bank = bank_of(net())
    with pytest.raises(TypeError, match=r"expected a folder.*got int"):
        bank.add("bad", 3)
