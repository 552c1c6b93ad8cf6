"""Every number of a log line against its definition, and every sink read back by its own reader."""

import dataclasses
import json
import math
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from wandb.proto.wandb_internal_pb2 import Record

import train.metrics
from modeling.batch import AnswerLabels
from tests.helpers import pack, restoration, tiny_config, tiny_model
from train.flops import flops_per_batch, peak_flops
from train.metrics import Metrics, read_lines
from train.sinks import Sink, build_sinks


def sink_arguments(**changes: Any) -> SimpleNamespace:
    off = dict.fromkeys(("enable_tensorboard", "enable_wandb"), False)
    names = {"wandb_name": "of_the_run", "wandb_offline": True, "results_dir": None}
    return SimpleNamespace(**(off | names | changes))


def two_lines(metrics: Metrics, first: int = 1) -> list[dict[str, float]]:
    """A line over two steps, then one over one."""
    with metrics:
        for value in (1.0, 3.0):
            metrics.add("ce", torch.tensor(6.0 * value), 2.0)
            metrics.add("ce_weighted", 0.5 * 6.0 * value, 2.0)
            metrics.add("mse", value, 1.0)
            metrics.add("mse_weighted", 2 * value, 1.0)
            metrics.add("pixel", 0.0, 0.0)
            metrics.add("lr_vit", 0.25)
            metrics.add_largest("norm_max", torch.tensor(value))
            metrics.add_totals({"tokens": 50 * value, "model_flops": 1e6, "samples/ixi": 3})
        lines = [metrics.log(first + 1)]
        metrics.add("mse", 7.0)
        return [*lines, metrics.log(first + 2)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_line_holds_means_totals_and_speeds(tmp_path, capsys):
    start = time.perf_counter()
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 9, peak_flops=1e9)
    first, second = two_lines(metrics)
    elapsed = time.perf_counter() - start
    assert first["ce"] == 24 / 4 and first["mse"] == 2.0 and first["lr_vit"] == 0.25
    assert first["loss_total"] == 0.5 * 24 / 4 + 2 * 2.0
    assert "pixel" not in first and "ce" not in second and second["mse"] == 7.0
    assert first["norm_max"] == 3.0
    assert (first["tokens"], first["samples/ixi"]) == (100.0, 3.0)  # per step
    seconds = 2 * first["step_s"]
    assert 0 < seconds < elapsed
    assert first["tokens_per_s"] == pytest.approx(200 / seconds)
    assert first["mfu"] == pytest.approx(2e6 / (seconds * 1e9))
    assert "mfu" not in second and first["data_wait_share"] == 0.0
    rss = int(
        next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)[6:-3]
    )
    assert first["memory_gb"] == pytest.approx(rss * 1024 / 1e9, rel=0.02)
    written = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [{"step": 2} | first, {"step": 3} | second]
    shown = capsys.readouterr().out
    assert "step 2/9  ce 6  mse 2" in shown and "samples/ixi" not in shown


