"""Reading checkpoints of the published code: what becomes of keys and tensors, and what is refused."""

from __future__ import annotations

import base64
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ultramem import MemoryConfig
from ultramem.convert.published_checkpoint import PublishedModel, read_published_checkpoint
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import ModelConfig

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "olmo_checkpoints"
NAMES = ["memory_plus", "ultramem_v1", "ultramem_v2"]
MODEL = {"d_model": 48, "num_blocks": 4, "num_heads": 4, "feed_forward_size": 64, "vocab_size": 256}
MEMORIES = {
    "memory_plus": MemoryConfig(
        kind="memory_plus", num_keys=9, key_dim=8, value_dim=48, top_k=4, heads=2, insertion="1:1/3:3"
    ),
    "ultramem_v1": MemoryConfig(
        kind="ultramem", num_keys=6, key_dim=8, value_dim=16, top_k=4, heads=2, insertion="0:1/2:3", key_expansion=2
    ),
    "ultramem_v2": MemoryConfig(
        num_keys=6, key_dim=8, value_dim=16, pre_value_dim=8, top_k=4, share_ratio=0.5, query_per_rank=False
    ),
}


class Copy:
    """A copy of a golden checkpoint that tests change."""

    def __init__(self, name: str, path: Path) -> None:
        shutil.copytree(CHECKPOINTS / name, path)
        self.path = path
        self.tensors: dict[str, Tensor] = torch.load(path / "model.pt", weights_only=True)
        self.options: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text())["model"]

    def set(self, **options: Any) -> Copy:
        self.options |= options
        return self.write_config()

    def unset(self, *keys: str) -> Copy:
        for key in keys:
            del self.options[key]
        return self.write_config()

    def write_config(self) -> Copy:
        (self.path / "config.yaml").write_text(yaml.safe_dump({"model": self.options}))
        return self

    def write_tensors(self, **options: Any) -> Copy:
        torch.save(self.tensors, self.path / "model.pt", **options)
        return self

    def read(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        return read_published_checkpoint(self.path)

    def refuses(self, *words: str) -> None:
        with pytest.raises(UltraMemError) as caught:
            self.read()
        message = str(caught.value)
        assert "\n" not in message
        assert str(self.path) in message
        for word in words:
            assert word in message


@pytest.fixture
def copy_of(tmp_path):
    return lambda name: Copy(name, tmp_path / "checkpoint")


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def drop_memory(copy: Copy) -> Copy:
    copy.tensors = {name: tensor for name, tensor in copy.tensors.items() if ".mem_blocks." not in name}
    return copy.write_tensors()


@pytest.mark.parametrize("name", NAMES)
def test_configuration_and_names(name):
    config, state = read_published_checkpoint(CHECKPOINTS / name)
    assert config == ModelConfig(**MODEL, memory=MEMORIES[name])
    expected = config.build("meta").state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert (key, tensor.shape, tensor.dtype) == (key, expected[key].shape, expected[key].dtype)


def test_parts_of_tensors(copy_of):
    copy = copy_of("ultramem_v2")
    _, state = copy.read()
    block = {name: copy.tensors[f"transformer.blocks.2.{name}.weight"] for name in ("att_proj", "ff_proj", "ff_out")}
    assert torch.equal(state["blocks.2.attention.w_k.weight"], block["att_proj"][48:96])
    assert torch.equal(state["blocks.2.feed_forward.w3.weight"], block["ff_proj"][:64])
    assert torch.equal(state["blocks.2.feed_forward.w1.weight"], block["ff_proj"][64:])
    assert torch.equal(state["blocks.2.feed_forward.w2.weight"], block["ff_out"])
    layer = {name: copy.tensors[f"transformer.mem_blocks.3.{name}"] for name in ("query_proj.weight", "tucker_core.1")}
    assert torch.equal(state["memory.layers.3.query_proj.weight"], layer["query_proj.weight"][:16])
    assert torch.equal(state["memory.layers.3.cores"][1], layer["tucker_core.1"])
    assert torch.equal(state["lm_head.w_out.weight"], copy.tensors["transformer.wte.weight"])


def test_one_query_for_all_ranks(copy_of):
    copy = copy_of("ultramem_v2")
    before = read_published_checkpoint(CHECKPOINTS / "ultramem_v2")
    for name, tensor in copy.tensors.items():
        if name.endswith("query_proj.weight"):
            copy.tensors[name] = tensor[:16].clone()
    after = copy.write_tensors().set(mem_q_for_each_tucker_rank=False).read()
    assert after[0] == before[0]
    assert equal(after[1], before[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoded", [False, True])
def test_safetensors(name, encoded, copy_of):
    copy = copy_of(name)
    _, expected = read_published_checkpoint(CHECKPOINTS / name)
    (copy.path / "model.pt").unlink()

    def encode(key: str) -> str:  # as OLMo does
        return base64.urlsafe_b64encode(pickle.dumps(((key,), False))).decode("ascii")

    save_file({encode(key) if encoded else key: t for key, t in copy.tensors.items()}, copy.path / "model.safetensors")
    assert equal(copy.read()[1], expected)


def test_old_format_of_torch(copy_of):
    copy = copy_of("ultramem_v1")
    _, expected = read_published_checkpoint(CHECKPOINTS / "ultramem_v1")
    assert equal(copy.write_tensors(_use_new_zipfile_serialization=False).read()[1], expected)


def test_other_dtype(copy_of):
    copy = copy_of("ultramem_v2")
    _, expected = read_published_checkpoint(CHECKPOINTS / "ultramem_v2")
    copy.tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in copy.tensors.items()}
    _, state = copy.write_tensors().read()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.allclose(tensor, expected[name], rtol=2**-8)


def test_untied_embeddings(copy_of):
    copy = copy_of("memory_plus")
    copy.tensors["transformer.ff_out.weight"] = output = torch.randn(256, 48)
    config, state = copy.write_tensors().set(weight_tying=False).read()
    assert not config.tie_embeddings
    assert torch.equal(state["lm_head.w_out.weight"], output)
    assert torch.equal(state["embeddings.weight"], copy.tensors["transformer.wte.weight"])


@pytest.mark.parametrize("options", [{"mem_type": None}, {"mem_type": "none"}, {"mem_insert_way": "no_mem"}, None])
def test_dense(options, copy_of):
    copy = drop_memory(copy_of("ultramem_v2"))
    if options is None:  # as in OLMo
        copy.unset(*[key for key in copy.options if key.startswith("mem_")])
    config, state = copy.set(**options or {}).read()
    assert config == ModelConfig(**MODEL)
    assert state.keys() == config.build("meta").state_dict().keys()


def test_memory_plus_keeps_a_table_without_layers(copy_of):
    copy = drop_memory(copy_of("memory_plus")).set(mem_insert_way="no_mem")
    assert "transformer.full_memory_layer.values_for_look_up" in copy.tensors
    assert copy.read()[0].memory is None


def test_switches(copy_of):
    copy = copy_of("ultramem_v2").set(mem_use_glu_act=True, mem_output_dropout_rate=0.1, mem_key_balance_reg_coef=0.01)
    memory = copy.read()[0].memory
    assert (memory.pre_activation, memory.output_dropout, memory.balance_coef) == ("gelu", 0.1, 0.01)


BASE = {
    "num_keys": 128,
    "key_dim": 512,
    "value_dim": 512,
    "top_k": 16,
    "heads": 1,
    "insertion": "all",
    "norm_eps": 1e-5,
}
V2 = BASE | {
    "kind": "ultramem_v2",
    "pre_value_dim": 512,
    "query_per_rank": False,
    "key_expansion": 1,
    "value_projectors": "single",
    "share_ratio": 1.0,
    "output_dropout": 0.0,
    "balance_coef": 0.0,
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"mem_type": "none"}, None),
        ({"mem_type": "ultramem_v2"}, V2),
        ({"mem_type": "ultramem_v2", "mem_insert_way": "1:2/4:4"}, V2 | {"insertion": "1:2/4:4"}),
        ({"mem_type": "ultramem_v2", "mem_insert_way": "no_mem"}, V2 | {"insertion": "none"}),
        ({"mem_type": "ultramem_v2", "mem_key_expand_time": 2}, V2 | {"key_expansion": 2}),
        (
            {"mem_type": "ultramem_v2", "mem_key_expand_time": 2, "mem_value_expand_time": 4},
            V2 | {"key_expansion": 2, "value_projectors": "per_block"},
        ),
        ({"mem_type": "ultramem_v2", "mem_use_glu_act": True}, V2 | {"pre_activation": "gelu"}),
        ({"mem_type": "ultramem_v2", "mem_use_glu_act": True, "mem_pre_vdim": 0}, V2 | {"pre_value_dim": 0}),
        # The published code gives these kinds no choice.
        ({"mem_type": "ultramem_v1", "mem_share_ratio": 0.5, "mem_key_expand_time": 3}, BASE | {"kind": "ultramem"}),
        ({"mem_type": "memory_plus", "mem_use_glu_act": True}, BASE | {"kind": "memory_plus"}),
    ],
)
def test_memory_fields(options, expected):
    fields = PublishedModel(**options).memory_fields()
    assert fields == expected
    if fields is not None:
        MemoryConfig(**fields)


