"""A model with memory is a model of transformers like any other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import StaticCache

from ultramem import ConfigError, RowwiseAdamW, UltraMemError
from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM, UltraMemModel
from ultramem.layers import decoding

Make = Callable[..., UltraMemForCausalLM]
KINDS = ("ultramem_v2", "ultramem", "memory_plus", "pkm")
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name
        assert states[0][name].dtype == tensor.dtype, name


@kinds
def test_memory_is_read_beside_the_feed_forward(kind: str, make_model: Make, tokens: Tensor) -> None:
    """Against a pass through the blocks written out, each layer's output joining after its block."""
    model = make_model(kind)
    with torch.no_grad():
        hidden = model.model.embed_tokens(tokens)
        position = torch.arange(tokens.shape[1])[None]
        angles = model.model.rotary_emb(hidden, position)
        later: dict[int, list[Tensor]] = {}
        for number, block in enumerate(model.model.layers):
            attended, _ = block.self_attn(block.input_layernorm(hidden), angles, None)
            hidden = hidden + attended
            x = block.post_attention_layernorm(hidden)
            for (read, add), layer in zip(model.memory.insertions, model.memory.layers, strict=True):
                if read == number:
                    later.setdefault(add, []).append(layer(x))
            mlp = block.mlp
            hidden = hidden + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
            hidden = hidden + sum(later.get(number, []))
        expected = model.lm_head(model.model.norm(hidden))
        torch.testing.assert_close(model(tokens).logits, expected)
        for parameter in model.memory.parameters():
            parameter.zero_()
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-3), "the memory does nothing"


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_to_the_bit(kind: str, tied: bool, make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = make_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is UltraMemForCausalLM
    assert_same_state(loaded, model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.memory.config == model.memory.config
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert_same_state(AutoModelForCausalLM.from_pretrained(again), model)
    decoder = AutoModel.from_pretrained(tmp_path)
    decoder.save_pretrained(tmp_path / "decoder")
    assert (tmp_path / "decoder" / "modeling_ultramem.py").is_file()
    assert type(decoder) is UltraMemModel
    assert torch.equal(decoder(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_loaded_in_bfloat16(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.memory.layers[0].shuffle.dtype == torch.int64
    assert model(tokens).logits.isfinite().all()
    model.save_pretrained(tmp_path / "narrow")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16


def test_the_directory_brings_its_own_code(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    """Without importing ultramem: `trust_remote_code`; without either: an error of transformers'."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained(r'{tmp_path / 'model'}', trust_remote_code=True)\n"
        f"tokens, logits = torch.load(r'{tmp_path / 'tokens.pt'}'), torch.load(r'{tmp_path / 'logits.pt'}')\n"
        "assert torch.equal(model(tokens).logits, logits)\n"
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_initialised_anew_as_the_configuration_says(make_model: Make) -> None:
    """The feed-forward's output and the memory's have about the same size, as `matched` wants."""
    model = make_model(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=170)
    again = AutoModelForCausalLM.from_config(model.config)
    for one in (model, again):
        x = torch.randn(500, 64)
        for block, layer in zip(one.model.layers, one.memory.layers, strict=True):
            ratio = (layer(x).std() / block.mlp.down_proj(
                torch.nn.functional.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
            ).std()).item()  # fmt: skip
            assert 0.6 < ratio < 1.6


def test_a_checkpoint_that_lacks_a_part_of_the_memory(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    state = model.state_dict()
    del state["model.memory.layers.1.keys"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UltraMemError, match=r"lacks memory\.layers\.1\.keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"num_key": 3}, r"memory\.num_key: unknown field of MemoryConfig"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"insertion": "7:7"}, "block 7 does not exist"),
        ({"query_conv": 3}, "query_conv=3: must be 0, .*; leave it out"),
    ],
)
def test_wrong_configurations(memory: dict[str, Any], message: str, make_model: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model(memory=memory)


def test_all_fields_of_the_memory_are_stored(tmp_path: Path) -> None:
    UltraMemConfig(memory={"num_keys": 6}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["memory"]["query_per_rank"] is True
    assert stored["memory"]["top_k"] == 32
    assert AutoConfig.from_pretrained(tmp_path).memory == stored["memory"]


def greedy(model: UltraMemForCausalLM, tokens: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Tokens by the definition: a whole pass for each, each row alone."""
    rows = []
    for number, row in enumerate(tokens):
        row = row if mask is None else row[mask[number] == 1]
        start = len(row)
        for _ in range(count):
            logits = model(row[None], use_cache=False).logits[0, -1]
            row = torch.cat([row, logits.argmax()[None]])
            if row[-1] == model.config.eos_token_id:
                break
        new = row[start:]
        rows.append(torch.nn.functional.pad(new, (0, count - len(new)), value=model.config.pad_token_id))
    return torch.stack(rows)


@kinds
@torch.no_grad()
def test_greedy_generation(kind: str, make_model: Make, tokens: Tensor) -> None:
    model = make_model(kind)
    found = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[:, 12:], greedy(model, tokens, 8)[:, : found.shape[1] - 12])


@torch.no_grad()
def test_left_padding(make_model: Make, tokens: Tensor) -> None:
    model = make_model()
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, :2] = 0, 0
    found = model.generate(tokens.where(mask == 1, 1), attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[:, 12:], greedy(model, tokens, 8, mask)[:, : found.shape[1] - 12])


@kinds
@torch.no_grad()
def test_static_cache(kind: str, make_model: Make, tokens: Tensor) -> None:
    model = make_model(kind)
    options = {"max_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), dynamic)


@kinds
@torch.no_grad()
def test_generation_takes_what_is_folded(kind: str, make_model: Make, tokens: Tensor) -> None:
    model, options = make_model(kind), {"max_new_tokens": 6, "do_sample": False}
    layer = model.memory.layers[0]
    with patch.object(decoding.Fold, "of", autospec=True, side_effect=decoding.Fold.of) as used:
        found = model.generate(tokens, **options)
    assert sum(call.args[1] is layer for call in used.mock_calls) == 6
    with patch.object(decoding, "MOST_TOKENS", 0):
        assert torch.equal(model.generate(tokens, **options), found)


@kinds
@torch.no_grad()
def test_decoding_step_compiles_whole(kind: str, make_model: Make, tokens: Tensor) -> None:
    model = make_model(kind)
    expected = model(tokens, use_cache=False).logits[:, -1]
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens[:, :-1], past_key_values=cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=tokens[:, -1:], past_key_values=cache, position_ids=torch.tensor([[11]])).logits[:, -1]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_loaded_model_compiles_whole_at_once(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = torch.compile(loaded, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits)


@pytest.mark.gpu
@kinds
@torch.no_grad()
def test_generation_on_a_gpu(kind: str, make_model: Make, tokens: Tensor) -> None:
    """With the kernels, also compiled whole for the static cache: what the CPU generates."""
    model = make_model(kind)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # as with padding on the left
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, attention_mask=mask, **options)
    beams = model.generate(tokens, attention_mask=mask, num_beams=3, **options)
    model, tokens, mask = model.cuda(), tokens.cuda(), mask.cuda()
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options).cpu(), expected)
    assert torch.equal(model.generate(tokens, attention_mask=mask, num_beams=3, **options).cpu(), beams)
    model.forward = torch.compile(model.forward, fullgraph=True)  # type: ignore[method-assign]
    options |= {"cache_implementation": "static"}
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options).cpu(), expected)
    torch.compiler.reset()


