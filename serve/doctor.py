"""What a machine is, as `quantserve doctor` found it, and what of that will hurt.

`Facts` is what a bug report should carry. Each check is a function of the facts alone: what is
wrong, and what to do about it. `serve.doctor_look` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

GB = 10**9
# Bytes below which the demo model, 135 M parameters, is not quantized or served.
LITTLE_MEMORY = 3 * GB
LITTLE_DISK = 5 * GB
SPARE_DESCRIPTORS = 64  # for what is not a connection

Command = Literal["quantize", "serve"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Product(_Frozen):
    """A linear layer as it will be computed: its kernel, and how fast on this machine just now."""

    kernel: str
    weights_per_s: float | None  # for one token; None where it was not measured


class Kernels(_Frozen):
    """What computes a quantized model on this machine's CPU."""

    level: str | None  # instruction set of our kernels; None: none of theirs
    library: str  # where it lies or will be compiled to; empty: nowhere
    compiled: bool
    fault: str  # why it cannot be compiled or loaded
    products: tuple[Product, ...]
    quantize_dtype: str  # what `quantize` computes blocks in
    cuda: tuple[str, ...]  # devices that torch sees


class Folder(_Frozen):
    path: str
    bytes: int
    writable: bool  # it, or where it will be made


class Facts(_Frozen):
    """Sizes in bytes. A command's fault is empty where all that it imports can be imported."""

    versions: dict[str, str | None]
    system: str
    machine: str
    processor: str
    instructions: tuple[str, ...]  # of those that decide something here
    cores: int  # of the machine
    allowed_cores: float  # by affinity and quota
    memory: int
    allowed_memory: int  # by what is free, and by control groups
    gpus: tuple[str, ...]  # by the driver
    compiler: str  # empty: none
    kernels: Kernels | None
    serve_dtype: str
    cache: Folder
    caches: tuple[Folder, ...]
    disk_free: int
    descriptors: int  # open files that a server may have
    settings: dict[str, str]
    settings_fault: str
    threads: int  # that a server's model gets
    connections: int
    faults: dict[Command, str]


class Finding(_Frozen):
    """One thing that stops a command, or makes it slow or wrong, and what to do."""

    stops: tuple[Command, ...] = ()
    told: str
    do: str


def findings(facts: Facts) -> list[Finding]:
    """What stops a command first."""
    found = [each for check in CHECKS for each in check(facts)]
    return sorted(found, key=lambda finding: not finding.stops)


def runs(facts: Facts) -> bool:
    """Whether both commands can run here."""
    return not any(finding.stops for finding in findings(facts))


def _commands(facts: Facts) -> Iterator[Finding]:
    """The two often fail for one reason, which is told once."""
    for fault in dict.fromkeys(filter(None, facts.faults.values())):
        stops = tuple(name for name, why in facts.faults.items() if why == fault)
        told, _, do = fault.partition(": pip install ")
        do = f"pip install {do}" if do else "install anew in an empty environment, as README has it"
        yield Finding(stops=stops, told=f"{' and '.join(stops)} cannot run: {told}", do=do)


def _settings(facts: Facts) -> Iterator[Finding]:
    if facts.settings_fault:
        yield Finding(
            stops=("serve",), told=facts.settings_fault, do="correct or unset the variable"
        )


def _companions(facts: Facts) -> Iterator[Finding]:
    """PyPI's builds for x86 are for CUDA; those of PyTorch's CPU index say so in their version."""
    torch = facts.versions.get("torch") or ""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        installed = facts.versions.get(name) or ""
        for_cpus = not installed or installed.endswith("+cpu")
        if facts.machine == "x86_64" and torch.endswith("+cpu") and not for_cpus:
            yield Finding(
                told=f"{name} {installed} is a build for CUDA, which fails beside torch {torch}",
                do=f"pip uninstall {name}: no text model needs it",
            )


def _level(facts: Facts) -> Iterator[Finding]:
    if facts.kernels and not facts.gpus and facts.kernels.level is None:
        yield Finding(
            told="our kernels need AVX2, which this processor or a setting does not allow",
            do="take another machine, or unset ATEN_CPU_CAPABILITY: vLLM on CPUs needs AVX2, too",
        )


def _library(facts: Facts) -> Iterator[Finding]:
    known = facts.kernels
    if known is None or known.level is None or facts.gpus:
        return
    if known.fault:
        remedy = (
            f"remove {known.library}: the next start compiles it"
            if known.compiled
            else ("install g++ (apt-get install g++), and set HOME to a folder that can be written")
        )
        yield Finding(
            told=f"PyTorch's kernels run instead of ours, slower and less exact: {known.fault}",
            do=remedy,
        )
    elif not known.compiled:
        yield Finding(
            told="our kernels are not compiled yet: the first start takes half a minute more",
            do="nothing, or start a server once while you build an image",
        )


def _gpu(facts: Facts) -> Iterator[Finding]:
    if facts.gpus and facts.kernels and not facts.kernels.cuda:
        yield Finding(
            told=f"torch {facts.versions.get('torch')} does not see {facts.gpus[0]}",
            do="install the gpu extra in an environment of its own: pip install 'quantserve[gpu]'",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.allowed_memory < LITTLE_MEMORY:
        yield Finding(
            told=f"{_gb(facts.allowed_memory)} of memory may still be taken of {_gb(facts.memory)}",
            do="stop what else runs, or raise the container's limit: the demo model takes "
            f"{_gb(LITTLE_MEMORY)}",
        )


def _disk(facts: Facts) -> Iterator[Finding]:
    if not facts.cache.writable:
        yield Finding(
            told=f"{facts.cache.path} cannot be written: GGUF files are not converted, and kernels "
            "are compiled at every start",
            do="set HOME to a folder that can be written",
        )
    elif facts.disk_free < LITTLE_DISK:
        yield Finding(
            told=f"{_gb(facts.disk_free)} of disk are free under {facts.cache.path}",
            do="make room: a conversion takes as much as the model has in 16 bits",
        )


def _cores(facts: Facts) -> Iterator[Finding]:
    if facts.threads > facts.allowed_cores:
        fitting = max(int(facts.allowed_cores), 1)
        yield Finding(
            told=f"a server would run {facts.threads} threads on {facts.allowed_cores:g} cores "
            "and wait for itself",
            do=f"QUANTSERVE_THREADS={fitting}, and OMP_NUM_THREADS={fitting} for quantize",
        )


def _descriptors(facts: Facts) -> Iterator[Finding]:
    if facts.descriptors < facts.connections + SPARE_DESCRIPTORS:
        fitting = max(facts.descriptors - SPARE_DESCRIPTORS, 1)
        yield Finding(
            told=f"{facts.descriptors} files may be open, for {facts.connections} connections",
            do=f"ulimit -n, LimitNOFILE= or --ulimit, or QUANTSERVE_MAX_CONNECTIONS={fitting}",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _commands, _settings, _companions, _level, _library, _gpu, _memory, _disk, _cores,
    _descriptors,
)  # fmt: skip


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
