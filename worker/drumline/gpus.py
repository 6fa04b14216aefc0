"""The GPUs that this process may use, asked of the driver's management library: no torch, no CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device: its index on the machine, its name, its memory in bytes, its UUID."""

    index: int
    name: str
    memory: int
    uuid: str


@dataclass(frozen=True, slots=True)
class Driver:
    """What the NVIDIA driver says.

    Attributes:
        version: the driver's version; "" without a driver.
        gpus: devices that ``CUDA_VISIBLE_DEVICES`` lets through.
        hidden: how many more there are.
        problem: why nothing could be asked; "" when all is well, or when there is just no driver.
    """

    version: str = ""
    gpus: tuple[Gpu, ...] = ()
    hidden: int = 0
    problem: str = ""


def look(environ: Mapping[str, str] = os.environ) -> Driver:
    """Ask the driver; never raises."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return Driver()
    try:
        return _ask(library, environ)
    except (OSError, AttributeError, ctypes.ArgumentError) as error:  # an old library lacks a function
        return Driver(problem=str(error))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _ask(library: ctypes.CDLL, environ: Mapping[str, str]) -> Driver:
    if code := library.nvmlInit_v2():
        return Driver(problem=_text(library, code))
    try:
        version = ctypes.create_string_buffer(96)
        library.nvmlSystemGetDriverVersion(version, 96)
        count = ctypes.c_uint()
        if code := library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return Driver(version.value.decode(), problem=_text(library, code))
        found = [gpu for index in range(count.value) if (gpu := _device(library, index)) is not None]
        shown = visible(found, environ.get("CUDA_VISIBLE_DEVICES"))
        return Driver(version.value.decode(), tuple(shown), len(found) - len(shown))
    finally:
        library.nvmlShutdown()


def _device(library: ctypes.CDLL, index: int) -> Gpu | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
        return None  # a device that this process may not open
    name, uuid, memory = ctypes.create_string_buffer(_UUID_BYTES), ctypes.create_string_buffer(_UUID_BYTES), _Memory()
    library.nvmlDeviceGetName(handle, name, _UUID_BYTES)
    library.nvmlDeviceGetUUID(handle, uuid, _UUID_BYTES)
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return Gpu(index, name.value.decode(), memory.total, uuid.value.decode())


def visible(gpus: list[Gpu], setting: str | None) -> list[Gpu]:
    """Return the devices that ``CUDA_VISIBLE_DEVICES`` lets through, in its order, as CUDA reads it.

    Args:
        gpus: all devices of the machine.
        setting: the variable's value, or None when it is not set. CUDA stops at the first entry that it does not know.
    """
    if setting is None:
        return gpus
    shown: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-"):  # a slice of a device, which the list of whole devices does not have
            named = [Gpu(-1, "MIG slice", 0, entry)]
        elif entry.isdecimal():
            named = [gpu for gpu in gpus if gpu.index == int(entry)]
        else:
            named = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(named) != 1 or named[0] in shown:
            break
        shown += named
    return shown


def _text(library: ctypes.CDLL, code: int) -> str:
    library.nvmlErrorString.restype = ctypes.c_char_p
    text: bytes = library.nvmlErrorString(code)
    return text.decode("utf-8", "replace")
