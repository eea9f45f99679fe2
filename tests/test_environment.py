import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from moebert_kernels import environment, native
from moebert_kernels.environment import Backend, describe_environment, why_not_triton
from moebert_kernels.native import NativeStatus


def test_it_is_plain_data():
    found = dataclasses.asdict(describe_environment())
    assert json.loads(json.dumps(found))["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]


def test_pytorch_is_always_usable_and_every_absent_backend_says_why():
    backends = describe_environment().backends
    assert backends[-1].name == "PyTorch"
    assert backends[-1].usable
    assert all(backend.detail for backend in backends)


def test_a_missing_package_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package-anywhere"))
    versions = describe_environment().versions
    assert versions["no-such-package-anywhere"] is None
    assert versions["torch"]


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert environment._triton_backend() == Backend("Triton kernels", False, "torch finds no CUDA device")


def test_triton_on_an_old_gpu_names_what_it_needs(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "V100")
    backend = environment._triton_backend()
    assert not backend.usable
    assert "8.0" in backend.detail
    assert "V100 has 7.0" in backend.detail


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((10, 0), True)]
)
def test_which_devices_the_triton_kernels_are_made_for(monkeypatch, capability, served):
    """Stops a T4 or V100 from being taken for a device they run on, or a newer one from being left out."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    assert (why_not_triton(torch.device("cuda", 1)) is None) == served


def test_the_native_extension_reports_for_itself(monkeypatch):
    status = NativeStatus(
        cpu=True, cpu_detail="GCC 12", cuda=False, cuda_detail="no nvcc", rows_detail="AVX2"
    )
    monkeypatch.setattr(native, "status", lambda: status)
    host, device, rows = environment._native_backends()
    assert (host.usable, host.detail) == (True, "GCC 12")
    assert (device.usable, device.detail) == (False, "no nvcc")
    assert (rows.usable, rows.detail) == (True, "AVX2")


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_commit_of_a_checkout(tmp_path):
    assert environment._commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    clean = environment._commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert environment._commit(tmp_path) == clean + "+changes"


def test_no_git_program_is_no_error(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._commit(tmp_path) is None


def test_cpu_name_is_the_first_processors(monkeypatch):
    monkeypatch.setattr(
        environment.Path, "read_text", lambda self: "model name\t: Some CPU\nmodel name\t: Other\n"
    )
    assert environment._cpu_name() == "Some CPU"


def test_cpu_name_without_proc_is_not_empty(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(environment.Path, "read_text", missing)
    assert environment._cpu_name()


def test_processors_busy_with_other_work_are_counted(monkeypatch):
    """Of 100 ticks 40 idle and 10 waiting for a disk; what the last minute was like does not count."""
    readings = iter([[0] * 8, [30, 0, 20, 40, 10, 0, 0, 0]] * 2)
    monkeypatch.setattr(environment, "_processor_times", lambda: next(readings))
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(environment.time, "monotonic", iter([0.0, 10.0] * 2).__next__)
    own_s = iter([3.0, 3.0, 3.0, 18.0])
    monkeypatch.setattr(environment.time, "process_time", lambda: next(own_s))
    assert environment.busy_cpus(0) == 2.0
    assert environment.busy_cpus(0) == 0.5  # 1.5 of them were this process's own
    monkeypatch.undo()
    monkeypatch.setattr(environment, "_processor_times", lambda: None)
    assert environment.busy_cpus(0) is None
