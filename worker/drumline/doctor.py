"""What this machine can do for drumline: one check per question, each problem with its cure.

Nothing here imports torch: it is asked in a process of its own, so that a broken installation is a finding, not a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from drumline import gpus

Status = Literal["ok", "info", "warning", "problem"]

_MIB = 1 << 20
#: NCCL's buffers for one pair of ranks, and room for data loaders.
_SHM_PER_GPU, _SHM_LEAST = 64 * _MIB, 64 * _MIB
_FILES_WANTED, _FILES_NEEDED = 4096, 512
_TMP_NEEDED = 64 * _MIB
_TORCH_SECONDS = 180.0
_CLUSTER_SECONDS = 10.0
_TORCH_SCRIPT = """
import json, time
began = time.monotonic()
import torch
found = {"version": torch.__version__, "seconds": time.monotonic() - began, "cuda": torch.version.cuda}
import torch.distributed as dist
found["gloo"] = dist.is_available() and dist.is_gloo_available()
found["nccl"] = dist.is_available() and dist.is_nccl_available()
found["available"] = torch.cuda.is_available()
found["devices"] = torch.cuda.device_count() if found["available"] else 0
if found["nccl"]:
    found["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
print("\\n" + json.dumps(found))
"""
_NEEDED = (
    "msgspec",
    "pydantic",
    "torch",
    "numpy",
    "pillow",
    "fastapi",
    "uvicorn",
    "jsonschema-rs",
    "prometheus-client",
)
_OPTIONAL = {
    "uvloop": "a faster event loop: pip install 'drumline[worker]'",
    "httptools": "a faster HTTP parser: pip install 'drumline[worker]'",
    "pyzmq": "ranks over the network: pip install 'drumline[worker]'",
    "watchfiles": "drumline run --reload: pip install 'drumline[worker]'",
    "diffusers": "image pipelines: pip install 'drumline[diffusion]'",
    "transformers": "text encoders: pip install 'drumline[diffusion]'",
    "accelerate": "model placement: pip install 'drumline[diffusion]'",
    "safetensors": "tensors in results: pip install 'drumline[diffusion]'",
    "torchvision": "image transforms: pip install 'drumline[diffusion]'",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``info``: nothing wrong, good to know; ``warning``: works, with limits; ``problem``: does not.
        detail: what was found.
        cure: what to do about it; "" when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as JSON."""
        return asdict(self)


def examine(port: int = 8080, cluster: bool = True) -> Iterator[Finding]:
    """Answer all questions, one by one.

    Args:
        port: the port that a server would take.
        cluster: also look for a Kubernetes cluster, which asks its API server.
    """
    driver = gpus.look()
    torch = _TorchProbe()
    try:
        yield check_platform()
        yield from check_packages()
        yield check_gpus(driver)
        yield from torch.findings(driver)
        if sys.platform == "linux":
            yield check_shm(Path("/dev/shm"), len(driver.gpus))  # noqa: S108
        yield from check_system()
        yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
        yield check_temporary()
        yield check_loopback()
        yield check_port(port)
        if cluster:
            yield check_cluster()
    finally:
        torch.close()


def check_platform() -> Finding:
    """Python and operating system."""
    detail = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {_cpus()} CPUs"
    if sys.platform not in {"linux", "darwin"}:
        return Finding("platform", "problem", detail, "Linux or macOS (on Windows: WSL 2)")
    return Finding("platform", "ok", detail)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_packages(version: Callable[[str], str | None] | None = None) -> Iterator[Finding]:
    """Packages that are needed, and those that some apps need."""
    look = version or _version
    versions = {name: look(name) for name in ("drumline", *_NEEDED)}
    missing = [name for name, found in versions.items() if found is None]
    detail = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    if missing:
        lacking = f"missing: {', '.join(missing)}"
        yield Finding("packages", "problem", lacking, "pip install 'drumline[worker]'")
    else:
        yield Finding("packages", "ok", detail)
    for name, use in _OPTIONAL.items():
        found = look(name)
        what, _, cure = use.partition(": ")
        if found is None:
            yield Finding(f"package {name}", "info", f"not installed; for {what}", cure)
        else:
            yield Finding(f"package {name}", "ok", found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_gpus(driver: gpus.Driver) -> Finding:
    """GPUs as the driver shows them to this process."""
    if driver.problem:
        return Finding(
            "GPUs", "problem", f"the NVIDIA driver answers: {driver.problem}", "nvidia-smi; then reinstall the driver"
        )
    if driver.gpus:
        names = ", ".join(f"{gpu.name} ({gpu.memory / (1 << 30):.0f} GiB)" for gpu in driver.gpus)
        hidden = f"; {driver.hidden} hidden by CUDA_VISIBLE_DEVICES" if driver.hidden else ""
        return Finding("GPUs", "ok", f"{names}; driver {driver.version}{hidden}")
    if driver.hidden:
        return Finding(
            "GPUs",
            "warning",
            f"all {driver.hidden} are hidden by CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}",
            "unset CUDA_VISIBLE_DEVICES, or name devices that exist",
        )
    return Finding("GPUs", "info", "none: ranks run on the CPU")


class _TorchProbe:
    """Imports torch in a process of its own; started first, because it takes longest."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _TORCH_SCRIPT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def findings(self, driver: gpus.Driver) -> Iterator[Finding]:
        """Wait for it and say what it found."""
        if _version("torch") is None:
            return
        try:
            out, complaints = self._process.communicate(timeout=_TORCH_SECONDS)
        except subprocess.TimeoutExpired:
            yield Finding("torch", "problem", f"import torch takes more than {_TORCH_SECONDS:.0f} s", "a local disk")
            return
        try:
            found = json.loads(out.splitlines()[-1])
        except (ValueError, IndexError):
            lines = complaints.strip().splitlines()
            yield Finding(
                "torch",
                "problem",
                f"import torch fails: {lines[-1] if lines else f'exit code {self._process.returncode}'}",
                "pip install --force-reinstall torch",
            )
            return
        yield from check_torch(found, driver)

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()


def check_torch(found: dict[str, Any], driver: gpus.Driver) -> Iterator[Finding]:
    """Torch by itself, and together with the GPUs.

    Args:
        found: what the probe printed: ``version, seconds, cuda, gloo, nccl, available, devices[, nccl_version]``.
        driver: what the driver says.
    """
    build = f"CUDA {found['cuda']}" if found["cuda"] else "CPU build"
    detail = f"{found['version']} ({build}), imported in {found['seconds']:.1f} s"
    if not found["gloo"]:
        yield Finding("torch", "problem", f"{detail}, without gloo", "a torch from PyPI: pip install torch")
    elif driver.gpus and not found["available"]:
        cure = (
            f"a driver that knows CUDA {found['cuda']} (installed: {driver.version}), or a torch for an older CUDA"
            if found["cuda"]
            else "a CUDA build of torch: see pytorch.org/get-started"
        )
        yield Finding("torch", "problem", f"{detail}; it cannot use the GPUs", cure)
    else:
        yield Finding("torch", "ok", detail)
    if found["nccl"]:
        yield Finding("NCCL", "ok", found["nccl_version"])
    elif len(driver.gpus) > 1:
        yield Finding("NCCL", "problem", "this torch has none: ranks on GPUs cannot talk", "a CUDA build of torch")
    else:
        yield Finding("NCCL", "info", "this torch has none; ranks on the CPU use gloo")


def check_shm(folder: Path, gpu_count: int) -> Finding:
    """Shared memory, which NCCL and data loaders need; 64 MiB is a container's default."""
    cure = "docker run --shm-size=2g; in a pod: an emptyDir with medium Memory at /dev/shm"
    try:
        space = os.statvfs(folder)
    except OSError as error:
        return Finding("shared memory", "problem", f"{folder}: {error.strerror}", cure)
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    need = max(_SHM_LEAST, _SHM_PER_GPU * gpu_count)
    detail = f"{folder}: {_size(free)} free of {_size(size)}; wanted: {_size(need)}"
    if free >= need:
        return Finding("shared memory", "ok", detail)
    return Finding("shared memory", "problem" if gpu_count > 1 else "warning", detail, cure)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / _MIB:.0f} MiB"


def check_system() -> Iterator[Finding]:
    """What starting, talking to and ending ranks is built on."""
    if sys.platform == "darwin":
        yield Finding("start of ranks", "info", "spawn: each rank imports torch itself (macOS cannot fork safely)")
    else:
        yield Finding("start of ranks", "ok", "fork: torch is imported once")
    try:
        for each in socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM
        ):
            each.close()
        yield Finding("rank sockets", "ok", "local socket pairs work")
    except OSError as error:
        yield Finding(
            "rank sockets", "problem", f"socketpair: {error.strerror}", "a sandbox that allows AF_UNIX sockets"
        )
    if sys.platform != "linux":
        yield Finding("orphans", "info", "ranks watch a pipe to notice that their parent is gone")
        return
    signal_number = ctypes.c_int()
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None and prctl(2, ctypes.byref(signal_number)) == 0:  # PR_GET_PDEATHSIG
        yield Finding("orphans", "ok", "the kernel ends ranks with their parent")
    else:
        yield Finding("orphans", "warning", "prctl is not allowed here", "a seccomp profile that allows prctl")
    try:
        os.close(os.memfd_create("drumline-doctor"))
        yield Finding("memory files", "ok", "memfd works: large results travel without copies")
    except OSError as error:
        yield Finding("memory files", "problem", f"memfd_create: {error.strerror}", "a seccomp profile that allows it")


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit on open files: a socket per client, a few per rank."""
    limited = soft != resource.RLIM_INFINITY
    detail = f"{soft} (hard limit {hard})" if limited else "unlimited"
    if limited and soft < _FILES_WANTED:
        status: Status = "problem" if soft < _FILES_NEEDED else "warning"
        within = hard == resource.RLIM_INFINITY or hard >= _FILES_WANTED
        return Finding(
            "open files", status, detail, "ulimit -n 65536" if within else "raise the hard limit of open files"
        )
    return Finding("open files", "ok", detail)


def check_temporary() -> Finding:
    """A folder for the rendezvous of ranks."""
    try:
        with tempfile.TemporaryDirectory(prefix="drumline-") as name:
            free = shutil.disk_usage(name).free
    except OSError as error:
        return Finding(
            "temporary folder", "problem", f"{error.filename}: {error.strerror}", "set TMPDIR to a folder to write"
        )
    detail = f"{tempfile.gettempdir()}: {_size(free)} free"
    if free < _TMP_NEEDED:
        return Finding("temporary folder", "warning", detail, "free some space, or set TMPDIR")
    return Finding("temporary folder", "ok", detail)


def check_loopback() -> Finding:
    """The loopback interface, on which ranks of one machine meet."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=5).close()
    except OSError as error:
        return Finding(
            "loopback", "problem", f"127.0.0.1 does not work: {error.strerror or error}", "ip link set lo up"
        )
    return Finding("loopback", "ok", "127.0.0.1 works")


def check_port(port: int) -> Finding:
    """Whether a server could take its port."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Finding("port", "ok", f"{port} is free")
    except OSError as error:
        return Finding("port", "warning", f"{port}: {error.strerror}", "drumline run --port 0, which takes a free one")


def check_cluster() -> Finding:
    """Kubernetes, as far as kubectl knows one; never needed for ``drumline run``."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return Finding("cluster", "info", "no kubectl; only needed to deploy", "kubernetes.io/docs/tasks/tools")
    context = _output([kubectl, "config", "current-context"])
    if not context:
        return Finding("cluster", "info", "kubectl has no context; only needed to deploy", "set KUBECONFIG")
    asked = [kubectl, "get", "crd", "distributedapps.drumline.dev", "--request-timeout=5s", "-o", "name"]
    if _output(asked):
        return Finding("cluster", "ok", f"context {context}, with drumline's resources")
    return Finding(
        "cluster",
        "info",
        f"context {context}, without drumline's resources, or out of reach",
        f"{' '.join(asked[1:4])}",
    )


def _output(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_CLUSTER_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
