"""Arguments: sources in order, values of the right type, names checked, contradictions raised."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from modeling.pretrained import SETTINGS
from train.arguments import TrainingArguments, parse_arguments
from train.build import build_terms
from train.main_sr_pixel_loss import main

PARTS = {"finetune_from_hf": False, "llm_path": "qwen", "vit_path": "siglip", "model_path": "vae"}


def yaml_file(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_later_sources_win_and_are_remembered(tmp_path):
    base = yaml_file(tmp_path / "base.yaml", "lr: 1e-3\nsave_every: 10\nlog_every: 5\n")
    middle = yaml_file(tmp_path / "sub" / "m.yaml", "extends: ../base.yaml\nsave_every: 20\n")
    top = yaml_file(tmp_path / "sub" / "t.yaml", "extends: m.yaml\nmodel_path: weights\n")
    args = parse_arguments(["--config", top, "--log_every=7", "--vit_rope", "True"])
    training = args.training
    assert (training.lr, training.save_every, training.log_every) == (0.001, 20, 7)
    assert (args.model.model_path, args.model.vit_rope) == ("weights", True)
    assert training.total_steps == 500_000
    assert args.sources == {
        "lr": f"{base}:1",
        "save_every": f"{tmp_path / 'sub' / 'm.yaml'}:2",
        "model_path": f"{top}:2",
        "log_every": "command line",
        "vit_rope": "command line",
    }
    assert base != middle and args.config == top
    table = args.table().splitlines()
    assert len(table) == len(args.flat())
    row = {line.split()[0]: line.split()[1:] for line in table}
    assert row["log_every"] == ["7", "command", "line"]
    assert row["total_steps"] == ["500000", "default"]
    args.save(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved == {"config": top, "arguments": args.flat(), "sources": args.sources}


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--bf16"], True),
        (["--bf16", "--lr", "1"], True),
        (["--vit_rope", "--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16=FALSE"], False),
        (["--bf16", "False"], False),
        ([], False),
    ],
)
def test_flags(argv, value):
    assert parse_arguments(argv).training.bf16 is value


def test_flags_in_yaml(tmp_path):
    config = yaml_file(tmp_path / "a.yaml", "bf16: yes\nauto_resume: false\nvit_rope: null\n")
    args = parse_arguments(["--config", config, "--wandb_name", "007"])
    assert args.training.wandb_name == "007"
    assert (args.training.bf16, args.training.auto_resume, args.model.vit_rope) == (
        True,
        False,
        None,
    )


def test_values_keep_their_types():
    args = parse_arguments(["--lr", "1e-5", "--total_steps", "10", "--resume_from", "None"])
    assert (args.training.lr, args.training.total_steps) == (1e-5, 10)
    assert args.training.resume_from is None
    args = parse_arguments(["--max_latent_size", "32", "--timestep_shift", "4", "--local-rank=-1"])
    found = args.model.max_latent_size, args.training.timestep_shift, args.training.local_rank
    assert found == (32, 4.0, -1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bf16", "1"], "command line: bf16='1' is no bool"),
        (["--total_steps", "1e3"], "command line: total_steps='1e3' is no int"),
        (["--lr", "fast"], "command line: lr='fast' is no float"),
        (["--max_latent_size", "big"], "max_latent_size='big' is no int"),
        (
            ["--ssim_los_weight", "1"],
            "unknown argument 'ssim_los_weight'; did you mean 'ssim_loss_weight'?",
        ),
        (["--qqqq", "1"], "command line: unknown argument 'qqqq'"),
        (["lr", "1"], "'lr' belongs to no --argument"),
        (["--checkpoint_dir", "--lr", "1"], "command line: --checkpoint_dir needs a value"),
        (["--results_dir"], "command line: --results_dir needs a value"),
        (["--total_steps"], "command line: --total_steps needs a value"),
        (["--lr", "--bf16"], "command line: --lr needs a value"),
        (["--config"], "command line: --config needs a value"),
        (["--config", ""], "--config: .: there is no such file"),
        (["--checkpoint_dir", ""], "command line: checkpoint_dir='' is empty"),
        (["--results_dir="], "command line: results_dir='' is empty"),
        (["--model_path="], "command line: model_path='' is empty"),
        (["--resume_from="], "command line: resume_from='' is empty"),
        (["--dataset_config_file="], "command line: dataset_config_file='' is empty"),
        (["--data_root="], "command line: data_root='' is empty"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\ntotl_steps: 3\n", "2: unknown argument 'totl_steps'; did you mean 'total_steps'?"),
        ("# x\n\nwarmup_steps: 0.5\n", "3: warmup_steps=0.5 is no int"),
        ("total_steps: true\n", "1: total_steps=True is no int"),
        ("lr: [1, 2]\n", "1: lr=[1, 2] is no float"),
        ("lr: null\n", "1: lr=None is no float"),
        ("checkpoint_dir: null\n", "1: checkpoint_dir=None is no str"),
        ("wandb_name: 007\n", "1: wandb_name=7 is no str: quote it"),
        ("lr: 1\nwandb_name: 1.10\n", "2: wandb_name=1.1 is no str: quote it"),
        ("wandb_name: no\n", "1: wandb_name=False is no str: quote it"),
        ("model_path: 7\n", "1: model_path=7 is no str: quote it"),
        ("lr: 1\nmodel_path: [a]\n", "2: model_path=['a'] is no str"),
        ("lr: 1\nema: 1.5\n", "2: ema=1.5 is no decay in [0, 1)"),
        ("lr: 1\nema: 0.9\nlr: 2\n", "3: lr stands in {path}:1 already"),
        ("- lr\n", " a mapping of arguments is expected"),
        ("lr: {\n", " no YAML: while parsing a flow node\nexpected the node content, but found "),
    ],
)
def test_mistakes_in_yaml_name_file_and_line(tmp_path, text, message):
    config = yaml_file(tmp_path / "a.yaml", text)
    with pytest.raises(ValueError) as caught:
        parse_arguments(["--config", config])
    assert str(caught.value).startswith(f"{config}:{message.format(path=config)}")


def test_files_that_extend_each_other(tmp_path):
    a = yaml_file(tmp_path / "a.yaml", "extends: b.yaml\n")
    yaml_file(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ValueError, match="extends"):
        parse_arguments(["--config", a])
    with pytest.raises(ValueError, match=r"--config: .*nowhere.yaml: there is no such file"):
        parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"visual_gen": False, "ssim_loss_weight": 1}, "ssim_loss_weight need the VAE decoder"),
        ({"visual_gen": False, "pixel_loss_weight": 1}, "pixel_loss_weight and"),
        ({"init_from_scratch": True, "finetune_from_ema": True}, "contradict each other"),
        ({"freeze_vae": False}, "freeze_vae=False"),
        ({"ssim_window_size": 10}, "ssim_window_size=10 must be odd"),
        ({"ssim_window_size": -1}, "ssim_window_size=-1 must be odd"),
        ({"pixel_loss_type": "l3"}, "pixel_loss_type='l3' is none of l1, l2, mse"),
        ({"pixel_loss_max_t": 0}, "pixel_loss_max_t=0.0 is not in (0, 1]"),
        ({"ssim_loss_max_t": 1.5}, "ssim_loss_max_t=1.5 is not in (0, 1]"),
        ({"lr_scheduler": "linear"}, "lr_scheduler='linear'"),
        ({"ema": 1.0}, "ema=1.0 is no decay in [0, 1)"),
        ({"text_cond_dropout_prob": 1.1}, "text_cond_dropout_prob=1.1 is no probability"),
        ({"vit_cond_dropout_prob": -0.1}, "vit_cond_dropout_prob=-0.1 is no probability"),
        ({"pixel_space_t_fraction": 0.5}, "needs pixel_loss_weight or ssim_loss_weight above 0"),
        ({"full_noise_fraction": 30}, "full_noise_fraction=30.0"),
        ({"max_checkpoints": 0}, "max_checkpoints=0"),
        ({"max_checkpoints": -1}, "max_checkpoints=-1"),
        ({"save_every": 0}, "save_every=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"ce_weight": -1}, "ce_weight=-1"),
        ({"ssim_loss_weight": -0.5}, "ssim_loss_weight=-0.5"),
        ({"lr": 0}, "lr=0"),
        ({"lr": "nan"}, "lr=nan"),
        ({"min_lr": -1}, "min_lr=-1.0 must not be negative"),
        ({"lr_scheduler": "cosine", "lr": 1, "min_lr": 2}, "min_lr=2.0 exceeds lr=1.0"),
        ({"llm_lr": 0}, "llm_lr=0.0 must be positive"),
        ({"spike_sigma": 0}, "spike_sigma=0.0 must be positive"),
        ({"max_grad_norm": 0}, "max_grad_norm=0.0 must be positive"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
        ({"hang_timeout": -1}, "hang_timeout=-1.0 must not be negative"),
        ({"hang_timeout": "inf"}, "hang_timeout=inf must not be negative or infinite"),
        ({"num_shard": 0}, "num_shard=0 must be at least 1"),
        ({"val_num_timesteps": 1}, "val_num_timesteps=1 must be at least 2"),
        ({"zero_stage": 4, "backend": "deepspeed"}, "zero_stage=4 is none of 1, 2, 3"),
        ({"backend": "ddp"}, "backend='ddp' is none of auto, single, fsdp, deepspeed"),
        ({"sharding_strategy": "SHARD"}, "sharding_strategy='SHARD' is none of HYBRID_SHARD"),
        ({"backward_prefetch": "x"}, "backward_prefetch='x' is none of BACKWARD_PRE"),
        ({"expected_num_tokens": 9, "max_num_tokens": 8}, "expected_num_tokens=9 exceeds max_num"),
        ({"init_from_scratch": True, "resume_from": "x"}, "init_from_scratch and resume_from=x"),
        (
            {"resume_model_only": True, "resume_model_optimizer": True},
            "resume_model_only=True and resume_model_optimizer=True contradict each other",
        ),
        ({"resume_from": "x", "finetune_from_ema": True}, "finetune_from_ema=True would replace"),
        (
            {"finetune_from_hf": False},
            "finetune_from_hf=False needs llm_path, vit_path, model_path",
        ),
        (
            {"finetune_from_hf": False, "llm_path": "qwen", "vit_path": "siglip"},
            "finetune_from_hf=False needs model_path",
        ),
        (
            PARTS | {"finetune_from_ema": True},
            "finetune_from_ema has no use with finetune_from_hf=",
        ),
        (
            PARTS | {"init_from_scratch": True},
            "init_from_scratch and finetune_from_hf=False contra",
        ),
        ({"use_flex": True, "attention_backend": "sdpa"}, "use_flex=True and attention_backend"),
        ({"freeze_vit": True, "vit_lr": 1}, "vit_lr=1.0 has nothing to train with freeze_vit=True"),
        ({"freeze_mot_und": True, "mot_und_lr": 1}, "mot_und_lr=1.0 has nothing to train"),
        ({"freeze_und": True, "vit_lr": 1}, "vit_lr=1.0 has nothing to train with freeze_und=True"),
        ({"freeze_und": True, "mot_und_lr": 1}, "mot_und_lr=1.0 has nothing to train with freeze"),
        ({"freeze_llm": True, "mot_und_lr": 1}, "mot_und_lr=1.0 has nothing to train with freeze"),
        ({"freeze_llm": True, "mot_gen_lr": 1}, "mot_gen_lr=1.0 has nothing to train with freeze"),
        ({"llm_lr": 1, "mot_gen_lr": 1}, "llm_lr and mot_und_lr or mot_gen_lr"),
        (
            {"lora_rank": 4, "freeze_mot_gen": True},
            "lora_rank=4 freezes the language model: drop freeze_mot_gen",
        ),
        (
            {"lora_rank": 4, "freeze_llm": True, "freeze_mot_und": True},
            "lora_rank=4 freezes the language model: drop freeze_llm and freeze_mot_und",
        ),
        ({"lora_rank": 4, "lora_targets": ", "}, "lora_rank=4 needs lora_targets"),
        ({"backend": "deepspeed", "num_shard": 8}, "num_shard=8 needs backend=fsdp, not deepspeed"),
        ({"backend": "deepspeed", "cpu_offload": True}, "cpu_offload=True needs backend=fsdp"),
        ({"backend": "fsdp", "zero_stage": 3}, "zero_stage=3 needs backend=deepspeed, not fsdp"),
        ({"backend": "single", "num_shard": 2}, "num_shard=2 needs backend=fsdp, not single"),
        ({"backend": "single", "cpu_offload": True}, "cpu_offload=True needs backend=fsdp, not s"),
        (
            {"backend": "single", "sharding_strategy": "FULL_SHARD"},
            "sharding_strategy=FULL_SHARD needs backend=fsdp, not single",
        ),
        ({"backend": "single", "zero_stage": 3}, "zero_stage=3 needs backend=deepspeed, not"),
        ({"ds_config_file": "ds.json"}, "ds_config_file=ds.json needs backend=deepspeed, not auto"),
        (
            {"backend": "deepspeed", "zero_stage": 3, "ds_config_file": "ds.json"},
            "zero_stage=3 would be overruled by ds_config_file=ds.json",
        ),
        (
            {"wandb_offline": True, "enable_wandb": False},
            "wandb_offline=True and enable_wandb=False",
        ),
        ({"val_every": 5}, "val_every and enable_validation need val_dataset_config_file"),
        ({"enable_validation": True}, "enable_validation needs val_every above 0"),
        ({"best_metrics": "val/ce"}, "best_metrics=val/ce needs val_every above 0"),
    ],
)
def test_contradictions_are_raised(values: dict[str, Any], message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments([f"--{name}={value}" for name, value in values.items()])


def test_all_mistakes_are_told_at_once_with_their_places(tmp_path):
    config = yaml_file(tmp_path / "a.yaml", "lr: -1\nfinetune_from_ema: true\n")
    argv = ["--config", config, "--ema", "2", "--init_from_scratch"]
    with pytest.raises(ValueError) as caught:
        parse_arguments(argv)
    assert str(caught.value).splitlines() == [
        f"{config}:1: lr=-1.0 must be positive and finite",
        "command line: ema=2.0 is no decay in [0, 1)",
        f"command line, {config}:2: init_from_scratch and finetune_from_ema contradict each other",
    ]
    with pytest.raises(ValueError) as caught:
        parse_arguments(["--lr", "fast", "--emma", "1"])
    assert str(caught.value).splitlines() == [
        "command line: lr='fast' is no float",
        "command line: unknown argument 'emma'; did you mean 'ema'?",
    ]


def test_what_arguments_imply():
    args = parse_arguments(["--use_flex", "--resume_model_only", "--resume_from", "x"])
    assert (args.model.attention_backend, args.sources["attention_backend"]) == ("flex", "use_flex")
    assert not args.training.resume_model_optimizer
    assert args.sources["resume_model_optimizer"] == "resume_model_only"
    args = parse_arguments(["--val_every=5", "--val_dataset_config_file=v.yaml", "--wandb_offline"])
    assert args.training.enable_validation and args.training.enable_wandb
    args = parse_arguments(["--val_every=5", "--enable_validation=False"])
    assert (args.training.val_every, args.sources["val_every"]) == (0, "enable_validation")
    assert parse_arguments(["--num_workers=0", "--prefetch_factor=4"]).data.prefetch_factor == 4
    assert parse_arguments(["--max_grad_norm=inf"]).training.max_grad_norm == math.inf


@pytest.mark.parametrize(
    ("argv", "warnings"),
    [
        (["--vae_lr=1"], ["command line: vae_lr: No effect: the autoencoder is frozen."]),
        (["--e2e_lr=1"], ["command line: e2e_lr: No effect: "]),
        (["--pixel_loss_paired_only"], ["command line: pixel_loss_paired_only: No effect: "]),
        (["--pixel_loss_use_v0=False"], ["command line: pixel_loss_use_v0: No effect: "]),
        (["--backward_prefetch=None"], ["command line: backward_prefetch: No effect: FSDP2"]),
        (["--local_rank=3"], []),
        (["--llm_path=q"], ["command line: llm_path=q is not read with finetune_from_hf=True"]),
        (["--vit_path=v"], ["command line: vit_path=v is not read with finetune_from_hf=True"]),
        (
            ["--layer_module=Qwen2MoTDecoderLayer_with_hidden_outputs"],
            ["command line: layer_module=Qwen2MoTDecoderLayer_with_hidden_outputs means Qwen2MoTD"],
        ),
        (
            ["--warmup_steps=9", "--total_steps=8"],
            ["command line: warmup_steps=9 exceeds total_steps=8: lr=0.0001 is never reached"],
        ),
        (["--vae_lr=1", "--e2e_lr=1"], ["command line: vae_lr", "command line: e2e_lr"]),
        (
            ["--lora_rank=4", "--freeze_und"],
            ["command line: lora_rank=4: freeze_und freezes one expert's adapters"],
        ),
        (["--freeze_llm", "--freeze_mot_gen"], ["command line: freeze_llm already freezes what"]),
        (["--freeze_und", "--freeze_mot_und"], ["command line: freeze_und already freezes what"]),
        (["--freeze_und", "--freeze_vit"], ["command line: freeze_und already freezes what"]),
        (["--lora_alpha=8"], ["command line: lora_alpha has no effect without lora_rank"]),
        (["--val_steps=8"], ["command line: val_steps has no effect without val_every"]),
        # Adapters have the learning rates of what they adapt.
        (["--lora_rank=4", "--llm_lr=1"], []),
        (["--lora_rank=4", "--mot_und_lr=1", "--mot_gen_lr=2"], []),
        (["--freeze_und", "--llm_lr=1"], []),
        (["--freeze_mot_und", "--freeze_mot_gen", "--llm_lr=1"], []),
    ],
)
def test_what_has_no_effect_is_told_once(argv, warnings):
    args = parse_arguments(argv)
    told = args.table().splitlines()[len(args.flat()) :]
    assert len(told) == len(args.warnings) == len(warnings)
    for line, warning in zip(told, warnings, strict=True):
        assert line.startswith(f"WARNING: {warning}")


def test_variables_of_former_trainers_are_told_to_have_no_effect(monkeypatch):
    for name in ("TRAIN_STEP_BARRIER", "PIXEL_LOSS_USE_V0"):
        assert parse_arguments([]).warnings == []
        monkeypatch.setenv(name, "1")
        (warning,) = parse_arguments([]).warnings
        assert warning == f"{name} of the environment: No effect"
        monkeypatch.delenv(name)


def test_the_default_layer_of_former_trainers():
    argv = ["--layer_module", "Qwen2MoTDecoderLayer_with_hidden_outputs"]
    assert parse_arguments(argv).model.layer_module == "Qwen2MoTDecoderLayer"


USERS_DEFAULTS = """
model_path=hf/BAGEL-7B-MoT llm_path=hf/Qwen2.5-0.5B-Instruct/ llm_qk_norm=True
tie_word_embeddings=False layer_module=Qwen2MoTDecoderLayer_with_hidden_outputs
vit_path=hf/siglip-so400m-14-980-flash-attn2-navit/ max_latent_size=32 latent_patch_size=2
vit_patch_size=14 vit_max_num_patch_per_side=70 connector_act=gelu_pytorch_tanh
interpolate_pos=False vit_select_layer=-2 vit_rope=False text_cond_dropout_prob=0.1
vae_cond_dropout_prob=0.3 vit_cond_dropout_prob=0.3 dataset_config_file=data/configs/example.yaml
prefetch_factor=2 num_workers=4 max_num_tokens_per_sample=16384 max_num_tokens=36864
prefer_buffer_before=16384 max_buffer_size=50 data_seed=42 visual_gen=True visual_und=True
max_checkpoints=5 results_dir=output checkpoint_dir=results/checkpoints
wandb_name=med_bagel_project wandb_offline=False enable_tensorboard=True global_seed=4396
auto_resume=True resume_from=None resume_model_only=False resume_model_optimizer=True
finetune_from_ema=False finetune_from_hf=False log_every=10 save_every=2000 total_steps=500000
warmup_steps=2000 lr_scheduler=constant lr=0.0001 min_lr=1e-07 e2e_lr=None vae_lr=None vit_lr=None
llm_lr=None beta1=0.9 beta2=0.95 eps=1e-15 ema=0.9999 max_grad_norm=1.0 timestep_shift=1.0
mse_weight=1.0 pixel_loss_weight=0.0 pixel_loss_type=l1 pixel_loss_max_t=0.3
pixel_loss_paired_only=True pixel_loss_chunk_size=2 pixel_loss_adaptive_chunk=True
pixel_loss_use_v0=False ssim_loss_weight=0.0 ssim_loss_max_t=0.1 ssim_window_size=11
ssim_grad_scale=0.1 ce_weight=1.0 ce_loss_reweighting=False expected_num_tokens=32768
num_replicate=1 num_shard=8 sharding_strategy=HYBRID_SHARD backward_prefetch=BACKWARD_PRE
cpu_offload=False freeze_llm=False freeze_vit=False freeze_vae=True freeze_und=False
copy_init_moe=True use_flex=False zero_stage=2 ds_config_file=None local_rank=-1 mot_und_lr=None
mot_gen_lr=None freeze_mot_und=False freeze_mot_gen=False print_param_details=True
validate_freezing=False enable_validation=False val_dataset_config_file=None val_every=10
val_steps=50
"""
"""Every argument of the trainers that users have today."""
OTHER_DEFAULTS = dict.fromkeys(
    (
        *("model_path", "llm_path", "vit_path", "dataset_config_file", "results_dir"),
        *("llm_qk_norm", "tie_word_embeddings", "layer_module", "max_latent_size"),
        *("latent_patch_size", "vit_patch_size", "vit_max_num_patch_per_side", "connector_act"),
        *("interpolate_pos", "vit_select_layer", "vit_rope", "timestep_shift", "num_shard"),
        "num_replicate",
        *("pixel_loss_paired_only", "pixel_loss_use_v0"),
    )
) | {"num_workers": 1, "val_every": 0, "finetune_from_hf": True, "print_param_details": False}
"""Ours where they differ: nothing is taken from a folder or a size that nobody has named."""


def test_every_argument_that_users_have_is_accepted():
    users = dict(entry.split("=") for entry in USERS_DEFAULTS.split())
    ours = parse_arguments([]).flat()
    assert len(users) == 96 and not users.keys() - ours.keys()
    for name, default in users.items():
        if name in OTHER_DEFAULTS:
            assert ours[name] == OTHER_DEFAULTS[name] and str(ours[name]) != default, name
        else:
            assert str(ours[name]) == default or float(default) == ours[name], name
    args = parse_arguments([f"--{name}={value}" for name, value in users.items()])
    assert {warning.split()[2].partition("=")[0] for warning in args.warnings} == {
        "e2e_lr:", "vae_lr:", "pixel_loss_paired_only:", "pixel_loss_use_v0:", "layer_module",
        "backward_prefetch:", "enable_validation:",
    }  # fmt: skip


def test_every_argument_is_explained(capsys):
    main(["--help"])
    told = capsys.readouterr().out
    for name, value in parse_arguments([]).flat().items():
        entry = re.search(rf"^--{name} (.*)\n((?:    .+\n?)+)", told, re.MULTILINE)
        assert entry is not None and entry.group(1) == str(value), name
        assert entry.group(2).rstrip().endswith("."), name
    assert "0.9999" in told and "Decay of the exponential moving average of the weights" in told


def test_secrets_of_the_environment_stay_there(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"secret-of-{name}")
    args = parse_arguments(["--wandb_offline", "--results_dir", str(tmp_path)])
    args.save(tmp_path / "training_args.json")
    main(["--help"])
    written = (tmp_path / "training_args.json").read_text() + args.table() + capsys.readouterr().out
    assert "secret-of" not in written and "API_KEY" not in written
    with pytest.raises(ValueError, match="unknown argument 'wandb_api_key'") as caught:
        parse_arguments(["--wandb_api_key", "secret-of-mine"])
    assert "secret-of" not in str(caught.value)


def test_files_that_share_what_they_extend(tmp_path):
    """It comes once, below both; of the two the later wins."""
    yaml_file(tmp_path / "base.yaml", "lr: 1\nema: 0.1\nlog_every: 1\n")
    yaml_file(tmp_path / "left.yaml", "extends: base.yaml\nlr: 2\nema: 0.2\n")
    yaml_file(tmp_path / "right.yaml", "extends: base.yaml\nema: 0.3\n")
    top = yaml_file(tmp_path / "top.yaml", "extends: [left.yaml, right.yaml]\n")
    training = parse_arguments(["--config", top]).training
    assert (training.lr, training.ema, training.log_every) == (2, 0.3, 1)


def test_terms_of_a_run():
    def names(**values: Any) -> dict[str, float]:
        return {t.name: w for t, w in build_terms(TrainingArguments(**values))}

    assert names() == {"ce": 1.0, "mse": 1.0}
    assert names(visual_und=False, pixel_loss_weight=2) == {"mse": 1.0, "pixel": 2}
    assert names(visual_gen=False, ce_weight=0.25) == {"ce": 0.25}
    assert names(ce_weight=0, ssim_loss_weight=0.5) == {"mse": 1.0, "ssim": 0.5}
    with pytest.raises(ValueError, match="every loss weight is 0"):
        names(visual_und=False, visual_gen=False)
    settings = {"pixel_loss_type": "mse", "pixel_loss_max_t": 0.4, "pixel_loss_weight": 1}
    ssim = {"ssim_loss_weight": 1, "ssim_window_size": 7, "ssim_grad_scale": 0.5}
    terms = [term for term, _ in build_terms(TrainingArguments(**settings, **ssim))]
    assert (terms[2].power, terms[2].max_t) == (2, 0.4)
    assert (terms[3].max_t, terms[3].window_size, terms[3].grad_scale) == (0.1, 7, 0.5)


def test_every_model_size_can_be_overridden():
    defaults = {n.removeprefix("llm_"): v for n, v in parse_arguments([]).flat().items()}
    values = {name: defaults[name] for name in SETTINGS}
    ours = {"attention_backend": "sdpa", "freeze_und": False}
    assert {name: value for name, value in values.items() if value is not None} == ours
