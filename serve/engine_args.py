"""What vLLM is started with: its flags and its environment, from our settings and this machine.

The CPU defaults were found by measurement (DECISIONS.md); a flag the operator gives after `--`
comes last and wins. Refuses, before anything is loaded, what this machine cannot run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from quant.lora import served
from serve import parsers, vllm_flags, vllm_release
from serve import settings as serve_settings
from serve.errors import SettingsError
from serve.parsers import Parsers
from serve.settings import CPU_LIMITS, Settings

# vLLM allocates every slot at one of these ranks.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
QUANTIZED = ("gptq", "compressed-tensors")
ROUNDS = "VLLM_CPU_INT4_W4A8"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the served folder is and where it will run."""

    on_cpu: bool
    cpu_flags: frozenset[str]
    quantization: str | None  # `quant_method` of its config.json
    adapted: bool = True  # whether vLLM's code of it takes adapters
    causal: bool = True  # a plain language model, as far as its config.json says
    parsers: Parsers = field(default_factory=Parsers)


def inspect(settings: Settings) -> Facts:
    """Read the folder's config and this machine. SettingsError when they cannot go together."""
    vllm_release.release()
    config = settings.artifact / "config.json"
    if not config.is_file():
        raise SettingsError(
            f"{settings.artifact} is not a model folder: it has no config.json. Give the folder "
            "that `quantserve quantize --out` wrote, or a Hugging Face folder"
        )
    try:
        told = json.loads(config.read_text())
        method = told.get("quantization_config", {}).get("quant_method")
        causal = all(name.endswith("ForCausalLM") for name in told.get("architectures") or ())
        adapted = bool(served.targets(settings.artifact))
    except (json.JSONDecodeError, AttributeError) as fault:
        raise SettingsError(f"{config} is not a model configuration: {fault}") from fault
    _, on_cpu = vllm_release.installed_version()
    facts = Facts(on_cpu, cpu_flags(), method, adapted, causal)
    if facts.on_cpu:
        _refuse(facts)
    return replace(facts, parsers=parsers.choose(settings))


def flags(settings: Settings, facts: Facts) -> list[str]:
    """vLLM's command line."""
    name = settings.model_name or settings.artifact.resolve().name
    given = ["--model", str(settings.artifact), "--served-model-name", name]
    given += ["--worker-extension-cls", "serve.kernel_report.KernelReport"]
    given += ["--host", settings.host, "--port", str(settings.port), "--disable-fastapi-docs"]
    given += ["--shutdown-timeout", str(round(settings.drain_timeout)), "--max-model-len", "-1"]
    given += ["--generation-config", "auto", "--disable-uvicorn-access-log"]
    if settings.max_adapters:
        given += _lora_flags(settings)
    chosen = settings.prompt_tuning
    if facts.on_cpu and facts.causal if chosen is None else chosen:
        given += ["--enable-prompt-embeds"]  # for us alone: serve.vllm_compat.close_to_clients
    if facts.on_cpu:
        given += ["--enforce-eager", "--dtype", cpu_dtype(settings, facts.cpu_flags)]
        given += ["--kv-cache-memory-bytes", str(settings.kv_cache_bytes)]
    given += parsers.flags(facts.parsers, settings.vllm_flags)
    return [*given, *vllm_flags.given(settings), *settings.vllm_flags]


def environment(settings: Settings, facts: Facts) -> dict[str, str]:
    """The worker's whole environment: the parent's, ours, and what vLLM reads from there."""
    env = {**serve_settings.inherited(), **settings.environment()}
    env |= {
        "VLLM_PLUGINS": "quantserve",
        "HF_HUB_OFFLINE": "0" if settings.allow_hub else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if vllm_release.release() != "0.32":  # which has no limit of its own
        env["VLLM_HTTP_MAX_REQUEST_BODY_SIZE"] = str(settings.max_body_bytes)
    if facts.on_cpu:
        env |= _cpu_environment(settings, env)
    return env


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _refuse(facts: Facts) -> None:
    if "avx2" not in facts.cpu_flags and facts.cpu_flags:
        raise SettingsError("vLLM on CPU needs AVX2, which this processor does not have")
    if facts.quantization not in (None, *QUANTIZED):
        raise SettingsError(
            f"quantization {facts.quantization!r} has no CPU kernel here; known: "
            f"{', '.join(QUANTIZED)}. Quantize the full-precision model with `quantserve quantize`"
        )
    if (asked := serve_settings.inherited().get(ROUNDS, "0")) != "0":
        raise SettingsError(
            f"{ROUNDS}={asked} would round activations of INT4 layers to 8 bits, which no fidelity "
            "report has measured: unset it, and quantize with `--scheme w8a8` for such activations"
        )


def _lora_flags(settings: Settings) -> list[str]:
    rank = next((rank for rank in LORA_RANKS if rank >= settings.max_lora_rank), None)
    if rank is None:
        raise SettingsError(f"max_lora_rank {settings.max_lora_rank} exceeds {LORA_RANKS[-1]}")
    slots = settings.max_adapters + 1  # one is free for a swap
    cached = max(slots, settings.max_cached_adapters or 4 * settings.max_adapters)
    return ["--enable-lora", "--max-loras", str(slots), "--max-cpu-loras", str(cached),
            "--max-lora-rank", str(rank), "--lora-target-modules",
            *served.targets(settings.artifact)]  # fmt: skip


def cpu_dtype(settings: Settings, cpu_flags: frozenset[str]) -> str:
    """bfloat16 where the processor multiplies it; everywhere else it is emulated, and slow."""
    native = {"avx512_bf16", "amx_bf16"} & cpu_flags
    return "bfloat16" if native and settings.max_cpu_isa == "auto" else "float32"


def _cpu_environment(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    chosen = {
        # Our own binding: vLLM's gives the model one of two cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads or cores()),
        # One engine process instead of an engine and a worker: a process and a queue hop less.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM's own INT4 kernels would round activations to 8 bits where they can.
        ROUNDS: "0",
        # Counts requests with NaN among their logits: vllm:corrupted_requests_total.
        "VLLM_COMPUTE_NANS_IN_LOGITS": env.get("VLLM_COMPUTE_NANS_IN_LOGITS", "1"),
        # What vLLM's CPU platform would set too late for the fork server.
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file() and "LD_PRELOAD" not in env:
        # Intel's OpenMP parks idle threads after 1 ms; GNU's spin beside the API process.
        chosen |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "1"}
    return chosen | CPU_LIMITS.get(settings.max_cpu_isa, {})


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the kernel says that the processor has; empty where it does not say."""
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
