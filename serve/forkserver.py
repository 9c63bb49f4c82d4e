"""Engine processes forked from one that has imported vLLM already.

vLLM on CPU spawns EngineCore: torch, transformers and vLLM are imported again, after the API
process has imported them, on a core that was idle until then. Here a fork server imports the
engine's half while the API process imports its own, and EngineCore is forked from it. Measured on
two cores with SmolLM2-135M: 18.3 s to ready as shipped, 12.7 s without the extra worker process,
8.2 s with the fork server as well. The fork server never runs a matrix product, so no OpenMP
thread exists when it forks.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

ENGINE_MODULES = [
    "serve.tied",
    "serve.isa",  # before vLLM: it decides which extension vLLM loads
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
    "vllm.lora.worker_manager",
    "serve.vllm_compat",
]


def start() -> None:
    """Begin importing in the background. Call before importing vLLM; the environment is final."""
    forkserver.set_forkserver_preload(ENGINE_MODULES)
    forkserver.ensure_running()


def context() -> multiprocessing.context.BaseContext:
    """What vLLM starts its engine processes with in place of `spawn`."""
    return multiprocessing.get_context("forkserver")