def test_published_defaults():
    assert PublishedModel(mlp_ratio=8, embedding_size=None, vocab_size=500).model_fields() == {
        "d_model": 768,
        "num_blocks": 12,
        "num_heads": 12,
        "feed_forward_size": 3072,
        "vocab_size": 500,
        "tie_embeddings": True,
        "rope_theta": 10000,
        "norm_eps": 1e-5,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation_type": "gelu"}, ["model.activation_type='gelu'", "'swiglu'"]),
        ({"alibi": True}, ["model.alibi=True", "must be False"]),
        ({"rope": False}, ["model.rope=False", "must be True"]),
        ({"include_bias": True}, ["model.include_bias=True"]),
        ({"bias_for_layer_norm": True}, ["model.bias_for_layer_norm=True"]),
        ({"layer_norm_type": "default"}, ["model.layer_norm_type='default'", "'rms'"]),
        ({"layer_norm_with_affine": False}, ["model.layer_norm_with_affine=False"]),
        ({"attention_layer_norm": False}, ["model.attention_layer_norm=False"]),
        ({"attention_layer_norm_with_affine": False}, ["model.attention_layer_norm_with_affine=False"]),
        ({"block_type": "moe"}, ["model.block_type='moe'", "'sequential'"]),
        ({"block_group_size": 2}, ["model.block_group_size=2"]),
        ({"multi_query_attention": True}, ["model.multi_query_attention=True"]),
        ({"n_kv_heads": 2}, ["model.n_kv_heads=2", "n_heads=4"]),
        ({"clip_qkv": 8.0}, ["model.clip_qkv=8.0", "must be None"]),
        ({"embedding_layer_norm": True}, ["model.embedding_layer_norm=True"]),
        ({"scale_logits": True}, ["model.scale_logits=True"]),
        ({"norm_after": True}, ["model.norm_after=True"]),
        ({"moe_interleave": True}, ["model.moe_interleave=True"]),
        ({"mem_final_top_expand_time": 2}, ["model.mem_final_top_expand_time=2"]),
        ({"mem_novelty": 3}, ["model.mem_novelty=3", "other values are not supported"]),
        ({"mem_type": "peer"}, ["model.mem_type='peer'", "ultramem_v2"]),
        ({"mem_head": 3}, ["model.mem_head=3", "must be 1 or 2"]),
        ({"mem_value_expand_time": 4}, ["model.mem_value_expand_time=4", "must be 1"]),
        ({"mem_knum": "many"}, ["model.mem_knum='many'", "whole number"]),
        ({"mem_knum": 0}, ["model.mem_knum", "num_keys=0", "at least 1"]),
        ({"mem_knn": 1000}, ["model.mem_knn", "top_k=1000"]),
        ({"mem_use_glu_act": "swish"}, ["model.mem_use_glu_act='swish'", "true or false"]),
        ({"mlp_hidden_size": 127}, ["model.mlp_hidden_size=127", "even"]),
        ({"d_model": 47}, ["model.n_heads", "num_heads=4", "d_model=47"]),
        ({"n_layers": 0}, ["model.n_layers", "num_blocks=0"]),
        ({"mem_insert_way": "0:1/1:2"}, ["model.mem_insert_way='0:1/1:2'", "loses that output", "block 1"]),
        ({"mem_insert_way": "0:3/1:1"}, ["model.mem_insert_way='0:3/1:1'", "loses that output"]),
        ({"mem_insert_way": "0:1/0:2"}, ["model.mem_insert_way='0:1/0:2'"]),
        ({"mem_insert_way": "2:3/0:1"}, ["model.mem_insert_way='2:3/0:1'", "ascending"]),
        ({"mem_insert_way": "2:9"}, ["model.mem_insert_way", "block 9"]),
        ({"mem_insert_way": "2:1"}, ["model.mem_insert_way", "2:1"]),
        ({"mem_insert_way": "some"}, ["model.mem_insert_way", "some"]),
    ],
)
def test_refused_keys(options, words, copy_of):
    copy_of("ultramem_v2").set(**options).refuses("config.yaml", *words)


