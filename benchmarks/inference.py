"""Text decoding and guided image sampling against the released code's loop.

    python benchmarks/inference.py [--threads 2] [--rounds 5]

The peer is that loop as the released code describes it, written anew on the same weights and on
the layers of `benchmarks/train_step.py`'s peer: one sample at a time; a dict from layers to keys
and values; every token and every branch of guidance writes the past and the new keys of every layer
by index into new zeros, which copies the past; a dense mask a call, in the form of SDPA's fast
path; three passes an Euler step. Its rate is therefore the same for one sample and for many, and is
measured on one.

Results are compared first: greedy ids have to be equal, and latents near. Then come the speeds, as
ratios to the peer in float32; what a token costs after a long context; and what a token of a long
answer costs, which says whether decoding is linear in its length. Contexts are filled beforehand.
The autoencoder's decoding is the same on both sides and left out: images are latents here. bf16 is
measured only where a single linear is faster in bf16. Times are taken as `benchmarks/measure.py`
says. Exit code 1: results differ or a target was missed.
"""

import argparse
import copy
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import median_seconds  # noqa: E402
from benchmarks.train_step import LLM, ScatteredDecoder, bf16_gain  # noqa: E402
from modeling.autoencoder import AutoencoderConfig  # noqa: E402
from modeling.bagel.bagel import Bagel  # noqa: E402
from modeling.bagel.config import BagelConfig  # noqa: E402
from modeling.bagel.context import Context  # noqa: E402
from modeling.bagel.generation import (  # noqa: E402
    ImageJob,
    SamplingConfig,
    TextConfig,
    TextJob,
    generate_texts,
    sample_latents,
)
from modeling.batch import SpecialTokens  # noqa: E402
from modeling.geometry import patchify, position_ids  # noqa: E402

TOKENS, FIRST_WORD, VOCABULARY = SpecialTokens(bos=0, eos=1, image_start=2, image_end=3), 4, 2000
GUIDANCE = SamplingConfig(
    num_timesteps=21, cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_renorm_type="text_channel"
)
PREFILL, CONDITION = 300, 192
"""Tokens of a context; side in pixels of the conditioning image, which stands before the text."""
LONGER = (0, 4, -4, 8, -8, 12, -12, 16)
"""Tokens that each sample has more than `PREFILL`. The first one runs alone."""
BATCH = len(LONGER)
NEW_TOKENS, LONG_CONTEXT, LONG_ANSWER = 64, 4000, 1024
ERROR = 1e-4
"""Of latents, relative to their norm."""
PEER, ONE, MANY, BF16 = "released loop", "ours, 1", f"ours, {BATCH}", f"ours, {BATCH}, bf16"
TEXT_SPEEDS = {ONE: 1.5, MANY: 7.0}
IMAGE_SPEEDS = {64: {MANY: 5.0}, 128: {MANY: 2.5}, 256: {MANY: 1.2, BF16: 1.7}}
"""By the images' side in pixels."""
CONTEXT_GROWTH, ANSWER_GROWTH = 1.4, 1.25
"""Of a token's cost, from `PREFILL` to `LONG_CONTEXT` and from `NEW_TOKENS` to `LONG_ANSWER`."""


