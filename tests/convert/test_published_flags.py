"""Training flags of the published code: what becomes of each, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from ultramem import MemoryConfig
from ultramem.configuration.yaml_text import parse_yaml
from ultramem.convert.published_flags import translate_flags
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.training import load_config

# The command in the published README, without some of the flags that have no equivalent.
PUBLISHED = r"""
sh launch.sh ${CONFIG_PATH} \
--save_folder=${SAVE_DIR} \
--run_name=${run_name} \
--save_overwrite=true \
--fsdp.sharding_strategy=NO_SHARD \
--model.init_std=0.02282177322938192 \
--model.init_fn="full_megatron" \
--model.d_model=768 \
--model.n_layers=20 \
--model.n_heads=12 \
--model.n_kv_heads=12 \
--model.weight_tying=true \
--max_duration=5e11T \
--scheduler.t_warmup=1e10 \
--scheduler.t_max=5e11 \
--device_train_microbatch_size=3 \
--global_train_batch_size=768 \
--save_interval=1000 \
--eval_interval=1000 \
--save_num_checkpoints_to_keep=-1 \
--console_log_interval=10 \
\
--model.block_type='sequential' \
--model.mlp_hidden_size=4992 \
\
--optimizer.mem_value_lr_times=4.0 \
--optimizer.mem_value_lr_max_steps_rate=1.0 \
--model.mem_insert_way='full' \
--model.mem_knum=360 \
--model.mem_kdim=192 \
--model.mem_vdim=192 \
--model.mem_pre_vdim=192 \
--model.mem_knn=32 \
--model.mem_head=1 \
--model.mem_share_ratio=0.5 \
--model.mem_type='ultramem_v2' \
--model.mem_value_expand_time=1 \
\
--distributed_strategy=ddp \
--model.init_device='cuda' \
--model.mem_log_interval=50
"""
COMPLETE = (
    "--model.d_model=64 --model.n_layers=4 --model.n_heads=2 --model.mlp_hidden_size=96 --model.weight_tying=true "
    "--model.block_type=sequential --model.max_sequence_length=128 --global_train_batch_size=8 --max_duration=100 "
)


def content_of(flags):
    return yaml.safe_load(translate_flags(flags))


def comments_of(flags):
    return [line for line in translate_flags(flags).splitlines() if line.startswith("#")]


def load(flags, path):
    (path / "run.yaml").write_text(translate_flags(flags))
    return load_config(path / "run.yaml", ["--data.directory=tokens", "--model.vocab_size=50304"])


def test_published_command():
    assert content_of(PUBLISHED) == {
        "model": {
            "d_model": 768,
            "num_blocks": 20,
            "num_heads": 12,
            "feed_forward_size": 2496,
            "tie_embeddings": True,
            "init_std": 0.02282177322938192,
            "memory": {
                "kind": "ultramem_v2",
                "num_keys": 360,
                "key_dim": 192,
                "value_dim": 192,
                "pre_value_dim": 192,
                "top_k": 32,
                "heads": 1,
                "query_per_rank": False,
                "key_expansion": 1,
                "value_projectors": "single",
                "share_ratio": 0.5,
                "insertion": "all",
                "output_dropout": 0.0,
                "balance_coef": 0.0,
                "norm_eps": 1e-5,
                "init": "published",
                "value_lr_multiplier": 4.0,
                "value_lr_decay": 1.0,
            },
        },
        "data": {"directory": None, "sequence_length": 4096},
        "trainer": {
            "directory": "runs/published",
            "batch_size": 768 * 4096,
            "tokens": 500_000_000_000,
            "micro_batch_size": 3 * 4096,
            "parallel": "ddp",
            "checkpoint_interval": 1000,
            "keep_checkpoints": None,
            "evaluate_interval": 1000,
            "metrics_interval": 10,
            "memory_metrics_interval": 50,
        },
        "schedule": {"warmup_steps": 3179},  # 1e10 / (768 * 4096), rounded up
    }
    assert comments_of(PUBLISHED) == [
        "# fill in: data.directory",
        "# skipped, and what it names is not read: sh launch.sh ${CONFIG_PATH}",
        "# not among the flags, so assumed: --model.max_sequence_length=4096",
        "# no equivalent: --save_folder=${SAVE_DIR} (a variable of the shell)",
        "# no equivalent: --run_name=${run_name} (a variable of the shell)",
        "# no equivalent: --save_overwrite=true",
        "# no equivalent: --fsdp.sharding_strategy=NO_SHARD",
        "# no equivalent: --model.init_device=cuda",
    ]


def test_published_command_loads(tmp_path):
    config = load(PUBLISHED, tmp_path)
    memory = MemoryConfig(
        num_keys=360,
        key_dim=192,
        value_dim=192,
        pre_value_dim=192,
        query_per_rank=False,
        share_ratio=0.5,
        init="published",
    )
    assert config.model == ModelConfig(
        d_model=768, num_blocks=20, num_heads=12, feed_forward_size=2496, init_std=0.02282177322938192, memory=memory
    )
    assert config.trainer.total_steps == 158_946  # 5e11 / (768 * 4096), rounded up
    assert config.optimizer.learning_rate == 4e-4


@pytest.mark.parametrize(
    "flags",
    [
        "--model.mem_knum=36 --model.mem_type=memory_plus",
        "--model.mem_knum 36 --model.mem_type memory_plus",
        "--mem_knum=36 --mem_type 'memory_plus'",
        "mem_knum=36 model.mem_type=memory_plus",
        "-model.mem_knum=36 --mem-type=memory_plus",
        "--mem_knum=9 --model.mem_knum=36 --mem_type=memory_plus",
        "--mem_knum=36 \\\n \\\r\n --mem_type=memory_plus",
        "torchrun --nproc_per_node=8 scripts/train.py configs/run.yaml --mem_knum=36 --mem_type=memory_plus",
        "A=1 python train.py a.yaml b.yaml mem_knum=36 mem_type=memory_plus",
        "${COMMAND} config.yaml --mem_knum=36 --mem_type=memory_plus",
    ],
)
def test_ways_to_write_flags(flags):
    memory = content_of(flags)["model"]["memory"]
    assert memory == {
        "kind": "memory_plus",
        "num_keys": 36,
        "key_dim": 512,
        "value_dim": 512,
        "top_k": 16,
        "heads": 1,
        "insertion": "all",
        "norm_eps": 1e-5,
        "init": "published",
    }
    assert not [line for line in comments_of(flags) if "no equivalent" in line]


def test_flag_without_value():
    assert "# no equivalent: --save_overwrite=true" in comments_of("--save-overwrite --mem_knum=36")
    assert content_of("--mem_use_glu_act --mem_knum=36")["model"]["memory"]["pre_activation"] == "gelu"


V2, V1, PLUS = (f"--mem_type={kind} " for kind in ("ultramem_v2", "ultramem_v1", "memory_plus"))


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (V1, "kind", "ultramem"),
        ("--mem_knn=8", "kind", "ultramem_v2"),
        (V2 + "--mem_q_for_each_tucker_rank=true", "query_per_rank", True),
        (V2 + "--mem_key_expand_time=2", "key_expansion", 2),
        (V2 + "--mem_key_expand_time=2 --mem_value_expand_time=4", "value_projectors", "per_block"),
        (V2 + "--mem_insert_way=no_mem", "insertion", "none"),
        (V2 + "--mem_insert_way=4:4", "insertion", "4:4"),
        (V2 + "--mem_insert_way=2:5/4:6", "insertion", "2:5/4:6"),
        (V2 + "--mem_use_glu_act=true", "pre_activation", "gelu"),
        (V2 + "--mem_key_balance_reg_coef=0.01", "balance_coef", 0.01),
        (V2 + "--mem_output_dropout_rate=0.1", "output_dropout", 0.1),
        (V1 + "--mem_value_lr_times=2", "value_lr_multiplier", 2),
        (V2 + "--optimizer.mem_value_lr_max_steps_rate=0.5", "value_lr_decay", 0.5),
        (V2 + "--layer_norm_eps=1e-6", "norm_eps", 1e-6),
    ],
)
def test_memory_flags(flags, key, value, tmp_path):
    memory = content_of(COMPLETE.replace("n_layers=4", "n_layers=8") + flags)["model"]["memory"]
    assert memory[key] == value
    load(COMPLETE.replace("n_layers=4", "n_layers=8") + flags, tmp_path)


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--model.embedding_size=512", "model.vocab_size", 512),
        ("--model.rope_theta=500000", "model.rope_theta", 500000),
        ("--model.layer_norm_eps=1e-6", "model.norm_eps", 1e-6),
        ("--seed=7", "model.seed", 7),
        ("--seed=7", "trainer.seed", 7),
        ("--save_folder=/runs/a", "trainer.directory", "/runs/a"),
        ("--run_name=a", "trainer.directory", "runs/a"),
        ("--max_duration=1e4", "trainer.steps", 10000),
        ("--precision=amp_bf16", "trainer.precision", "bfloat16"),
        ("--precision=fp32", "trainer.precision", "float32"),
        ("--distributed_strategy=fsdp", "trainer.parallel", "fsdp"),
        ("--activation_checkpointing=whole_layer", "trainer.activation_checkpointing", True),
        ("--activation_checkpointing=null", "trainer.activation_checkpointing", False),
        ("--save_num_checkpoints_to_keep=5", "trainer.keep_checkpoints", 5),
        ("--save_num_checkpoints_to_keep=-1", "trainer.keep_checkpoints", None),
        ("--optimizer.learning_rate=4e-4", "optimizer.learning_rate", 4e-4),
        ("--optimizer.betas='[0.9, 0.99]'", "optimizer.betas", [0.9, 0.99]),
        ("--optimizer.eps=1e-8", "optimizer.eps", 1e-8),
        ("--optimizer.weight_decay=0.2", "optimizer.weight_decay", 0.2),
        ("--max_grad_norm=null", "optimizer.max_grad_norm", None),
        ("--scheduler.name=linear_with_warmup", "schedule.kind", "linear"),
        ("--scheduler.alpha_f=0.2", "schedule.final_share", 0.2),
        ("--scheduler.t_warmup=10000", "schedule.warmup_steps", 10),  # 8 sequences of 128 tokens a step
        ("--scheduler.units=steps --scheduler.t_warmup=10", "schedule.warmup_steps", 10),
        ("--wandb.project=p --wandb.entity=e", "logging.wandb", {"project": "p", "entity": "e"}),
    ],
)
def test_other_flags(flag, key, value, tmp_path):
    text = translate_flags(COMPLETE + flag)
    content = parse_yaml(text, "text")
    for part in key.split("."):
        content = content[part]
    assert content == value
    assert "no equivalent" not in text
    load(COMPLETE + flag, tmp_path)


def test_no_memory():
    content = content_of(COMPLETE)
    assert "memory" not in content["model"]
    assert content["data"] == {"directory": None, "sequence_length": 128}
    assert content["trainer"] == {"directory": "runs/published", "batch_size": 1024, "steps": 100}
    assert comments_of(COMPLETE) == ["# fill in: data.directory"]


@pytest.mark.parametrize(
    "flags",
    [
        "--model.activation_type=swiglu --model.rope=true --model.include_bias=false --model.layer_norm_type=rms",
        "--model.residual_dropout=0.0 --model.init_fn=full_megatron --model.init_cutoff_factor=3 --model.clip_qkv=null",
        "--optimizer.name=adamw --optimizer.decay_embeddings=true --max_grad_norm_ratio=null",
        "--scheduler.units=tokens --scheduler.t_max=102400 --model.n_kv_heads=2",
        "--scheduler.units=steps --scheduler.t_max=100 --model.n_kv_heads=null",
        "--scheduler.t_max=null",
    ],
)
def test_what_is_always_so(flags):
    assert translate_flags(COMPLETE + flags) == translate_flags(COMPLETE)


@pytest.mark.parametrize(
    ("flags", "comment"),
    [
        ("--model.activation_type=gelu", '--model.activation_type=gelu (here "swiglu")'),
        ("--alibi=true", "--model.alibi=true (here false)"),
        ("--model.clip_qkv=8.0", "--model.clip_qkv=8.0 (here null)"),
        ("--model.n_kv_heads=1", "--model.n_kv_heads=1 (here 2)"),
        ("--model.init_fn=normal", '--model.init_fn=normal (here "full_megatron")'),
        ("--optimizer.name=lionw", '--optimizer.name=lionw (here "adamw")'),
        ("--scheduler.name=max_scheduler", "--scheduler.name=max_scheduler"),
        ("--scheduler.name='[1]'", "--scheduler.name=[1]"),
        ("--scheduler.t_max=7", "--scheduler.t_max=7 (the schedule ends with the training)"),
        ("--precision=amp_fp16", "--precision=amp_fp16"),
        ("--save_interval=-1", "--save_interval=-1"),
        ("--save_num_checkpoints_to_keep=0", "--save_num_checkpoints_to_keep=0"),
        ("--eval_interval=null", "--eval_interval=null"),
        ("--wandb.entity=e", "--wandb.entity=e"),
        ("--save_folder=/a --run_name=b", "--run_name=b"),
        ("--save_folder='/a' --note='x\ny'", "--note=x y"),
        ("--model.vocab_size=50280", "--model.vocab_size=50280"),
        ("--mem_value_lr_times=2", "--optimizer.mem_value_lr_times=2 (the model has no memory)"),
        ("--mem_type=none --mem_knum=3", "--model.mem_knum=3 (the model has no memory)"),
        (PLUS + "--mem_value_lr_times=2", "--optimizer.mem_value_lr_times=2 (memory_plus does not use it)"),
        (V1 + "--mem_share_ratio=0.5", "--model.mem_share_ratio=0.5 (ultramem_v1 does not use it)"),
        (
            V2 + "--mem_tucker_rank_penalty=0.1",
            "--model.mem_tucker_rank_penalty=0.1 (the published code does not apply it)",
        ),
        (V2 + "--mem_parallel_size=4", "--model.mem_parallel_size=4"),
        (V2 + "--mem_novelty=3", "--model.mem_novelty=3"),
        (V2 + "--mem_knn=$K", "--model.mem_knn=$K (a variable of the shell)"),
    ],
)
def test_no_equivalent(flags, comment, tmp_path):
    lines = translate_flags(COMPLETE + flags).splitlines()
    assert [line for line in lines if "no equivalent" in line] == [f"# no equivalent: {comment}"]
    load(COMPLETE + flags, tmp_path)


@pytest.mark.parametrize("duration", ["", "--max_duration=2ep", "--max_duration=${STEPS}"])
def test_length_of_training_is_open(duration):
    flags = COMPLETE.replace("--max_duration=100", duration)
    assert content_of(flags)["trainer"]["steps"] is None
    assert comments_of(flags)[0] == "# fill in: data.directory, trainer.steps"


def test_assumed_flags():
    assert comments_of("--mem_knum=36 --max_duration=10") == [
        "# fill in: data.directory",
        "# not among the flags, so assumed: --model.d_model=2048 --model.n_layers=16 --model.n_heads=16 "
        "--model.mlp_ratio=1 --model.weight_tying=false --model.block_type=sequential "
        "--model.max_sequence_length=4096 --global_train_batch_size=1024",
    ]
    content = content_of("--mem_knum=36")
    assert content["model"]["feed_forward_size"] == 1024
    assert content["trainer"]["batch_size"] == 1024 * 4096


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["flags: must not be empty"]),
        ("torchrun train.py run.yaml", ["flags: must not be empty"]),
        ("--mem_knum=36 37", ["'37'", "not a flag", "--NAME=VALUE"]),
        ("--mem_knum=36 --=3", ["'--=3'", "not a flag"]),
        ("--mem_knum='36", ["flags: No closing quotation"]),
        ("--mem_knum=many", ["--model.mem_knum='many'", "whole number"]),
        ("--mem_knum=0", ["--model.mem_knum: here model.memory.num_keys=0", "at least 1"]),
        ("--mem_knum={", ["--model.mem_knum", "not valid YAML"]),
        ("--mem_type=peer", ["--model.mem_type='peer'", "ultramem_v1, ultramem_v2, memory_plus"]),
        ("--mem_share_ratio=2", ["--model.mem_share_ratio", "share_ratio=2.0"]),
        ("--mem_insert_way=some", ["--model.mem_insert_way", "insertion='some'"]),
        ("--mem_insert_way=2:40", ["--model.mem_insert_way", "block 40"]),
        ("--mem_value_expand_time=3", ["--model.mem_value_expand_time=3", "must be 1"]),
        ("--mem_key_balance_reg_coef=-1", ["--model.mem_key_balance_reg_coef", "balance_coef=-1.0"]),
        ("--mem_knn=8 --mem_value_lr_times=x", ["--optimizer.mem_value_lr_times", "value_lr_multiplier='x'"]),
        ("--model.n_heads=7", ["--model.n_heads", "num_heads=7"]),
        ("--model.mlp_hidden_size=7", ["--model.mlp_hidden_size=7", "even"]),
        ("--model.mlp_hidden_size=0", ["--model.mlp_hidden_size", "feed_forward_size=0"]),
        ("--model.max_sequence_length=1", ["--model.max_sequence_length", "sequence_length=1"]),
        ("--model.max_sequence_length=x", ["--model.max_sequence_length='x'", "whole number"]),
        ("--global_train_batch_size=1.5", ["--global_train_batch_size='1.5'", "whole number"]),
        ("--global_train_batch_size=true", ["--global_train_batch_size='true'", "whole number"]),
        ("--global_train_batch_size=.nan", ["--global_train_batch_size='.nan'", "whole number"]),
        ("--device_train_microbatch_size=0", ["--device_train_microbatch_size='0'", "at least 1"]),
        ("--max_duration=long", ["--max_duration='long'", "5e11T"]),
        ("--max_duration=infT", ["--max_duration='infT'"]),
        ("--max_duration=0", ["--max_duration", "steps=0"]),
        (
            "--max_duration=10 --scheduler.t_warmup=1e9",
            ["--scheduler.t_warmup", "warmup_steps=239", "trainer.steps=10"],
        ),
        ("--scheduler.units=epochs", ["--scheduler.units='epochs'", "steps or tokens"]),
        ("--scheduler.t_warmup=-1", ["--scheduler.t_warmup='-1'", "at least 0"]),
        ("--scheduler.alpha_f=2", ["--scheduler.alpha_f", "final_share=2.0"]),
        ("--optimizer.learning_rate=0", ["--optimizer.learning_rate", "above 0"]),
        ("--optimizer.betas=0.9", ["--optimizer.betas", "must be a list"]),
        ("--save_interval=often", ["--save_interval", "checkpoint_interval='often'"]),
        ("--seed=x", ["--seed", "seed='x'"]),
    ],
)
def test_wrong_flags(flags, words):
    with pytest.raises(UltraMemError) as caught:
        translate_flags(flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