def test_missing_keys_have_the_published_defaults(copy_of):
    copy = copy_of("ultramem_v2").unset("mem_insert_way", "activation_type", "mem_use_glu_act", "clip_qkv")
    assert copy.read()[0].memory == MEMORIES["ultramem_v2"]
    copy.unset("rope").refuses("model.rope is missing, which means False: must be True")


def test_keys_without_influence(copy_of):
    copy = copy_of("ultramem_v2").set(
        flash_attention=True, residual_dropout=0.1, init_fn="normal", mem_log_interval=7, mem_parallel_size=4, mem_new=0
    )
    assert copy.read()[0].memory == MEMORIES["ultramem_v2"]


NORM = "transformer.blocks.1.attn_norm.weight"
SHUFFLE = "transformer.mem_blocks.0.shuffle_index"
DIRECTION = "transformer.mem_blocks.0.tucker_core_u"
CORE = "transformer.mem_blocks.0.tucker_core.1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NORM: None}, ["lacks", NORM]),
        ({CORE: None}, ["lacks", CORE]),
        ({NORM: torch.ones(47)}, [NORM, "(47,)", "(48,)"]),
        ({NORM: torch.ones(())}, [NORM, "()", "(48,)"]),
        ({"transformer.blocks.1.att_proj.weight": torch.ones(48, 48)}, ["att_proj.weight", "(48, 48)", "(144, 48)"]),
        ({"transformer.mem_blocks.0.query_proj.weight": torch.ones(16, 48)}, ["query_proj", "(16, 48)", "(32, 48)"]),
        ({"transformer.mem_blocks.0.tucker_core_u": torch.ones(1, 2)}, ["tucker_core_u", "(1, 2)", "(1, 1, 1, 2)"]),
        ({CORE: torch.ones(2, 2)}, [CORE, "(2, 2)", "(1, 2, 2)"]),
        ({SHUFFLE: torch.ones(64)}, [SHUFFLE, "integers", "float32"]),
        ({SHUFFLE: torch.arange(1, 65)}, ["memory.layers.0.shuffle", "permutation"]),
        ({SHUFFLE: torch.zeros(64, dtype=torch.int64)}, ["memory.layers.0.shuffle", "permutation"]),
        ({DIRECTION: torch.full((1, 1, 1, 2), torch.nan)}, ["memory.layers.0.u", "finite"]),
        ({NORM: torch.ones(48, dtype=torch.int64)}, [NORM, "floating-point", "int64"]),
        ({"transformer.ff_out.weight": torch.ones(256, 48)}, ["transformer.ff_out.weight", "no place"]),
        ({"transformer.blocks.0.ff_out.bias": torch.ones(48)}, ["blocks.0.ff_out.bias", "no place"]),
        ({"transformer.mem_blocks.0.tucker_core.2": torch.ones(1, 2, 2)}, ["tucker_core.2", "no place"]),
    ],
)
def test_refused_tensors(changes, words, copy_of):
    copy = copy_of("ultramem_v2")
    copy.tensors = {name: t for name, t in (copy.tensors | changes).items() if t is not None}
    copy.write_tensors().refuses("model.pt", *words)


