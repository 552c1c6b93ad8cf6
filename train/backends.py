"""How a step runs on one device or on many: a single process, FSDP2, or DeepSpeed ZeRO.

Each holds float32 *masters*, this rank's shards of the trained weights, as plain tensors that the
optimizer and the EMA work on. A gradient is a sum over all ranks: losses are sums with a global
denominator.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import LossTerm
from modeling.bagel.qwen2_navit import Experts
from modeling.batch import PackedBatch
from modeling.pretrained import read_json

from .adapters import is_adapter
from .arguments import TrainingArguments
from .distributed import all_gather, all_reduce, processes_per_node, rank, world_size
from .optim import GROUPS, base_lr, group_of

Tensors = Mapping[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a weight, beside the number of steps that all weights share."""


def make_backend(
    model: Bagel, tensors: Tensors, args: TrainingArguments, device: torch.device
) -> "Backend":
    """Brings a model on the meta device to its device(s) and gives it its weights."""
    kinds = {"single": Backend, "fsdp": FSDPBackend, "deepspeed": DeepSpeedBackend}
    return kinds[backend_name(args, world_size())](model, tensors, args, device)


def backend_name(args: TrainingArguments, ranks: int) -> str:
    """`single`, `fsdp` or `deepspeed`. Raises ValueError for more or fewer processes than meant."""
    if args.backend == "single" and ranks > 1:
        raise ValueError(f"backend=single, but the launcher started {ranks} processes")
    if args.backend == "auto" and ranks == 1:
        mesh_shape(args, ranks)
        if args.cpu_offload:
            raise ValueError("cpu_offload=True needs backend=fsdp in a single process")
        return "single"
    return "fsdp" if args.backend == "auto" else args.backend


def blocks(model: Bagel) -> Iterator[nn.Module]:
    """What is sharded, recomputed and compiled as one: decoder and ViT layers, the connector."""
    yield from model.language_model.model.layers
    if model.config.vit is not None:
        yield from model.vit_model.layers()
        yield model.connector


