"""Memory put into models that transformers has."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ultramem import ConfigError, MemoryConfig, UltraMemError
from ultramem.hosts.transformers import (
    UltraMemConfig,
    UltraMemForCausalLM,
    attach_memory,
    detach_memory,
    load_memory,
    save_memory,
)
from ultramem.hosts.transformers.files import load_model_file, save_checksums

SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "mistral": GROUPED | {"head_dim": 16},
    "olmo": GROUPED,
    "gpt_neox": {},
    "phi": {},
    "gpt2": {},
    "qwen3_moe": GROUPED | {"head_dim": 16, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make(architecture: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = SIZES | ARCHITECTURES.get(architecture, {}) | options
    if architecture == "gpt2":
        fields["n_inner"] = fields.pop("intermediate_size")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields)).eval()


def small(**options: Any) -> MemoryConfig:
    return MemoryConfig(**({"num_keys": 6, "key_dim": 8, "value_dim": 8, "pre_value_dim": 4, "top_k": 4} | options))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 53, (2, 9), generator=torch.Generator().manual_seed(1))


@architectures
@pytest.mark.parametrize("kind", ["ultramem_v2", "pkm"])
def test_zero_output_changes_nothing(architecture: str, kind: str, tokens: Tensor) -> None:
    model = make(architecture)
    before, names = model(tokens).logits, [name for name, _ in model.named_parameters()]
    config = small(init="zero_output")
    if kind == "pkm":
        config = small(kind="pkm", value_dim=32, pre_value_dim=0, init="zero_output")
    memory = attach_memory(model, config)
    assert model.memory is memory
    assert torch.equal(model(tokens).logits, before)
    assert [name for name, _ in model.named_parameters() if not name.startswith("memory.")] == names
    model.train()(tokens, labels=tokens).loss.backward()
    written = memory.table.values if kind == "ultramem_v2" and memory.table else memory.layers[0].table.values
    if kind == "ultramem_v2":
        written = memory.layers[0].output_proj.weight
    assert written.grad.abs().max() > 0, "it could not be trained"


@architectures
def test_each_layer_adds_to_its_block(architecture: str, tokens: Tensor) -> None:
    """A block's residual stream is the old one and the layer of the feed-forward's input."""
    model = make(architecture)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and hasattr(m[0], "mlp"))
    seen: dict[str, Any] = {}
    handles = [
        blocks[1].mlp.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0])),
        blocks[1].register_forward_hook(
            lambda _, inputs, output: seen.update(result=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    model(tokens)
    plain = seen["result"]
    memory = attach_memory(model, small(), blocks=[1])
    assert memory.insertions == ((1, 1),)
    model(tokens)
    torch.testing.assert_close(seen["result"], plain + memory.layers[0](seen["x"]))
    for handle in handles:
        handle.remove()
    found = model.generate(tokens, max_new_tokens=4, do_sample=False)
    again = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, again)


@architectures
def test_detached_as_before(architecture: str, tokens: Tensor) -> None:
    model = make(architecture)
    before, state = model(tokens).logits, {name: t.clone() for name, t in model.state_dict().items()}
    memory = attach_memory(model, small())
    assert not torch.equal(model(tokens).logits, before)
    assert detach_memory(model) is memory
    assert torch.equal(model(tokens).logits, before)
    assert model.state_dict().keys() == state.keys()
    assert not hasattr(model, "memory")
    with pytest.raises(UltraMemError, match="has no memory that was attached"):
        detach_memory(model)


@architectures
def test_saved_apart(architecture: str, tokens: Tensor, tmp_path: Path) -> None:
    model = make(architecture)
    attach_memory(model, small(insertion="0:2/1:1"))
    optimizer = torch.optim.AdamW(model.memory.parameters(), lr=0.1, fused=True)
    model.train()(tokens, labels=tokens).loss.backward()
    optimizer.step()
    expected = model.eval()(tokens).logits
    save_memory(model, tmp_path / "memory")
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {
        "memory_config.json", "memory.safetensors", "checksums.json",
    }  # fmt: skip
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "memory" / "memory.safetensors").stat().st_size < whole
    again = make(architecture)
    load_memory(again, tmp_path / "memory")
    assert torch.equal(again(tokens).logits, expected)


def test_matched_to_each_feed_forward() -> None:
    """A feed-forward that was trained to be larger gets a larger memory."""
    model = make("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(10)
    memory = attach_memory(model, small(kind="ultramem", pre_value_dim=0, num_keys=24, value_dim=64, top_k=16))
    x = torch.randn(1, 400, 64)
    for block, layer in zip(model.model.layers, memory.layers, strict=True):
        assert 0.7 < (layer(x).std() / block.mlp(x).std()).item() < 1.4


def test_half_precision_models_get_a_memory_like_them(tokens: Tensor) -> None:
    model = make("llama").to(torch.bfloat16)
    memory = attach_memory(model, small())
    assert {p.dtype for p in memory.parameters()} == {torch.bfloat16}
    assert model(tokens).logits.dtype == torch.bfloat16


def test_copies_have_a_memory_of_their_own(tokens: Tensor) -> None:
    model = make("llama")
    attach_memory(model, small(insertion="0:1"))
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = model(tokens).logits
    for twin in twins:
        assert torch.equal(twin(tokens).logits, before)
        with torch.no_grad():
            twin.memory.table.values.mul_(2)
        assert not torch.equal(twin(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("olmo2", {}, "Olmo2ForCausalLM does not fit: in block 0 the input of `mlp` is not the output of a norm"),
        ("gemma2", {"head_dim": 16} | GROUPED, "Gemma2ForCausalLM does not fit: .* is changed, as by a norm"),
        ("granite", {"residual_multiplier": 0.5} | GROUPED, "GraniteForCausalLM does not fit: .* or a factor"),
        ("opt", {"ffn_dim": 40, "word_embed_proj_dim": 32}, "OPTForCausalLM does not fit: .* module `mlp`"),
    ],
)
def test_architectures_that_do_not_fit(
    architecture: str, options: dict[str, Any], message: str, tokens: Tensor
) -> None:
    model = make(architecture, **options)
    before = model(tokens).logits
    with pytest.raises(UltraMemError, match=message):
        attach_memory(model, small())
    assert torch.equal(model(tokens).logits, before)
    assert not hasattr(model, "memory")


@pytest.mark.parametrize(
    ("options", "blocks", "message"),
    [
        ({}, [3], "block 3 does not exist"),
        ({}, [], "at least one"),
        ({}, [1, 1], "different numbers"),
        ({"insertion": "0:1"}, [1], "insertion='0:1': must not be given with blocks="),
        ({"kind": "pkm", "pre_value_dim": 0}, None, "value_dim=8: must be d_model=32"),
        ({"query_conv": 3}, None, "query_conv=3"),
        ({"num_keys": 1}, None, "top_k=4: must be at most 1, the number of rows that a layer can reach"),
    ],
)
def test_configurations_that_do_not_fit(options: dict[str, Any], blocks: list[int] | None, message: str) -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match=message):
        attach_memory(model, small(**options), blocks=blocks)
    assert not hasattr(model, "memory")


def test_a_second_memory_is_refused() -> None:
    model = make("llama")
    attach_memory(model, small())
    with pytest.raises(UltraMemError, match="has a memory already"):
        attach_memory(model, small())


def test_wrong_memory_directories(tmp_path: Path, tokens: Tensor) -> None:
    model = make("llama")
    with pytest.raises(UltraMemError, match="LlamaForCausalLM has no memory"):
        save_memory(model, tmp_path)
    with pytest.raises(UltraMemError, match=r"memory_config\.json cannot be read"):
        load_memory(model, tmp_path)
    attach_memory(model, small())
    save_memory(model, tmp_path)
    with pytest.raises(UltraMemError, match=r"3 blocks of width 32 .* here has 2 of width 32"):
        load_memory(make("llama", num_hidden_layers=2), tmp_path)
    config, weights = tmp_path / "memory_config.json", tmp_path / "memory.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    (tmp_path / "checksums.json").unlink()  # as version 0.1 wrote it
    config.write_text(text.replace('"top_k": 4', '"top_k": 4, "colour": 1'))
    with pytest.raises(UltraMemError, match="is damaged"):
        load_memory(make("llama"), tmp_path)
    config.write_text(text.replace('"num_keys": 6', '"num_keys": 7'))
    fresh = make("llama")
    with pytest.raises(UltraMemError, match="is missing or of another shape"):
        load_memory(fresh, tmp_path)
    assert not hasattr(fresh, "memory")
    config.write_text("{")
    with pytest.raises(UltraMemError, match="is damaged"):
        load_memory(fresh, tmp_path)
    config.write_text(text)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UltraMemError, match="is damaged or incomplete"):
        load_memory(fresh, tmp_path)


def test_the_whole_model_with_its_memory_is_checkpointed(tokens: Tensor) -> None:
    """Gradient checkpointing gives the same gradients, also of an output that joins at a later block."""
    model = make("llama").train()
    attach_memory(model, small(insertion="0:2/1:1"))
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_mode_and_random_numbers_are_left_alone(tokens: Tensor) -> None:
    """A memory joins in the model's mode; no module changes its own, and no random number is used up."""
    model = make("llama").train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    attach_memory(model, small())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert model.memory.training
    model = make("llama")
    attach_memory(model, small(output_dropout=0.5))
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_a_memory_in_another_dtype_than_its_model(tokens: Tensor, tmp_path: Path) -> None:
    model = make("llama")
    attach_memory(model, small())
    save_memory(model, tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        narrow = make("llama").to(dtype)
        memory = load_memory(narrow, tmp_path)
        assert {p.dtype for p in memory.parameters()} == {torch.float32}
        assert narrow(tokens).logits.dtype == dtype
    integers = {name: t.int() for name, t in load_file(tmp_path / "memory.safetensors").items()}
    save_file(integers, tmp_path / "memory.safetensors")
    (tmp_path / "checksums.json").unlink()
    fresh = make("llama")
    with pytest.raises(UltraMemError, match="of another shape"):
        load_memory(fresh, tmp_path)
    assert not hasattr(fresh, "memory")


def test_copied_after_a_pass_with_gradients(tokens: Tensor) -> None:
    model = make("llama").train()
    attach_memory(model, small(insertion="0:2/1:1", balance_coef=0.1))
    model(tokens, labels=tokens).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("inner", [False, True])
def test_a_memory_that_a_model_was_built_with_stays(inner: bool, tokens: Tensor) -> None:
    memory = {"num_keys": 6, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = UltraMemForCausalLM(
        UltraMemConfig(vocab_size=64, head_dim=16, num_key_value_heads=2, memory=memory, **sizes)
    )
    owner = model.model if inner else model
    before = model(tokens % 64).logits
    with pytest.raises(UltraMemError, match="has a memory already; it was built with it; attach to a model without"):
        attach_memory(owner, MemoryConfig(**memory))
    with pytest.raises(UltraMemError, match="no memory that was attached to it: it was built with its own"):
        detach_memory(owner)
    assert torch.equal(model(tokens % 64).logits, before)


@pytest.mark.parametrize("name", ["memory_config.json", "memory.safetensors"])
def test_a_damaged_memory(name: str, tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    save_checksums(tmp_path)
    attach_memory(model, small())
    save_memory(model, tmp_path)  # beside a model, whose checksums stay
    fresh = make("llama")
    load_memory(fresh, tmp_path)
    load_model_file(tmp_path, torch.float32)
    content = bytearray((tmp_path / name).read_bytes())
    content[-9] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UltraMemError, match=rf"{name} is damaged: it differs from its checksum; save the memory again"):
        load_memory(make("llama"), tmp_path)
    save_memory(fresh, tmp_path)
    load_memory(make("llama"), tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-9] ^= 4
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UltraMemError, match=r"model.safetensors is damaged"):
        load_model_file(tmp_path, torch.float32)


def test_a_memory_with_other_indices(tmp_path: Path) -> None:
    model = make("llama")
    memory = attach_memory(model, small())
    memory.layers[2].shuffle[5] = -1
    save_memory(model, tmp_path)
    fresh = make("llama")
    with pytest.raises(UltraMemError, match=r"memory.safetensors: layers.2.shuffle is damaged: it must be a permutati"):
        load_memory(fresh, tmp_path)
    assert not hasattr(fresh, "memory")