class Code:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_is_not_run(copy_of):
    copy = copy_of("ultramem_v1")
    copy.tensors["transformer.wte.weight"] = Code(copy.path / "ran")
    for new in (True, False):
        copy.write_tensors(_use_new_zipfile_serialization=new).refuses("model.pt", "code")
    (copy.path / "model.pt").unlink()
    name = base64.urlsafe_b64encode(pickle.dumps(((Code(copy.path / "ran"),), False))).decode("ascii")
    save_file({name: torch.ones(1)}, copy.path / "model.safetensors")
    copy.refuses("model.safetensors")
    assert not (copy.path / "ran").exists()


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_tensors(name, size, copy_of):
    copy = copy_of("ultramem_v1")
    save_file(copy.tensors, copy.path / "model.safetensors")
    if name == "model.safetensors":
        (copy.path / "model.pt").unlink()
    content = (copy.path / name).read_bytes()
    (copy.path / name).write_bytes(content[:size])
    copy.refuses(name, "damaged")


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"model": {"a": torch.ones(1)}}, torch.ones(2)])
def test_other_content(content, copy_of):
    copy = copy_of("ultramem_v1")
    copy.tensors = content
    copy.write_tensors().refuses("model.pt", "must be a state dict of names and tensors")


def test_unknown_names_of_safetensors(copy_of):
    copy = copy_of("ultramem_v1")
    (copy.path / "model.pt").unlink()
    save_file(copy.tensors | {"größe": torch.ones(1)}, copy.path / "model.safetensors")
    copy.refuses("größe", "no place")