@torch.no_grad()
def test_beams_and_sampling(make_model: Make, tokens: Tensor) -> None:
    model = make_model()
    beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False)

    def score(sequences: Tensor) -> Tensor:
        logits = model(sequences).logits.log_softmax(-1)[:, 11:-1]
        return logits.gather(-1, sequences[:, 12:, None]).sum((1, 2))

    one = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
    assert (score(beams) >= score(one) - 1e-4).all()
    torch.manual_seed(3)
    first = model.generate(tokens, max_new_tokens=5, do_sample=True, top_k=5)
    torch.manual_seed(3)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=True, top_k=5), first)


def test_device_map(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make_model()
    model.save_pretrained(tmp_path)
    for placement in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placement)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_memory_left_on_disk_is_refused(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path)
    placement = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placement |= {"model.rotary_emb": "cpu", "model.memory": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placement, offload_folder=tmp_path / "offload")
    with pytest.raises(UltraMemError, match="device_map"):
        loaded(tokens)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@kinds
def test_gradient_checkpointing(kind: str, make_model: Make, tokens: Tensor) -> None:
    model = make_model(kind).train()
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_auxiliary_losses_join_the_loss_in_training(make_model: Make, tokens: Tensor) -> None:
    model = make_model(memory={"balance_coef": 0.5})
    plain = model(tokens, labels=tokens).loss
    with_losses = model.train()(tokens, labels=tokens).loss
    auxiliary = model.memory.auxiliary_loss()
    assert auxiliary is not None
    assert auxiliary > 0.1
    torch.testing.assert_close(with_losses, plain + auxiliary)
    torch.testing.assert_close(model(tokens, labels=tokens, return_dict=False)[0], plain + auxiliary)
    # A micro-batch with half of the batch's labels has half of the auxiliary loss.
    half = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(2 * 33)).loss
    torch.testing.assert_close(half, (plain + auxiliary) / 2)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}


