"""The program that compiles clients' grammars on trial: whatever it takes, it takes it here.

Run by its path, with a model's vocabulary as the first line; each further line is a grammar's kind
and text, answered with a line: null, or what is wrong with it. Compiling stops at no signal but the
one that ends the process, which is what happens when its time or its memory is up.
"""

import importlib
import json
import resource
import sys
from contextlib import suppress
from typing import Any

import xgrammar

llguidance: Any = None
with suppress(ImportError):
    llguidance = importlib.import_module("llguidance")

MEMORY = 4 << 30  # bytes of its own


def compiled(compiler: xgrammar.GrammarCompiler, kind: str, text: str) -> Any:
    if kind == "json":
        return compiler.compile_json_schema(text)
    if kind == "regex":
        return compiler.compile_regex(text)
    if kind == "structural_tag":
        return compiler.compile_structural_tag(text)
    return compiler.compile_grammar(text)


def fault_of(compiler: xgrammar.GrammarCompiler, kind: str, text: str, vocabulary: int) -> Any:
    """What keeps the engine from using it, a first token included."""
    try_the_other(kind, text)
    try:
        grammar = compiled(compiler, kind, text)
    except (RuntimeError, ValueError, TypeError) as fault:
        return {"compiles": False, "message": last_line(fault)}
    try:
        allowed = xgrammar.allocate_token_bitmask(1, vocabulary)
        xgrammar.GrammarMatcher(grammar).fill_next_token_bitmask(allowed)
    except (RuntimeError, ValueError, TypeError) as fault:
        return {"compiles": True, "message": last_line(fault)}
    if not allowed.any():  # the engine would end the request at its first token, as its own fault
        return {"compiles": True, "message": "nothing fits it; does it refer to itself?"}
    return None


def try_the_other(kind: str, text: str) -> None:
    """vLLM gives llguidance what xgrammar refuses or leaves out; it too has no bounds.

    What is wrong by it, it says itself, soon; what has no end is the end of this process.
    """
    if llguidance is None:
        return
    with suppress(LookupError, RuntimeError, TypeError, ValueError):
        if kind == "json":
            given = [llguidance.LLMatcher.grammar_from_json_schema(text)]
        elif kind == "regex":
            given = [llguidance.grammar_from("regex", text)]
        elif kind == "structural_tag":
            parts = [part["schema"] for part in json.loads(text)["structures"]]
            given = [llguidance.LLMatcher.grammar_from_json_schema(part) for part in parts]
        else:
            return
        for one in given:
            llguidance.LLMatcher.validate_grammar(one, None)


def last_line(fault: Exception) -> str:
    """Its own words, without the place in the library's source."""
    text = str(fault).strip().splitlines()[-1] if str(fault).strip() else type(fault).__name__
    return text.rpartition(".cc:")[2].partition(": ")[2][:500] or text[:500]


def allow(seconds: int) -> None:
    """So much more of a processor, and the process ends."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, hard))


def main() -> None:
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.buffer.readline().decode())
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.stdout.write("null\n")
    sys.stdout.flush()
    while line := sys.stdin.buffer.readline():
        kind, text = json.loads(line)
        allow(seconds)
        compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        fault = fault_of(compiler, kind, text, vocabulary.vocab_size)
        sys.stdout.write(json.dumps(fault) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
