"""vLLM with the flags and environment of `quantserve serve`, started from a warm process.

Importing vLLM takes longer than loading a tiny model. One process imports it, and forks a child for
each model: its engine, its faults and its memory are its own.

    python -m tests.engine        # a folder and token ids per line of stdin, an answer per line
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from serve import engine_args, forkserver
from serve.settings import Settings

CACHE_BYTES = 1 << 26  # of keys and values
SPOKEN = 8  # tokens, each a step that reads what those before have left


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says: its own greedy tokens, and the log-probability in nats of each token
    behind the first, those of the prompt and its own. `fault` is all there is of one that does not
    load."""

    spoken: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    by: str = ""  # the class of vLLM's that computes it
    kernels: dict[str, int] | None = None
    fault: str = ""


_ANSWER = TypeAdapter(Answer)


class Engines:
    """The warm process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def ask(self, folder: Path, ids: Sequence[int]) -> Answer:
        """Of the model in `folder`, started for this."""
        told, asked = self._process.stdout, self._process.stdin
        assert told is not None and asked is not None
        asked.write(json.dumps([str(folder), list(ids)]) + "\n")
        asked.flush()
        line = told.readline()
        assert line, f"the process that has vLLM imported has ended:\n{self._log.read_text()}"
        if not line.strip():
            found = re.findall(r"\b\w+Error: .+", self._log.read_text())
            return Answer(fault=found[-1] if found else "the engine's process ended")
        return _ANSWER.validate_json(line)


@contextmanager
def engines(log: Path) -> Iterator[Engines]:
    """Until the end of the block; what vLLM logs goes into `log`."""
    chosen = Settings(max_cpu_isa="avx2")
    facts = engine_args.Facts(on_cpu=True, cpu_flags=frozenset(), quantization=None)
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            # Compiling what ranks a log-probability takes longer than all else of a tiny model.
            env=engine_args.environment(chosen, facts) | {"TORCHDYNAMO_DISABLE": "1"},
        )
    with process:
        yield Engines(process, log)
        assert process.stdin is not None
        process.stdin.close()


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout
    for module in (*forkserver.ENGINE_MODULES, "vllm.v1.engine.llm_engine"):
        importlib.import_module(module)
    registry = importlib.import_module("vllm.model_executor.models.registry")
    # What vLLM would import itself again for, in a process apart from CUDA.
    vars(registry)["_run_in_subprocess"] = lambda look: look()
    importlib.import_module("vllm.plugins").load_general_plugins()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answer = _answer(*json.loads(line))  # a fault of vLLM's ends the child, in stderr
            os.write(answers, f"{json.dumps(asdict(answer))}\n".encode())
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        if status:
            os.write(answers, b"\n")
        else:
            sys.stderr.write(f"{used.ru_utime + used.ru_stime:.1f} s of CPU\n")


def _answer(folder: str, ids: list[int]) -> Answer:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from serve import vllm_compat
    from serve.kernel_report import METHOD

    chosen = Settings(artifact=Path(folder), max_cpu_isa="avx2", kv_cache_bytes=CACHE_BYTES)
    facts = engine_args.inspect(chosen)
    if not facts.adapted:
        chosen = chosen.model_copy(update={"max_adapters": 0})
    args = vllm_compat.parse(engine_args.flags(chosen, facts))
    engine: Any = LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
    greedy = SamplingParams(
        temperature=0, max_tokens=SPOKEN, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    engine.add_request("one", {"prompt_token_ids": ids}, greedy)
    while True:
        (told,) = engine.step() or [None]
        if told is not None and told.finished:
            break
    out = told.outputs[0]
    rows = [*told.prompt_logprobs[1:], *out.logprobs]
    chances = [
        row[token].logprob for row, token in zip(rows, [*ids[1:], *out.token_ids], strict=True)
    ]
    model = engine.apply_model(lambda model: type(model).__name__)[0]
    return Answer(tuple(out.token_ids), tuple(chances), model, engine.collective_rpc(METHOD)[0])


if __name__ == "__main__":
    main()
