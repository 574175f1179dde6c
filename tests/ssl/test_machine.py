"""What can't fit is refused before it starts."""

from collections import namedtuple
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from gradmix.ssl import machine
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.machine import (
    activation_bytes,
    check_device,
    check_limits,
    check_queue,
    decoders,
    free_memory,
    least_time,
    seconds_per_view,
    usable_cpus,
)
from gradmix.ssl.networks.backbones import ResNet
from gradmix.ssl.train import train

GIB = 2**30


def test_activations_counted_by_hand():
    """Per image: the convolution keeps its input; BatchNorm the convolution's output; ReLU its own."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    assert activation_bytes(network, 10) == 4 * (3 + 8 + 8) * 10 * 10


def test_the_count_is_what_training_takes_at_least():
    """Against the allocator: bytes that a forward pass leaves behind."""
    network = ResNet("resnet18", width=8, stem="small").train()
    images = torch.rand(16, 3, 32, 32)
    network(images)  # buffers of the library
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = network(images)
    left = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    counted = 16 * activation_bytes(network, 32)
    assert 0.8 * left < counted - images.numel() * 4 < 1.2 * left
    del out


@pytest.mark.parametrize(
    ("free_disk", "free", "changes", "message"),
    [
        (1000, 1 << 60, {}, "run_dir: the run's files need at least 0.00 GiB, 0.00 GiB are free on the disk"),
        (1 << 60, 1000, {}, "data: the features of 100 images need"),
        (1 << 60, GIB, {"batch_size": 100_000}, "batch_size: the activations of 400000 views need at least"),
    ],
)
def test_what_is_too_large_is_named(tmp_path, config, monkeypatch, free_disk, free, changes, message):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(free_disk, 0, free_disk))
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    settings = config(tmp_path / "run")
    network = ResNet("resnet18", width=4, stem="small")
    for key, value in changes.items():
        setattr(settings, key, value)
    with pytest.raises(ValueError, match=message):
        check_limits(settings, network, 100, 32)
    if changes:
        settings.speed.micro_batch = 256
        check_limits(settings, network, 100, 32)


class Clock:
    """Every look at it is a second later."""

    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_a_pass_through_the_network_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(machine.time, "perf_counter", Clock())
    network, random = nn.Sequential(ResNet("resnet18", width=4), nn.Dropout(0.5)), torch.get_rng_state()
    before, threads = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert seconds_per_view(network, 224) == 1 / 2 and seconds_per_view(network, 16) == 1 / 64
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.get_rng_state())


@pytest.fixture
def a_pass_takes_a_second(monkeypatch):
    """Of one thread: 64 views of 8 pixels, or 6 of 128."""
    monkeypatch.setattr(machine.time, "perf_counter", Clock())
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize(
    ("changes", "processes", "steps", "said"),
    [
        ({}, 1, 450, "expected time: 1 h 0 min or more on this CPU; quicker: mix=none, fewer epochs="),
        ({"name": "none"}, 1, 450, "expected time: 30 min 0 s or more on this CPU"),
        ({"name": "none"}, 2, 450, "expected time: 15 min 0 s or more on this CPU"),
        ({"probability": 0.5}, 1, 450, "expected time: 30 min 0 s or more on this CPU"),
        ({"start_epoch": 1}, 1, 450, "expected time: 30 min 0 s or more on this CPU"),
        ({"end_epoch": 1}, 1, 450, "expected time: 30 min 0 s or more on this CPU"),
        ({}, 1, 7, None),
    ],
)
def test_the_least_time(tmp_path, a_pass_takes_a_second, config, changes, processes, steps, said):
    """128 images are two views each; two more are sure only where every step mixes."""
    settings = config(tmp_path)
    for key, value in changes.items():
        setattr(settings.mix, key, value)
    assert least_time(settings, ResNet("resnet18", width=4), 8, steps, processes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(29.6, "30 s"), (235, "3 min 55 s"), (3600, "1 h 0 min"), (14_100, "3 h 55 min"), (2e5, "2 d 7 h")],
)
def test_a_duration_says_its_units(seconds, said):
    assert machine.duration(seconds) == said


def test_the_least_time_of_a_wide_network_on_photographs(tmp_path, a_pass_takes_a_second, config):
    settings, network = config(tmp_path), ResNet("resnet18", width=4)
    settings.encoder.width = None  # 64
    quicker = "quicker: data.image_size=64, encoder.width=16, mix=none, fewer epochs="
    assert least_time(settings, network, 128, 450, 1).endswith(quicker)
    settings.trainer["precision"] = "bf16-mixed"  # float32 does not tell
    assert least_time(settings, network, 128, 450, 1) is None
    settings.trainer["precision"], settings.speed.compile = "32-true", True
    assert least_time(settings, network, 128, 450, 1) is None


def test_a_batch_is_shared_between_hosts(tmp_path, config, monkeypatch):
    settings, network = config(tmp_path / "run"), ResNet("resnet18", width=4, stem="small")
    settings.batch_size = 1000
    whole = 4 * settings.batch_size * activation_bytes(network, 8)
    monkeypatch.setattr(machine, "free_memory", lambda: whole // 2)
    with pytest.raises(ValueError, match="batch_size: the activations of 4000 views"):
        check_limits(settings, network, 100, 32)
    settings.trainer["num_nodes"] = 2
    check_limits(settings, network, 100, 32)


@pytest.mark.parametrize(
    ("environment", "devices", "asked"),
    [({}, "auto", 0), ({"LOCAL_RANK": "3"}, 8, 3), ({}, [5], 5), ({"LOCAL_RANK": "1"}, [5, 6], 6)],
)
def test_only_the_process_s_own_gpu_is_asked(tmp_path, config, monkeypatch, environment, devices, asked):
    def memory_of(device):
        raise MemoryError(f"asked {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: memory_of(device))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = config(tmp_path / "run")
    settings.trainer = {"devices": devices, "precision": "32-true"}
    with pytest.raises(MemoryError, match=f"asked {asked}$"):
        check_limits(settings, ResNet("resnet18", width=4, stem="small"), 100, 32)


@pytest.mark.parametrize(("devices", "gpus"), [("auto", 8), (-1, 8), (1, 1), (2, 2), ([3], 1), ([3, 5], 2)])
def test_a_batch_is_shared_among_the_gpus_that_the_run_takes(tmp_path, config, monkeypatch, devices, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    settings = config(tmp_path / "run")
    settings.trainer = {"devices": devices}
    assert machine.gpus_of(settings) == gpus


def test_training_refuses_before_it_writes_anything(tmp_path, config, data, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="are free in memory"):
        train(config(tmp_path / "run"), data)
    assert not (tmp_path / "run").exists()


def test_this_machine():
    assert usable_cpus() >= 1
    memory = free_memory()
    assert memory is None or 0 < memory < 1 << 50


def test_a_containers_share_of_the_cpus_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    for said, cpus in {"max 100000": 64, "400000 100000": 4, "150000 100000": 2, "9900000 100000": 64}.items():
        (tmp_path / "cpu.max").write_text(f"{said}\n")
        assert usable_cpus() == cpus


@pytest.mark.parametrize(
    ("version", "where", "mix", "refused"),
    [
        ("2.12.1", "auto", "gradmix", True),
        ("2.12.1", "gpu", "cutmix", True),
        ("2.12.1", "mps", "gradmix", True),
        ("2.13.0", "auto", "gradmix", False),
        ("2.12.1", "cpu", "gradmix", False),
        ("2.12.1", "auto", "none", False),
    ],
)
def test_mixing_on_apples_gpu_needs_its_operations(tmp_path, config, monkeypatch, version, where, mix, refused):
    settings = config(tmp_path)
    settings.trainer["accelerator"], settings.mix.name = where, mix
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(ValueError, match=r"torch 2\.13 or newer, this is 2\.12\.1") if refused else nullcontext():
        check_device(settings)


def test_a_width_that_weights_fix_is_no_hint(tmp_path, config):
    settings = config(tmp_path)
    settings.encoder.width = None
    assert "encoder.width=16" in machine.quicker(settings, 32)
    settings.encoder.init = "weights.pt"
    assert "encoder.width=16" not in machine.quicker(settings, 32)


def test_workers_are_bounded(tmp_path, config, monkeypatch):
    from PIL import Image

    from gradmix.ssl.data import loader

    for i in range(8):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    settings = config("unused").data
    settings.name, settings.root, settings.split, settings.memory_gib = "imagefolder", str(tmp_path), None, 0
    started = []
    real = loader.DataLoader
    monkeypatch.setattr(
        loader, "DataLoader", lambda *a, num_workers, **k: started.append(num_workers) or real(*a, num_workers=0, **k)
    )
    list(loader.TrainLoader(load_data(settings, 0).train, 4, 0, 1, workers=10_000))
    assert started == [usable_cpus()]


def test_workers_share_the_machine_and_its_memory(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 48)
    assert [decoders(None, processes) for processes in (1, 4, 8, 96)] == [16, 12, 6, 1]
    assert decoders(0) == 0 and decoders(100) == 48
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(GIB, 0, GIB))
    check_queue(GIB // 8, 4)
    check_queue(GIB, 0)
    if machine.Path("/dev/shm").is_dir():
        with pytest.raises(ValueError, match=r"data.workers: what 5 workers hold ready need .* in /dev/shm"):
            check_queue(GIB // 8, 5)


def test_copies_of_files_give_way_in_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    for name, content in (("max", "1000000"), ("current", "990000"), ("stat", "anon 1\ninactive_file 400000\nfile 7")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert free_memory() == 410_000
    (tmp_path / "memory.max").write_text("max")
    assert free_memory() is None or free_memory() > 2**20
