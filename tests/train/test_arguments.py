"""Arguments: sources in order, values of the right type, names checked, contradictions raised."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from modeling.pretrained import SETTINGS
from train.arguments import TrainingArguments, parse_arguments
from train.build import build_terms


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
    args = parse_arguments(["--config", config])
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
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml"):
        parse_arguments(["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"visual_gen": False, "ssim_loss_weight": 1}, "ssim_loss_weight need the VAE decoder"),
        ({"visual_gen": False, "pixel_loss_weight": 1}, "pixel_loss_weight and"),
        ({"init_from_scratch": True, "finetune_from_ema": True}, "contradict each other"),
        ({"freeze_llm": True, "freeze_und": True}, "freeze_llm already freezes"),
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
    ],
)
def test_contradictions_are_raised(values: dict[str, Any], message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments([f"--{name}={value}" for name, value in values.items()])


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
