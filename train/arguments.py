"""Arguments of a run: dataclasses, filled from YAML files and the command line.

Later sources win: defaults < YAML < command line. A YAML file `extends` another one or a list of
them, the later winning. Unknown names raise and name the nearest one.
The table of resolved values with the source of each is printed and saved with the run.
"""

import ast
import difflib
import inspect
import json
import os
import textwrap
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml

from data.config import read_yaml

from .argument_rules import contradictions, out_of_range, settle


@dataclass(kw_only=True)
class ModelArguments:
    model_path: str | None = None
    """Checkpoint folder in BAGEL's layout: configs, tokenizer, weights and autoencoder; with
    finetune_from_hf=False the autoencoder alone."""
    llm_path: str | None = None
    """Qwen2 folder (config, tokenizer, weights) to start from with finetune_from_hf=False."""
    vit_path: str | None = None
    """SigLIP folder (config, weights) to start from with finetune_from_hf=False."""
    llm_qk_norm: bool | None = None
    """Normalise queries and keys per head. None takes this and the following sizes from the
    checkpoint, with which a value must agree; with finetune_from_hf=False BAGEL's own are taken."""
    tie_word_embeddings: bool | None = None
    """Share the embedding of tokens with the language head."""
    layer_module: str | None = None
    """Decoder layer: Qwen2DecoderLayer, Qwen2MoEDecoderLayer or Qwen2MoTDecoderLayer."""
    max_latent_size: int | None = None
    """Side of the position table of latents, in latent patches."""
    latent_patch_size: int | None = None
    """Side of a latent patch (one token), in latent pixels."""
    vit_patch_size: int | None = None
    """Side of a ViT patch, in pixels."""
    vit_max_num_patch_per_side: int | None = None
    """Side of the position table of the ViT, in patches."""
    connector_act: str | None = None
    """Activation between ViT and language model, by its name in transformers."""
    interpolate_pos: bool | None = None
    """Spread positions over the table instead of counting from its corner."""
    vit_select_layer: int | None = None
    """ViT layer that is used, counted from the end: -1 is the last."""
    vit_rope: bool | None = None
    """Rotary positions in the ViT instead of a table."""
    attention_backend: str = "sdpa"
    """`sdpa` (everywhere) or `flex` (GPU)."""
    use_flex: bool = False
    """The same as attention_backend=flex."""
    text_cond_dropout_prob: float = 0.1
    """Probability that the text is left out of a sample, so that guidance can be used."""
    vae_cond_dropout_prob: float = 0.3
    """Probability that the latents of the input image are left out."""
    vit_cond_dropout_prob: float = 0.3
    """Probability that the ViT patches of the input image are left out."""
    lora_rank: int = 0
    """Rank of low-rank adapters of the language model, whose own weights are frozen; 0 is off."""
    lora_alpha: float = 16.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability of dropout before the adapters."""
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    """Comma-separated linear layers that get adapters, in both experts."""


@dataclass(kw_only=True)
class DataArguments:
    dataset_config_file: str | None = None
    """YAML data mixture."""
    data_root: str | None = None
    """Stands for ${data_root} in the mixture; default: the mixture's own folder."""
    data_seed: int = 42
    """Seed of the order of samples, their times and their noise."""
    expected_num_tokens: int = 32768
    """Tokens at which a pack is full."""
    max_num_tokens: int = 36864
    """Tokens that no pack exceeds."""
    max_num_tokens_per_sample: int = 16384
    """Tokens; longer samples are dropped and counted."""
    max_bad_share: float = 0.01
    """Share of a data set's samples that may be unusable (bad line, unreadable image); more end the
    run. They are left out and counted by reason."""
    prefer_buffer_before: int = 16384
    """Tokens; a smaller pack takes samples that did not fit into an earlier one first."""
    max_buffer_size: int = 50
    """Samples that may wait for a pack they fit into."""
    num_workers: int = 1
    """Processes per rank that read and decode images; 0 does it in the training process."""
    prefetch_factor: int = 2
    """Packs that each worker prepares ahead."""
    full_noise_fraction: float = 0.0
    """Share of the target images at t = 1, where few-step sampling starts."""