class Backend:
    """A single process; also the interface of the others.

    Weights are float32; with `bf16` the forward pass runs under autocast.
    """

    shards: dist.ProcessGroup | None = None
    """Ranks that hold one copy of the model together; None where each has a copy of its own."""

    def __init__(
        self, model: Bagel, tensors: Tensors, args: TrainingArguments, device: torch.device
    ) -> None:
        self.model, self.args, self.device = model, args, device
        self.sizes = {n: 4 * t.numel() for n, t in model.state_dict().items()}
        """Bytes of every tensor, as a whole in float32."""
        self.adapted = any(is_adapter(name) for name in self.sizes)
        for block in blocks(model):
            if args.activation_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if args.compile:
                block.compile(dynamic=True)
        for module in model.modules():
            if isinstance(module, Experts):
                module.skip_empty = world_size() == 1
        self.place(tensors)
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        state = model.state_dict(keep_vars=True)
        self.constant = {n: t for n, t in state.items() if n not in self.weights}
        """Frozen weights and buffers."""
        self.optimizer = self.build_optimizer()
        self.load_moments({}, 0.0)

    def place(self, tensors: Tensors) -> None:
        """Allocates the model on its device and fills it."""
        _allocate(self.model, self.device)
        self.load(tensors)

    def build_optimizer(self) -> torch.optim.AdamW:
        """AdamW without weight decay, a group for each learning rate."""
        self.by_name = {name: _local(weight) for name, weight in self.weights.items()}
        self.masters = list(self.by_name.values())
        return self.adamw(self.by_name)

    def adamw(self, tensors: Tensors) -> torch.optim.AdamW:
        args, members = self.args, defaultdict(list)
        for name, tensor in tensors.items():
            members[group_of(name, args)].append(tensor)
        groups = [
            {"params": members[g], "lr": base_lr(g, args), "name": g, "base_lr": base_lr(g, args)}
            for g in GROUPS
            if members[g]
        ]
        # The fused kernel can be told on the device to leave everything as it is (found_inf).
        betas = (args.beta1, args.beta2)
        return torch.optim.AdamW(groups, betas=betas, eps=args.eps, weight_decay=0.0, fused=True)

    def forward(self, batch: PackedBatch, **options: Any) -> dict[str, LossTerm]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts):
            return self.model(batch, complete=True, **options)

    @property
    def autocasts(self) -> bool:
        """Else weights arrive in bfloat16, and activations follow them."""
        return self.args.bf16

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the loss's gradient; `last` of the step's micro-batches."""
        # Without any term, or with all that the terms touch frozen, there is none.
        if loss.requires_grad:
            loss.backward()

    def clip(self, max_norm: float) -> Tensor:
        """Clips the global L2 norm of the gradient, which is returned as it was."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.by_name[name].grad = _local(weight.grad)
        grads = [master.grad for master in self.masters if master.grad is not None]
        if not grads:
            return torch.zeros((), device=self.device)
        squares = torch.stack([n.square() for n in torch._foreach_norm(grads)]).sum()
        norm = (all_reduce(squares, group=self.shards) if self.shards else squares).sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.to(self.device)  # offloaded gradients have theirs on the host

    def update(self, skip: Tensor) -> None:
        """One optimizer step, or, where `skip` (a scalar on the device) is 1, none."""
        # Offloaded weights need it on the host, and there in time.
        self.optimizer.found_inf = skip.to(self.masters[0].device)  # type: ignore[attr-defined]
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self.model.zero_grad()

    def refresh(self) -> None:
        """Brings changed masters to the model, where they are copies."""

    # What checkpoints read and write, by names of weights; all ranks have to call these.

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Copies tensors into the model; each rank reads its shard only."""
        for name, target in self.model.state_dict().items():
            if name in tensors:
                _local(target).copy_(_slice_like(tensors[name], target))

    def full(self, name: str) -> Tensor:
        """A weight (its master) or buffer as a whole, on the device."""
        if name in self.weights:
            return _whole_like(self.by_name[name], self.weights[name])
        return _whole(self.constant[name])

    def moment(self, name: str, kind: str) -> Tensor:
        """One of MOMENTS as a whole, on the device."""
        return _whole_like(self.optimizer.state[self.by_name[name]][kind], self.weights[name])

    def load_moments(self, tensors: Tensors, steps: float) -> None:
        """Sets the moments after that many optimizer steps.

        `tensors` are `<name>/<one of MOMENTS>`; what they lack is zero.
        """
        for name, master in self.by_name.items():
            self.optimizer.state[master] = state = _no_moments(master, steps)
            for kind in MOMENTS:
                if (key := f"{name}/{kind}") in tensors:
                    state[kind].copy_(_slice_like(tensors[key], self.weights[name]))

    def steps(self) -> float:
        """Optimizer steps that were not skipped."""
        return float(next(iter(self.optimizer.state.values()))["step"])


class FSDPBackend(Backend):
    """FSDP2: float32 shards, gathered (with `bf16` in bfloat16) block by block, reduced in float32.

    FULL_SHARD and SHARD_GRAD_OP shard over all ranks, HYBRID_SHARD over `num_shard` and NO_SHARD
    over none. SHARD_GRAD_OP gathers once for forward and backward. The frozen autoencoder is not
    sharded.
    """

    autocasts = False

    def place(self, tensors: Tensors) -> None:
        model, args = self.model, self.args
        self.shards = (mesh := make_mesh(self.device.type, args))["shard"].get_group()
        if rank() == 0:
            replicate, shard = mesh.shape
            print(f"fsdp: {replicate} (replicate) x {shard} (shard) = {mesh.size()}", flush=True)
        model.compute_dtype = dtype = torch.bfloat16 if args.bf16 else None
        options: dict[str, Any] = {
            "mesh": mesh if mesh["replicate"].size() > 1 else mesh["shard"],
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if args.cpu_offload
            else OffloadPolicy(),
        }
        again = args.sharding_strategy != "SHARD_GRAD_OP"
        for block in blocks(model):
            fully_shard(block, reshard_after_forward=again, **options)
        if not model.config.llm.tie_word_embeddings:
            embeddings = model.language_model.model.embed_tokens
            fully_shard(embeddings, reshard_after_forward=again, **options)
        vae = set(model.vae.parameters())
        fully_shard(model, reshard_after_forward=False, ignored_params=vae, **options)
        register_fsdp_forward_method(model, "call")
        _allocate(model, torch.device("cpu") if args.cpu_offload else self.device)
        if args.cpu_offload:
            _buffers_to(model, self.device)
        self.load(tensors)

    def backward(self, loss: Tensor, last: bool) -> None:
        # FSDP2 averages over ranks.
        (world_size() * loss).backward()

    def refresh(self) -> None:
        # After a forward pass alone some weights are still gathered, as they were.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class DeepSpeedBackend(Backend):
    """DeepSpeed ZeRO: 1 shards optimizer and masters, 2 also gradients, 3 also the weights.

    Weights are float32, or bfloat16 copies of float32 masters with `bf16`, under the engine's own
    autocast. Whether a step is skipped is decided on the device here too, but the engine looks at
    the norm on the host.
    """

    autocasts = False

    def build_optimizer(self) -> torch.optim.AdamW:
        # Only here: it is an extra, slow to import, and sets up its accelerator.
        try:
            import deepspeed
        except ImportError as error:
            message = "backend=deepspeed needs: pip install 'bagel-restore[deepspeed]'"
            raise ValueError(message) from error
        deepspeed.utils.logger.setLevel("WARNING")
        model, self.access = self.model, deepspeed.utils
        exact = {name: weight.detach().clone() for name, weight in self.weights.items()}
        # Not a submodule any more: neither sharded nor cast.
        vae = model.vae
        del model.vae
        object.__setattr__(model, "vae", vae)
        optimizer = self.adamw(self.weights)
        config = deepspeed_config(self.args, self.device)
        self.stage = config["zero_optimization"]["stage"]
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.zero = self.engine.optimizer
        flat = (
            "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_partitioned_groups_flat"
        )
        self.masters = list(getattr(self.zero, flat))
        self.load(exact)  # with bf16 the masters would start rounded
        return optimizer

    def forward(self, batch: PackedBatch, **options: Any) -> dict[str, LossTerm]:
        return self.engine(batch, complete=True, **options)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # The engine averages over ranks.
        self.engine.backward(world_size() * loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        # The engine clips in its step, and marks a norm that is not finite as -1.
        if self.stage == 3:
            norm = torch.stack([n.square() for n in self.zero._get_norm_groups()]).sum().sqrt()
        else:
            norm = self.zero.scaled_global_norm()
        return torch.where(norm < 0, torch.nan, norm).float()

    def update(self, skip: Tensor) -> None:
        self.optimizer.found_inf = skip.to(self.masters[0].device)  # type: ignore[attr-defined]
        self.engine.step()

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for i, master in enumerate(self.masters):
            self.zero.fp16_partitioned_groups_flat[i].copy_(master)
            self.zero._unflatten_partitioned_parameters(i)
        if small := self.zero.persistent_parameters:  # which the engine keeps gathered
            small[0].all_gather(small)

    def load(self, tensors: Tensors) -> None:
        if not hasattr(self, "engine"):
            super().load(tensors)
            return
        for name, weight in self.weights.items():
            if name in tensors:
                self.access.safe_set_full_fp32_param(weight, tensors[name].to(self.device).float())
        for name, constant in self.constant.items():
            if name in tensors:
                with self.gathered(constant, modifier_rank=0):
                    constant.copy_(tensors[name])
        self.refresh()

    def full(self, name: str) -> Tensor:
        if name in self.weights:
            return self.access.safe_get_full_fp32_param(self.weights[name])
        with self.gathered(found := self.constant[name]):
            return found.detach().clone()

    def gathered(self, constant: Tensor, **options: Any) -> AbstractContextManager[Any]:
        """Within it a frozen weight or buffer is whole."""
        import deepspeed

        sharded = [constant] if hasattr(constant, "ds_id") else []
        return deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded), **options)

    def moment(self, name: str, kind: str) -> Tensor:
        return self.access.safe_get_full_optimizer_state(self.weights[name], kind)

    def load_moments(self, tensors: Tensors, steps: float) -> None:
        for master in self.masters:
            self.optimizer.state[master] = _no_moments(master, steps)
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        for key, tensor in tensors.items():
            name, kind = key.rsplit("/", 1)
            weight, value = self.weights[name], tensor.to(self.device)
            self.access.safe_set_full_optimizer_state(weight, value, kind)


def deepspeed_config(args: TrainingArguments, device: torch.device) -> dict[str, Any]:
    """`ds_config_file`, or a configuration of `zero_stage`, with what the arguments say.

    What the file leaves to "auto" counts as unsaid. Raises ValueError where it says something else
    than an argument, or asks for what is not done here.
    """
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if math.isinf(args.max_grad_norm) else args.max_grad_norm,
        "bf16": {"enabled": args.bf16},
        # Without it the engine switches off autocast inside of the model.
        "torch_autocast": {"enabled": args.bf16, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours, when it is offloaded too
        "train_batch_size": None,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": None,
    }
    zero = {"stage": args.zero_stage, "overlap_comm": device.type == "cuda"}
    if args.ds_config_file is None:
        return ours | {"zero_optimization": zero | {"contiguous_gradients": True}}
    path = Path(args.ds_config_file)
    if not path.exists():
        raise ValueError(f"ds_config_file={path}: there is no such file")
    text = json.dumps(read_json(path))
    unsaid = ("auto", None)
    config = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if v not in unsaid})
    config["zero_optimization"] = zero | config.get("zero_optimization", {})
    for key in ("fp16", "amp"):
        if config.get(key, {}).get("enabled"):
            raise ValueError(f"{path}: {key} is not supported: drop it and set the run's bf16")
    for key in ("optimizer", "scheduler"):
        if config.pop(key, {}).get("params"):
            raise ValueError(f"{path}: {key} is the run's own (lr, beta1, ...): drop it")
    config.pop("steps_per_print", None)
    for key, value in ours.items():
        if config.get(key, value) not in (value, {}):
            raise ValueError(f"{path}: {key}={config[key]!r} has to be {value!r} or left out")
    if config["zero_optimization"]["stage"] not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage must be 1, 2 or 3")
    return config | ours


def _no_moments(master: Tensor, steps: float) -> dict[str, Tensor]:
    count = torch.tensor(steps, dtype=torch.float32, device=master.device)
    return {"step": count} | {kind: torch.zeros_like(master) for kind in MOMENTS}


def make_mesh(device_type: str, args: TrainingArguments) -> DeviceMesh:
    """Ranks as (replicate, shard). Raises ValueError when they do not make a whole mesh."""
    shape = mesh_shape(args, world_size())
    if len({*all_gather(shape)}) > 1:
        raise ValueError("nodes of different numbers of processes: set num_shard and num_replicate")
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def mesh_shape(args: TrainingArguments, ranks: int) -> tuple[int, int]:
    """(replicate, shard). Raises ValueError when the ranks do not make a whole mesh, or not the
    one that was asked for."""
    strategy, given = args.sharding_strategy, (args.num_replicate, args.num_shard)
    if strategy == "NO_SHARD":
        replicate, shard = ranks, 1
    elif strategy == "HYBRID_SHARD" and args.backend != "deepspeed":
        shard = given[1] or max(1, ranks // given[0] if given[0] else processes_per_node(ranks))
        replicate = given[0] or max(1, ranks // shard)
    else:
        replicate, shard = 1, ranks
    asked = given[0] or replicate, given[1] or shard
    if asked != (replicate, shard) or replicate * shard != ranks:
        raise ValueError(
            f"num_replicate={asked[0]} x num_shard={asked[1]} is not the number of processes, "
            f"{ranks}, or not as sharding_strategy={strategy} divides them"
        )
    return replicate, shard


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole_like(local: Tensor, weight: Tensor) -> Tensor:
    """The whole of which `local` is the shard, as `weight` is sharded."""
    if not isinstance(weight, DTensor):
        return local
    layout = weight.device_mesh, weight.placements
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(local, *layout, shape=shape, stride=stride).full_tensor()


def _slice_like(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of `whole` (maybe a mapped file) that this rank holds of `weight`."""
    if not isinstance(weight, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return whole[tuple(slice(o, o + n) for n, o in zip(shape, offset, strict=True))]


def _allocate(model: Bagel, device: torch.device) -> None:
    model.to_empty(device=device)
    if model.config.llm.tie_word_embeddings:  # which that has made two
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight


def _buffers_to(model: Bagel, device: torch.device) -> None:
    """What CPU offloading leaves on the device: buffers and the autoencoder."""
    model.vae.to_empty(device=device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