@dataclass(frozen=True)
class Past:
    """The peer's context."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """Keys and values (tokens, key heads, E)."""
    length: int
    position: int


EMPTY = Past({}, 0, 0)
Run = Callable[[], object]
T = TypeVar("T")
Branches = tuple[T, T, T]
"""The contexts of one restoration: full, without the text, without the image."""


class Released(ScatteredDecoder):
    """The released loop on the weights of `bagel`."""

    def __init__(self, bagel: Bagel) -> None:
        super().__init__(bagel.language_model.model)
        self.bagel = bagel

    def each(self, run: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        return super().each(run, x) if len(self.gen) else run("", x)

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name in self.past.layers:
            pairs = zip(self.past.layers[name], (k, v), strict=True)
            k, v = (self.join(past, new) for past, new in pairs)
        self.merged[name] = k, v
        return self.sdpa(q, k, v, self.mask, flash=True)

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        """New zeros, into which both are written by index."""
        merged = past.new_zeros(len(past) + len(new), *past.shape[1:])
        places = torch.arange(len(merged))
        merged[places[len(past) :]] = new
        merged[places[: len(past)]] = past
        return merged

    def extend(self, past: Past, x: Tensor, image: bool = False) -> tuple[Tensor, Past]:
        """(n, d) hidden states of text or of an image with its ends, and the context then."""
        index = torch.arange(len(x))
        self.und, self.gen = (index[[0, -1]], index[1:-1]) if image else (index, index[:0])
        self.past, self.merged = past, {}
        self.mask = torch.zeros(len(x), past.length + len(x))
        if not image:
            self.mask[:, past.length :].masked_fill_(index[:, None] < index, float("-inf"))
        positions = past.position + index * (not image)
        hidden = self.run(x, positions)
        return hidden, Past(self.merged, past.length + len(x), int(positions[-1]) + 1)

    def embed(self, *ids: int) -> Tensor:
        return self.model.embed_tokens(torch.tensor(ids))

    def add_text(self, past: Past, ids: Sequence[int]) -> Past:
        return self.extend(past, self.embed(TOKENS.bos, *ids, TOKENS.eos))[1]

    def image(self, past: Past, z_LD: Tensor, t: float) -> tuple[Tensor, Past]:
        """(L, d) hidden states of the latents of a square image at time t."""
        n, side = len(z_LD), math.isqrt(len(z_LD))
        angle = torch.full((n, 1), t) * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        time = self.bagel.time_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))
        table = self.bagel.latent_pos_embed
        place = table.pos_embed[position_ids(side, side, table.side)]
        x = torch.zeros(n + 2, self.bagel.config.llm.hidden_size)
        x[[0, n + 1]] = self.embed(TOKENS.image_start, TOKENS.image_end)
        x[1 : n + 1] = self.bagel.vae2llm(z_LD) + time + place
        hidden, past = self.extend(past, x, image=True)
        return hidden[1:-1], past

    def decode_text(self, past: Past, count: int) -> list[int]:
        """`count` greedy ids after bos."""
        ids = [TOKENS.bos]
        for _ in range(count):
            hidden, past = self.extend(past, self.embed(ids[-1]))
            ids.append(int(self.bagel.language_model.lm_head(hidden[-1]).argmax()))
        return ids[1:]

    def sample(self, branches: Branches[Past], side: int) -> Tensor:
        """(L, D) latents by Euler steps of all three branches, from the first image's noise."""
        config, generator = self.bagel.config, torch.Generator().manual_seed(0)
        tokens = (side // config.latent_stride) ** 2
        x = torch.randn(tokens, config.patch_latent_dim, generator=generator)
        times = torch.linspace(1, 0, GUIDANCE.num_timesteps).tolist()
        for t, t_next in pairwise(times):
            v, v_text, v_image = (self.bagel.llm2vae(self.image(p, x, t)[0]) for p in branches)
            guided = v_text + GUIDANCE.cfg_text_scale * (v - v_text)
            norm, guided_norm = (y.norm(dim=-1, keepdim=True) for y in (v, guided))
            guided = guided * (norm / (guided_norm + 1e-8)).clamp(GUIDANCE.cfg_renorm_min, 1)
            guided = v_image + GUIDANCE.cfg_img_scale * (guided - v_image)
            x = x - guided * (t - t_next)
        return x


@torch.inference_mode()
def decode_texts(contexts: Sequence[Context], count: int) -> list[list[int]]:
    """`count` greedy ids after every context, decoded together; the contexts are then as before."""
    config = TextConfig(max_new_tokens=count, stop_at_eos=False)
    before = [(context.cache.length, context.position) for context in contexts]
    jobs = [TextJob(context, config) for context in contexts]
    texts = dict(generate_texts(jobs, VOCABULARY, len(jobs)))
    for context, (length, position) in zip(contexts, before, strict=True):
        context.cache.length, context.position = length, position
    return [texts[i] for i in range(len(jobs))]


@torch.inference_mode()
def sample_images(branches: Sequence[Branches[Context]], side: int) -> list[Tensor]:
    """(L, D) latents of one image of `side` x `side` pixels each, from its index's noise."""
    size = side, side
    generators = [torch.Generator().manual_seed(i) for i in range(len(branches))]
    jobs = [
        ImageJob.of_size(full, size, GUIDANCE, generator, *others)
        for (full, *others), generator in zip(branches, generators, strict=True)
    ]
    return sample_latents(jobs)


@torch.no_grad()
def build() -> Bagel:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    llm = Qwen2Config(**LLM | {"vocab_size": VOCABULARY})
    model = Bagel(BagelConfig(llm=llm, vit=None, vae=AutoencoderConfig(ch=32))).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("vae."):
            parameter.normal_(*((1.0, 0.1) if "norm" in name else (0.0, 0.06)))
    return model


def random_ids(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()


class Sample:
    """A restoration: a conditioning image and a text."""

    def __init__(self, model: Bagel, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        self.image_pm1 = torch.rand(3, CONDITION, CONDITION, generator=generator) * 2 - 1
        image_tokens = (CONDITION // model.config.latent_stride) ** 2 + 2
        self.ids = random_ids(PREFILL + LONGER[index] - image_tokens - 2, generator)

    def ours(self, model: Bagel) -> Branches[Context]:
        full, without_image = Context(model, TOKENS), Context(model, TOKENS)
        full.add_vae_image(self.image_pm1)
        without_text = full.fork()
        for context in (full, without_image):
            context.add_text(self.ids)
        return full, without_text, without_image

    def peers(self, released: Released) -> Branches[Past]:
        bagel = released.bagel
        z_LD = patchify(bagel.encode_images([self.image_pm1])[0], bagel.config.latent_patch_size)
        without_text = released.image(EMPTY, z_LD, 0.0)[1]
        full, without_image = (released.add_text(p, self.ids) for p in (without_text, EMPTY))
        return full, without_text, without_image


class Benchmark:
    """All measurements; `missed` gathers what was not met."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.model, self.missed = arguments, build(), list[str]()
        self.released = Released(self.model)
        self.samples = [Sample(self.model, i) for i in range(BATCH)]
        self.ours = [sample.ours(self.model) for sample in self.samples]
        self.peers = [sample.peers(self.released) for sample in self.samples]
        self.contexts = [full for full, *_ in self.ours]

    def judge(self, name: str, value: float, target: float, at_least: bool) -> None:
        met = value >= target if at_least else value <= target
        line = f"{name}: {value:.3g}, target {'>=' if at_least else '<='} {target:g}"
        print(f"  {'PASS' if met else 'FAIL'} {line}")
        self.missed += [] if met else [line]

    def seconds(self, runs: dict[str, Run], rounds: int) -> dict[str, float]:
        seconds, how = median_seconds(runs, rounds, self.arguments.threads)
        print(f"  median of {rounds}, {how}")
        return seconds

    def speeds(
        self, runs: dict[str, Run], rounds: int, targets: dict[str, float], each: int, unit: str
    ) -> None:
        """Against the peer's; every sample of a run makes `each` units."""
        seconds = self.seconds(runs, rounds)
        rates = {n: each * (BATCH if n in (MANY, BF16) else 1) / s for n, s in seconds.items()}
        for name, rate in rates.items():
            print(f"  {name:16}{rate:10.3g} {unit}/s{rate / rates[PEER]:8.2f}x")
        for name in filter(rates.get, targets):
            self.judge(f"{unit}, {name}", rates[name] / rates[PEER], targets[name], at_least=True)

    def results(self) -> None:
        """Equal ids and near latents, of ours together and of the peer one by one."""
        print("Results")
        wanted = [self.released.decode_text(full, NEW_TOKENS) for full, *_ in self.peers]
        print(f"  {len({i for ids in wanted for i in ids})} distinct ids in {BATCH} texts")
        found = zip(decode_texts(self.contexts, NEW_TOKENS), wanted, strict=True)
        equal = sum(ours == peers for ours, peers in found)
        self.judge("texts of equal greedy ids", equal, BATCH, at_least=True)
        for side in IMAGE_SPEEDS:
            got = sample_images(self.ours, side)[0]
            want = self.released.sample(self.peers[0], side)
            error = ((got - want).norm() / want.norm()).item()
            self.judge(f"error of latents of {side} x {side}", error, ERROR, at_least=False)

    def text(self) -> None:
        print(f"\nGreedy text, {NEW_TOKENS} tokens after {PREFILL}")
        runs = {
            PEER: lambda: self.released.decode_text(self.peers[0][0], NEW_TOKENS),
            ONE: lambda: decode_texts(self.contexts[:1], NEW_TOKENS),
            MANY: lambda: decode_texts(self.contexts, NEW_TOKENS),
        }
        self.speeds(runs, self.arguments.rounds, TEXT_SPEEDS, NEW_TOKENS, "tokens")

    def growth(self, what: str, context: Context, count: int, rounds: int, target: float) -> None:
        """Cost of each of `count` tokens after `context`, against the short answer's."""
        print(f"\nCost of a token {what}")
        runs = {
            "short": lambda: decode_texts(self.contexts[:1], NEW_TOKENS),
            "long": lambda: decode_texts([context], count),
        }
        seconds = self.seconds(runs, rounds)
        short, long = seconds["short"] / NEW_TOKENS, seconds["long"] / count
        print(f"  {1e3 * short:.2f} ms otherwise, {1e3 * long:.2f} ms {what}")
        self.judge(f"growth {what}", long / short, target, at_least=False)

    def lengths(self) -> None:
        """Growth with the context, and with the answer."""
        rounds, long = self.arguments.rounds, Context(self.model, TOKENS)
        long.add_text(random_ids(LONG_CONTEXT - 2, torch.Generator().manual_seed(BATCH)))
        after, within = f"after {LONG_CONTEXT} tokens", f"in an answer of {LONG_ANSWER}"
        self.growth(after, long, NEW_TOKENS, rounds, CONTEXT_GROWTH)
        self.growth(within, self.contexts[0], LONG_ANSWER, 1 + rounds // 2, ANSWER_GROWTH)

    def images(self, side: int, has_bf16: bool) -> None:
        print(f"\nLatents of {side} x {side}, {GUIDANCE.num_timesteps - 1} steps, both guidances")
        runs = {
            PEER: lambda: self.released.sample(self.peers[0], side),
            ONE: lambda: sample_images(self.ours[:1], side),
            MANY: lambda: sample_images(self.ours, side),
        }
        if has_bf16 and BF16 in IMAGE_SPEEDS[side]:
            model = copy.deepcopy(self.model).bfloat16()
            half = [sample.ours(model) for sample in self.samples]
            runs[BF16] = lambda: sample_images(half, side)
        elif BF16 in IMAGE_SPEEDS[side]:
            print(f"  not applicable, bf16 is not faster on this machine: {BF16}")
        rounds = 1 + self.arguments.rounds * min(IMAGE_SPEEDS) // side
        self.speeds(runs, rounds, IMAGE_SPEEDS[side], 1, f"images of {side}")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="fewer where they take longer")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    has_bf16, benchmark = bf16_gain(arguments) > 1, Benchmark(arguments)
    benchmark.results()
    benchmark.text()
    benchmark.lengths()
    for side in IMAGE_SPEEDS:
        benchmark.images(side, has_bf16)
    missed = benchmark.missed
    print("\n" + ("\n".join(["Targets missed:", *missed]) if missed else "All targets met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