@dataclass(kw_only=True)
class TrainingArguments:
    visual_gen: bool = True
    """Train the velocity of VAE latents."""
    visual_und: bool = True
    """Train the cross-entropy of answers."""
    checkpoint_dir: str = "results/checkpoints"
    """Run folder: step folders, metrics.jsonl, training_args.json."""
    results_dir: str | None = None
    """Folder that gets a copy of the log lines; None writes no copy."""
    max_checkpoints: int = 5
    """Newest step folders that are kept."""
    best_metrics: str = ""
    """Comma-separated validation metrics; the best step folder of each is kept as well."""
    global_seed: int = 4396
    """Seed of weights and of everything but the data."""
    auto_resume: bool = True
    """Continue from the newest complete step folder of `checkpoint_dir`, if there is one, with its
    whole state: what a run starts from is then of no account."""
    resume_from: str | None = None
    """Continue from this step folder."""
    resume_model_only: bool = False
    """Take only the weights of resume_from; step, data and optimizer start anew."""
    resume_model_optimizer: bool = True
    """Take the state of the optimizer from resume_from too; not with resume_model_only."""
    finetune_from_ema: bool = False
    """Start from `ema.safetensors` of `model_path`, or of `resume_from` with resume_model_only;
    False starts from `model.safetensors`."""
    finetune_from_hf: bool = True
    """Take everything from `model_path`; False builds the model from llm_path and vit_path."""
    init_from_scratch: bool = False
    """Random initial weights (configs, tokenizer and autoencoder still from `model_path`)."""
    copy_init_moe: bool = True
    """The generation expert starts as a copy of the understanding expert, if no file has it."""
    dry_run: bool = False
    """Check everything that can be known before the first step, print it and exit."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int = 2000
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = True
    """Write checkpoints while training goes on."""
    max_save_failures: int = 3
    """Failed saves in a row after which the run ends."""
    total_steps: int = 500_000
    """Optimizer steps of the whole run."""
    gradient_accumulation_steps: int = 1
    """Packs per step and process."""
    warmup_steps: int = 2000
    """Steps in which the learning rate rises from 0."""
    lr_scheduler: str = "constant"
    """`constant` or `cosine` (to min_lr), both after a linear warm-up."""
    lr: float = 1e-4
    """Learning rate of all that has none of its own."""
    min_lr: float = 1e-7
    """Learning rate at which the cosine ends."""
    llm_lr: float | None = None
    """Learning rate of the language model; None takes lr."""
    vit_lr: float | None = None
    """Learning rate of the ViT; None takes lr."""
    mot_und_lr: float | None = None
    """Learning rate of the understanding expert; None takes lr."""
    mot_gen_lr: float | None = None
    """Learning rate of the generation expert; None takes lr."""
    vae_lr: float | None = None
    """No effect: the autoencoder is frozen."""
    e2e_lr: float | None = None
    """No effect: no part of the model has ever had this learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients, per step."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares, per step."""
    eps: float = 1e-15
    """AdamW's addend to the root of the mean square."""
    ema: float = 0.9999
    """Decay of the exponential moving average of the weights, per step."""
    max_grad_norm: float = 1.0
    """Global L2 norm at which gradients are clipped; inf clips nothing."""
    max_nonfinite_steps: int = 10
    """Skipped steps in a row, because of a non-finite loss or gradient, that end the run."""
    spike_sigma: float | None = None
    """Skip steps whose gradient norm is this many standard deviations above its recent mean; None
    skips none."""
    spike_warmup_steps: int = 100
    """Steps before spike_sigma takes effect."""
    hang_timeout: float = 1800.0
    """Seconds without a finished step after which all stacks are printed and the run ends; 0 waits
    for ever."""
    timestep_shift: float | None = None
    """Warp of training times; None keeps the checkpoint's."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy; 0 is off."""
    ce_loss_reweighting: bool = False
    """Weigh answers by the root of their length instead of by their length."""
    mse_weight: float = 1.0
    """Weight of the squared error of the velocity; 0 is off."""
    pixel_loss_weight: float = 0.0
    """Weight of the difference between decoded image and ground truth, in [0, 1]; 0 is off."""
    pixel_loss_type: str = "l1"
    """`l1`, `l2` or `mse` (the same as l2)."""
    pixel_loss_max_t: float = 0.3
    """Only images with t below it contribute, weighted by (max_t - t) / max_t."""
    pixel_loss_chunk_size: int = 2
    """Images that are decoded at once for the pixel and SSIM losses."""
    pixel_loss_adaptive_chunk: bool = True
    """Decode 1, 2 or 4 images at once instead: from 1024 x 1024, from 512 x 512, and below."""
    pixel_loss_paired_only: bool | None = None
    """No effect: every image that is trained on has its ground truth."""
    pixel_loss_use_v0: bool | None = None
    """No effect: the pixel loss has one implementation."""
    vae_checkpoint_pixels: int = 512 * 512
    """From this size on the decoder's two finest levels are recomputed in backward."""
    pixel_space_t_fraction: float = 0.0
    """Share of the target images drawn with t uniform in (0, the largest active max_t]."""
    pixel_space_balance: float | None = None
    """Norm of the pixel-space gradient at the velocity over that of MSE; None: by the weights."""
    pixel_space_max_ratio: float = 1.0
    """The same ratio of a single term from which a warning is printed."""
    pixel_space_unseen_steps: int = 500
    """Steps after which a term that has seen no image is warned of."""
    ssim_loss_weight: float = 0.0
    """Weight of 1 - SSIM of the decoded image; 0 is off."""
    ssim_loss_max_t: float = 0.1
    """As pixel_loss_max_t, for SSIM."""
    ssim_window_size: int = 11
    """Odd side of the Gaussian window, in pixels."""
    ssim_grad_scale: float = 0.1
    """Factor on the gradient between SSIM and decoder: for the gradient the same as the weight."""
    ssim_grad_clamp: float | None = None
    """Largest element of the gradient of area * (1 - SSIM) at the decoded image, before the scale;
    None clamps nothing."""
    ssim_compile: bool = False
    """SSIM through torch.compile: faster after half a minute at the first image."""
    freeze_llm: bool = False
    """Keep the language model as it is."""
    freeze_vit: bool = False
    """Keep the ViT as it is."""
    freeze_vae: bool = True
    """Keep the autoencoder as it is; it cannot be trained here."""
    freeze_und: bool = False
    """Understanding activations are constants; MoT layers only."""
    freeze_mot_und: bool = False
    """Keep the weights of the understanding expert as they are."""
    freeze_mot_gen: bool = False
    """Keep the weights of the generation expert as they are."""
    print_param_details: bool = False
    """Print every parameter with its shape, group and learning rate."""
    validate_freezing: bool = False
    """Check after the first step that trained weights have moved and frozen ones have not."""
    bf16: bool = False
    """Autocast to bfloat16; weights, gradients and EMA stay float32."""
    activation_checkpointing: bool = False
    """Recompute the activations of decoder and ViT layers in backward."""
    compile: bool = False
    """Decoder layers through torch.compile."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""
    backend: str = "auto"
    """`single`, `fsdp` or `deepspeed`; `auto` is `single` with one process, else `fsdp`."""
    num_replicate: int | None = None
    """Groups of processes that each hold the whole model (FSDP); None: as many as `num_shard`
    leaves, and with neither a group on every node."""
    num_shard: int | None = None
    """Processes that share the weights of one such group; None: as many as `num_replicate` leaves.
    """
    sharding_strategy: str = "HYBRID_SHARD"
    """HYBRID_SHARD (shard within a group, replicate across), FULL_SHARD (one group of all),
    SHARD_GRAD_OP (weights stay whole between forward and backward) or NO_SHARD."""
    backward_prefetch: str | None = "BACKWARD_PRE"
    """No effect: FSDP2 fetches the next layer's weights by itself."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory."""
    zero_stage: int = 2
    """DeepSpeed shards the optimizer state (1), gradients too (2), weights too (3)."""
    ds_config_file: str | None = None
    """DeepSpeed configuration (JSON) in place of the one made from the arguments."""
    local_rank: int = -1
    """Accepted from launchers that pass it, and ignored: their environment tells it."""
    wandb_name: str = "med_bagel_project"
    """Name of the run in W&B and TensorBoard."""
    enable_wandb: bool = False
    """Log to Weights & Biases."""
    wandb_offline: bool = False
    """Keep W&B's files in the run folder, sending nothing; switches enable_wandb on."""
    enable_tensorboard: bool = True
    """Write TensorBoard scalars into the run folder."""
    peak_tflops: float | None = None
    """Peak of the device in 10^12 operations a second, for the utilisation; None: by its name."""
    enable_validation: bool = False
    """Validate every val_every steps; val_every switches it on, False switches it off."""
    val_dataset_config_file: str | None = None
    """YAML mixture of the validation data."""
    val_every: int = 0
    """Steps between validations; 0 is never."""
    val_steps: int = 50
    """Packs over which validation losses are averaged."""
    val_images: int = 8
    """Images that are restored in a validation."""
    val_num_timesteps: int = 4
    """Times of the sampling grid of these restorations; one less than this are its steps."""