def test_safetensors_is_not_installed(copy_of, monkeypatch):
    copy = copy_of("ultramem_v1")
    (copy.path / "model.pt").rename(copy.path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    copy.refuses("pip install 'ultramem[hf]'")


@pytest.mark.parametrize("shard", ["model/rank0.pt", "rank0.pt", "rank_0/model.pt", "model_and_optim/.metadata"])
def test_sharded(shard, copy_of):
    copy = copy_of("ultramem_v1")
    (copy.path / shard).parent.mkdir(exist_ok=True)
    (copy.path / "model.pt").rename(copy.path / shard)
    copy.refuses("sharded", "unshard it")


def test_no_tensors(copy_of):
    copy = copy_of("ultramem_v1")
    (copy.path / "model.pt").unlink()
    copy.refuses("neither model.pt nor model.safetensors")
    (copy.path / "model.pt").mkdir()
    copy.refuses("model.pt cannot be read")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"model: {", "not valid YAML"),
        (b"model: !!python/object:os.system {}", "not valid YAML"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "no section `model`"),
        (b"- model", "no section `model`"),
        (b"model: 3", "no section `model`"),
        (b"run_name: x", "no section `model`"),
        (b"model: {d_model: wide}", "model.d_model='wide'"),
    ],
)
def test_damaged_configuration(content, word, copy_of):
    copy = copy_of("ultramem_v1")
    (copy.path / "config.yaml").write_bytes(content)
    copy.refuses("config.yaml", word)


def test_missing_files(copy_of):
    copy = copy_of("ultramem_v1")
    (copy.path / "config.yaml").unlink()
    copy.refuses("config.yaml: cannot be read", "No such file")
    copy.path /= "model.pt"
    copy.refuses("is not a directory")


def test_golden_logits_need_the_memory(copy_of):
    """Otherwise matching them would say nothing of it."""
    copy = copy_of("ultramem_v2")
    arrays = np.load(copy.path / "logits.npz")
    config, state = drop_memory(copy).set(mem_insert_way="no_mem").read()
    model = config.build()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["input_ids"]))
    expected = torch.from_numpy(arrays["logits"])
    assert (logits - expected).norm() > 1e-2 * expected.norm()
