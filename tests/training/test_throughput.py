"""Figures of speed, worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fcn.models import build_model
from fcn.training import throughput
from fcn.training.throughput import ThroughputMeter, memory_gb, peak_flops, profiler, step_flops


def test_flops_of_a_step_are_three_forward_passes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    # Products of a pixel: 3·3·3·8 and 8·5; two FLOPs each; 10x12 pixels, 4 images.
    assert step_flops(model, (10, 12), 4) == 3 * 4 * 10 * 12 * 2 * (3 * 3 * 3 * 8 + 8 * 5)
    assert model[0].weight.device.type == "cpu", "the network itself stays where it is"


def test_flops_of_the_networks_are_known():
    products = step_flops(build_model("linknet", 21), (512, 512), 1) / 3 / 2
    assert products == pytest.approx(10.9e9, rel=0.01)  # as in the table of the README


def test_flops_of_mixed_sizes_or_of_a_network_that_cannot_be_counted_are_unknown():
    class Peculiar(nn.Conv2d):
        def forward(self, images):
            return super().forward(images) * images.max().item()  # a tensor without memory has no maximum

    assert step_flops(nn.Conv2d(3, 2, 1), None, 4) is None
    assert step_flops(Peculiar(3, 2, 1), (8, 8), 4) is None


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp64", 34e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156e12),
        ("NVIDIA A10", "fp16", 125e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA GeForce GTX 1080", "fp16", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), precision) == expected
    assert peak_flops(torch.device("cpu"), precision) is None


def test_a_reading_tells_where_the_time_went(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])

    def pass_by(seconds):
        clock[0] += seconds

    meter = ThroughputMeter(8, step=10, steps=34, flops=6e12, peak=12e12)
    assert meter.first
    for _ in range(4):
        pass_by(1.5)
        meter.step(waited_s=0.5)
    with meter.saving():
        pass_by(2.0)
    with meter.paused():  # an evaluation
        pass_by(12.0)
    record = meter.read()
    assert record == pytest.approx(
        {
            "images_per_s": 4 * 8 / 8.0,
            "step_s": 2.0,
            "data_wait": 2.0 / 8.0,
            "save_wait": 2.0 / 8.0,
            "eta_s": 20 * 20.0 / 4,  # evaluations take their part of what is left
            "tflops": 3.0,
            "of_peak": 0.25,
        }
    )
    assert not meter.first
    pass_by(1.0)
    meter.step(waited_s=0.0)
    again = meter.read()
    assert (again["step_s"], again["data_wait"], again["save_wait"]) == (1.0, 0.0, 0.0)


def test_without_known_flops_they_are_left_out():
    meter = ThroughputMeter(8, step=0, steps=1)
    meter.step(0.0)
    assert meter.read().keys() == {"images_per_s", "step_s", "data_wait", "save_wait", "eta_s"}


def test_memory_of_a_process_grows_with_what_it_holds():
    before = memory_gb(torch.device("cpu"))
    block = torch.ones(int(before * 1e9 / 4) + 100_000_000)
    assert memory_gb(torch.device("cpu")) > before + 0.3
    del block


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path):
    said = []
    path = tmp_path / "profile" / "trace.json.gz"
    layer, images = nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 4, 4)
    with profiler(2, path, said.append) as profile:
        for _ in range(9):
            layer(images)
            profile.step()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::conv2d" for event in events) == 2
    assert len(said) == 1
    assert str(path) in said[0]


def test_without_a_number_of_steps_nothing_is_traced(tmp_path: Path):
    with profiler(None, tmp_path / "trace.json.gz", pytest.fail) as profile:
        profile.step()
    assert list(tmp_path.iterdir()) == []