def test_memory_and_speed_of_a_gpu(tmp_path, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    with Metrics(tmp_path / "m.jsonl", 0, 3) as metrics:
        metrics.add_totals({"tokens": 8})
        line = metrics.log(1)
    assert line["memory_gb"] == 3.0 and len(resets) == 2
    assert line["tokens_per_s_per_gpu"] == line["tokens_per_s"] > 0


def test_the_share_of_waiting_and_the_pauses(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(train.metrics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow() -> Iterator[int]:
        while True:
            clock[0] += 0.5
            yield 0

    with Metrics(tmp_path / "m.jsonl", 0, 3) as metrics:
        batches = slow()
        for _ in range(3):
            with metrics.wait():
                next(batches)
            clock[0] += 1.5
        with metrics.pause():
            clock[0] += 100.0
        line = metrics.log(3)
        clock[0] += 1.0
        following = metrics.log(4)
    assert line["data_wait_share"] == 1 / 4 and line["step_s"] == 2.0
    assert following["data_wait_share"] == 0.0 and following["step_s"] == 1.0


def test_a_resumed_run_writes_its_steps_again(tmp_path):
    """Also after a kill in the middle of a line."""
    path = tmp_path / "metrics.jsonl"
    for first_step, value in ((0, 1.0), (2, 2.0)):
        sinks = build_sinks(sink_arguments(enable_tensorboard=True), tmp_path, first_step)
        with Metrics(path, first_step, 4, sinks) as metrics:
            for step in range(first_step + 1, 5):
                metrics.add("mse", value * step)
                metrics.log(step)
        with path.open("a") as file:
            file.write('{"step": 5, "ms')
    lines = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    assert [(line["step"], line["mse"]) for line in lines] == [(1, 1), (2, 2), (3, 6), (4, 8)]
    assert scalars(tmp_path)["train/mse"] == [(1, 1), (2, 2), (3, 6), (4, 8)]


def test_torn_lines_are_left_out_and_told_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = [b'{"step": 1, "mse": 1.0}', b'{"step": 3, "mse": 3.0}', b'{"step": 5, "mse": 5.0}']
    torn = [b'{"step": 2, "ms' + whole[1], b"\0\xff", b'[{"step": 4}]', b'{"mse": 2.0}', b"7"]
    path.write_bytes(b"\n".join([whole[0], *torn, *whole[1:], b'{"step": 6']))
    for _ in range(2):
        Metrics(path, 3, 9)
        assert path.read_bytes() == b"\n".join([*whole[:2], b""])
    told = ", ".join(f"{path}:{number}" for number in range(2, 7))
    assert capsys.readouterr().out == f"WARNING: no JSON of a step, left out: {told}\n"


def test_a_full_disk_costs_only_its_lines(tmp_path, capsys):
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(path, 0, 4) as metrics:
        for step in range(1, 5):
            if step == 2:
                room = path.stat().st_size + 20
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            metrics.add("mse", float(step))
            metrics.log(step)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert b'\n{"step": 2' in path.read_bytes()
    assert [(x["step"], x["mse"]) for x in read_lines(path)] == [(1, 1), (3, 3), (4, 4)]
    assert f"WARNING: step 2 is not in {path}: [Errno 27] File too large" in capsys.readouterr().out


class Breaking(Sink):
    """Takes one line of values; then every call fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scalars(self, step: int, values: Any) -> None:
        self.calls.append("scalars")
        if len(self.calls) > 1:
            raise RuntimeError("no\nconnection")

    def close(self) -> None:
        self.calls.append("close")
        raise BrokenPipeError


def test_a_sink_that_fails_is_told_of_once_and_closed(tmp_path, capsys):
    (log,) = build_sinks(sink_arguments(results_dir=str(tmp_path)), tmp_path, 0)
    breaking, closing = Breaking(), Breaking()
    with Metrics(tmp_path / "metrics.jsonl", 0, 4, [breaking, log]) as metrics:
        for step in range(1, 5):
            metrics.log(step)
    with Metrics(tmp_path / "other.jsonl", 0, 4, [closing]):
        pass
    assert breaking.calls == ["scalars", "scalars", "close"]
    assert closing.calls == ["close", "close"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4
    told = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("step")]
    assert told == [
        "WARNING: Breaking gets nothing more: RuntimeError('no\\nconnection')",
        "WARNING: Breaking gets nothing more: BrokenPipeError()",
    ]


def test_tensorboard_and_text_log_hold_every_number(tmp_path):
    arguments = sink_arguments(enable_tensorboard=True, results_dir=str(tmp_path / "results"))
    sinks = build_sinks(arguments, tmp_path / "run", 0)
    picture = Image.new("RGB", (6, 4), (10, 200, 30))
    for sink in sinks:
        sink.image(2, "val/denoise", picture)
    lines = two_lines(Metrics(tmp_path / "run" / "metrics.jsonl", 0, 9, sinks))
    found = scalars(tmp_path / "run")
    expected = {f"train/{name}" for line in lines for name in line}
    assert set(found) == expected >= {"train/ce", "train/lr_vit", "train/loss_total"}
    for name, value in lines[0].items():
        assert found[f"train/{name}"][0] == (2, pytest.approx(value, rel=1e-6))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (image,) = events.Images("val/denoise")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    log = (tmp_path / "results" / "log.txt").read_text().splitlines()
    assert "step 2  train/ce 6  train/ce_weighted 3" in log[0] and "train/mse 7" in log[1]


def wandb_records(run: Path) -> Iterator[Record]:
    """Records of the run's offline file: a header of 7 bytes, then crc, length, kind, bytes."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    content, place = path.read_bytes(), 7
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1  # whole: only records across 32 KiB are cut
        yield Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length


def test_wandb_offline_holds_the_values(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--password=hunter2"])
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    arguments = sink_arguments(enable_wandb=True)
    sinks = build_sinks(arguments, tmp_path, 0)
    first, second = two_lines(Metrics(tmp_path / "metrics.jsonl", 0, 9, sinks))
    wandb.teardown()  # waits for the last write, as the end of a process does
    rows, runs, kinds = {}, [], set()
    for record in wandb_records(tmp_path):
        kinds.add(record.WhichOneof("record_type"))
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows[row["_step"]] = row
    assert kinds == {"header", "run", "telemetry", "history", "summary", "exit"}
    assert [*tmp_path.rglob("files/*")] == [] and runs[0].host == ""
    assert runs[0].display_name == "of_the_run"
    assert runs[0].run_id == (tmp_path / "wandb_id.txt").read_text()
    for step, line in ((2, first), (3, second)):
        for name, value in line.items():
            assert rows[step][f"train/{name}"] == pytest.approx(value)
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"hunter2" not in stored and b"k" * 40 not in stored
    (again,) = build_sinks(arguments, tmp_path, 3)
    again.close()
    assert {p.name.rsplit("-", 1)[1] for p in tmp_path.glob("wandb/offline-run-*")} == {
        runs[0].run_id
    }


def test_wandb_that_cannot_be_reached_is_an_error(tmp_path, monkeypatch):
    def refused(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ValueError, match="^enable_wandb: No API key configured.*wandb_offline"):
        build_sinks(sink_arguments(enable_wandb=True), tmp_path, 0)


@pytest.mark.parametrize(
    ("extra", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_a_warning(extra, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert build_sinks(sink_arguments(**{f"enable_{extra}": True}), tmp_path, 0) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: enable_{extra}: ")
    assert f"pip install 'bagel-restore[{extra}]'" in line


def test_peaks_of_devices(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_flops(cpu) is None and peak_flops(cpu, 0.2) == 2e11
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H20": 148e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "Imagined 9000": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
        assert peak_flops(cuda, 1.0) == 1e12


def counted_flops(config: Any, batch: Any) -> int:
    """What torch counts in a forward without the autoencoder, attention as matrix products."""
    model = tiny_model(config)
    flow = model.flow_inputs(batch.vae) if batch.vae is not None else None
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_only, FlopCounterMode(display=False) as counter:
        out = model.step_outputs(batch, flow)
        if batch.labels is not None:
            model.language_model.lm_head(out.hidden[batch.labels.indexes])
    return counter.get_total_flops()


def test_flops_are_three_times_those_of_a_forward():
    for changes in ({}, {"llm": {"layer_module": "Qwen2MoEDecoderLayer", "intermediate_size": 64}}):
        config = tiny_config(**changes)
        batch = pack(config, restoration("a"), restoration("b", size=(24, 16), answer=None))
        assert flops_per_batch(config, batch) == 3 * counted_flops(config, batch)


def test_parts_without_gradient_count_forward_only():
    config = tiny_config()
    frozen = dataclasses.replace(config, freeze_und=True)
    batch = pack(config, restoration("a"))
    whole = flops_per_batch(config, batch)
    without = dataclasses.replace(batch, labels=None)
    answers: AnswerLabels = batch.labels
    assert whole - flops_per_batch(config, without) == 6 * len(answers.ids) * 32 * 64
    # Hand count. ViT 28 x 42: 6 patches, 2 of 3 layers; hidden 24, mlp 40.
    layer = 4 * 24 * 24 + 2 * 24 * 40
    vit = 6 * (14 * 14 * 3 * 24 + 2 * layer) + 2 * 2 * 24 * 6 * 6
    assert whole - flops_per_batch(config, batch, freeze_vit=True) == 4 * vit
    # Two layers of 4 query and 2 key heads of size 8: q, o, k, v, then the MLP's three matrices.
    und = batch.num_tokens - len(batch.vae.indexes)
    token = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    connector = 6 * (24 * 32 + 32 * 32)
    assert whole - flops_per_batch(frozen, batch) == 4 * (und * token + connector + vit)
    assert math.isfinite(whole) and np.isscalar(whole)