def test_trainer(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    """The loss falls; what ranks the keys follows the cores, in the saved model as well."""
    pytest.importorskip("accelerate")
    model = make_model()
    before = model(tokens, labels=tokens).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=3, learning_rate=1e-2,
        report_to=[], save_strategy="steps", save_steps=8, disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(tokens))
    trainer.train()
    assert model.eval()(tokens, labels=tokens).loss.item() < before / 2
    layer = model.memory.layers[0]
    u, t = layer.u.clone(), layer.t.clone()
    layer.refresh()
    torch.testing.assert_close((layer.u, layer.t), (u, t))
    left, _, _ = torch.linalg.svd(layer.cores.detach().sum(0))
    assert ((left[..., 0] * u).sum(-1).abs() > 1 - 1e-5).all()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-32")
    assert_same_state(saved, model)


def test_trainer_with_the_rowwise_optimizer(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    """Its state has a number for each row; it goes on from a checkpoint as if it had not stopped."""
    pytest.importorskip("accelerate")

    def train(model: UltraMemForCausalLM, resume: str | None) -> RowwiseAdamW:
        memory = model.memory
        optimizer = RowwiseAdamW(memory.parameter_groups(1e-2, model), tables=memory.tables)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            report_to=[], save_strategy="steps", save_steps=8, disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(tokens), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return optimizer

    model = make_model()
    again = copy.deepcopy(model)
    before = model(tokens, labels=tokens).loss.item()
    optimizer = train(model, None)
    assert model.eval()(tokens, labels=tokens).loss.item() < before / 2
    values = model.memory.table.values
    assert optimizer.state[values]["row_squares"].shape == (len(values),)
    train(again, str(tmp_path / "checkpoint-8"))
    assert_same_state(again, model)


def test_copies_train_by_themselves(make_model: Make, tokens: Tensor) -> None:
    model = make_model().train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    twin(tokens, labels=tokens).loss.backward()
    optimizer.step()
    layer = twin.memory.layers[0]
    left, _, _ = torch.linalg.svd(layer.cores.detach().sum(0))
    assert ((left[..., 0] * layer.u).sum(-1).abs() > 1 - 1e-6).all()
    assert not torch.equal(twin.memory.table.values, model.memory.table.values)
    assert model.memory.table.values.grad is None


def test_lora_on_the_dense_parts(make_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    before = model(tokens).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4))
    assert torch.equal(adapted(tokens).logits, before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name and "memory" not in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted.train()(tokens, labels=tokens).loss.backward()
    optimizer.step()
    adapted.eval()
    changed = adapted(tokens).logits
    assert not torch.equal(changed, before)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(again(tokens).logits, changed)
    torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, changed, rtol=1e-4, atol=1e-5)


def test_loaded_by_trusted_code_and_saved_again(make_model: Make, tmp_path: Path) -> None:
    """The second directory is as the first: no copy of the library's source, which the next version could not read."""
    make_model("ultramem_v2").save_pretrained(tmp_path / "first")
    code = (
        "import sys\nfrom transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "first, second = sys.argv[1:]\n"
        "for auto in (AutoModel, AutoModelForCausalLM):\n"
        "    model = auto.from_pretrained(first, trust_remote_code=True)\n"
        "    model.save_pretrained(second)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "first", tmp_path / "second"], check=True)
    first, second = ({path.name for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second
    config, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert config["auto_map"] == again["auto_map"]
    assert config["auto_map"]["AutoConfig"] == "modeling_ultramem.UltraMemConfig"


def test_parameters_alone_on_meta(make_model: Make) -> None:
    """Some loaders put parameters on `meta` and keep buffers: then `u`, `t` and the permutation have memory."""
    config = make_model("ultramem_v2").config

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), False))

    register = nn.Module.register_parameter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_meta)
        model = UltraMemModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