@dataclass
class RunArguments:
    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    sources: dict[str, str] = field(default_factory=dict)
    """Where each value that is not a default came from: `file:line`, the command line, or the
    argument that implied it."""
    config: str | None = None
    """The YAML file of the run, as it was named."""
    warnings: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError, one line each, for values outside of their range and arguments that
        contradict."""
        self.warnings += settle(self, DOCS)
        if errors := [*out_of_range(self), *contradictions(self)]:
            raise ValueError("\n".join(errors))

    def table(self) -> str:
        """One line per argument: name, value, source; then the warnings."""
        rows = [
            f"{name:28s}  {value!s:24s}  {self.sources.get(name, 'default')}"
            for name, value in self.flat().items()
        ]
        return "\n".join([*rows, *(f"WARNING: {warning}" for warning in self.warnings)])

    def flat(self) -> dict[str, Any]:
        return asdict(self.model) | asdict(self.data) | asdict(self.training)

    def save(self, path: Path) -> None:
        content = {"config": self.config, "arguments": self.flat(), "sources": self.sources}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _docs(group: Any) -> dict[str, str]:
    """The docstring under every field."""
    body = ast.parse(inspect.getsource(group)).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(name.target): " ".join(ast.literal_eval(text.value).split())
        for name, text in pairwise(body)
        if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


GROUPS: tuple[Any, ...] = (ModelArguments, DataArguments, TrainingArguments)
TYPES: dict[str, Any] = {f.name: f.type for group in GROUPS for f in fields(group)}
DOCS: dict[str, str] = {name: doc for group in GROUPS for name, doc in _docs(group).items()}


def help_text() -> str:
    """Every argument with its default and what it means."""
    defaults = {f.name: f.default for group in GROUPS for f in fields(group)}
    indent = {"initial_indent": "    ", "subsequent_indent": "    ", "width": 100}
    return "\n".join(
        f"--{name} {value}\n{textwrap.fill(DOCS[name], **indent)}"  # type: ignore[arg-type]
        for name, value in defaults.items()
    )


def parse_arguments(argv: list[str]) -> RunArguments:
    """Resolves `--config FILE` and `--name value` pairs (`--flag` alone means True).

    Raises ValueError, one line each, for unknown names (with file, line and nearest name), values
    of the wrong type or outside of their range, and arguments that contradict each other.
    """
    command_line = _command_line(argv)
    config = command_line.pop("config", None)
    layers = [] if config is None else _yaml_layers(Path(config))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    errors: list[str] = []
    for layer in [*layers, {name: (raw, "command line") for name, raw in command_line.items()}]:
        for name, (raw, source) in layer.items():
            try:
                values[name] = _convert(name, raw, source)
            except ValueError as error:
                errors.append(str(error))
            sources[name] = source
    if errors:
        raise ValueError("\n".join(errors))
    model, data, training = (
        group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for group in GROUPS
    )
    return RunArguments(model, data, training, sources, config)


def _command_line(argv: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    pending = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values[name := name.replace("-", "_")] = value if equals else True
            pending = None if equals else name
        elif pending is None:
            raise ValueError(f"command line: {word!r} belongs to no --argument")
        else:
            values[pending] = word
            pending = None
    for name, value in values.items():
        if value is True and (TYPES | {"config": str}).get(name, bool) not in (bool, bool | None):
            raise ValueError(f"command line: --{name} needs a value")
    return values


def _yaml_layers(path: Path, above: tuple[Path, ...] = ()) -> list[dict[str, tuple[Any, str]]]:
    """Values and their `file:line` of the YAML file and those it extends, the deepest first."""
    path = Path(os.path.normpath(path))
    if path in above:
        raise ValueError(f"{path}: extends itself through {', '.join(map(str, above))}")
    if not path.is_file():
        named = f"extends of {above[-1]}" if above else "--config"
        raise ValueError(f"{named}: {path}: there is no such file")
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping of arguments is expected")
    places: dict[str, str] = {}
    node = yaml.compose(path.read_text(), yaml.SafeLoader)
    for key, _ in node.value if node else []:
        place = f"{path}:{key.start_mark.line + 1}"
        if key.value in places:
            raise ValueError(f"{place}: {key.value} stands in {places[key.value]} already")
        places[key.value] = place
    bases = content.pop("extends", [])
    deeper: list[dict[str, tuple[Any, str]]] = []
    for base in bases if isinstance(bases, list) else [bases]:
        # What two of them extend comes once, below both.
        layers = _yaml_layers(path.parent / str(base), (*above, path))
        deeper += [layer for layer in layers if layer not in deeper]
    return [*deeper, {n: (raw, places.get(n, str(path))) for n, raw in content.items()}]


def _convert(name: str, raw: Any, source: str) -> Any:
    if name not in TYPES:
        name = str(name)  # YAML reads `on` as a truth value
        near = difflib.get_close_matches(name, TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source}: unknown argument {name!r}{hint}")
    kind = TYPES[name]
    if isinstance(kind, UnionType):
        if raw in (None, "None"):
            return None
        kind = get_args(kind)[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(raw).lower()]
        if kind is str and not isinstance(raw, str):  # YAML has lost how `007` was written
            raise TypeError
        return kind(str(raw))  # through text, so that YAML and command line agree
    except (KeyError, ValueError, TypeError) as error:
        way_out = ": quote it" if kind is str and isinstance(raw, int | float) else ""
        raise ValueError(f"{source}: {name}={raw!r} is no {kind.__name__}{way_out}") from error
