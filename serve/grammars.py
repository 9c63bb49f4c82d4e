"""A client's grammar, compiled on trial before the engine gets it, for so long and no longer.

Four kilobytes of regular expression keep a compiler busy for minutes, in the engine and beyond the
client's departure: nothing there can stop it, and no limit on bytes is tight enough. So each
schema, regex, grammar and structural tag is compiled once in a process apart, which ends when its
time is up. What passed, and what did not, is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve.errors import BadRequest

logger = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("grammar_inmate.py")
REMEMBERED = 1024
START_S = 120.0  # a hang: the library is loaded, perhaps by a machine that is busy
PATIENCE = 10  # times the processor's seconds, for a machine that is busy
LONGEST_ANSWER = 1 << 20


class GrammarTrial:
    """One process, one grammar at a time."""

    def __init__(
        self, vocabulary: Callable[[], str], largest: int, seconds: int, *, others: bool = False
    ) -> None:
        """`vocabulary` gives xgrammar's TokenizerInfo as JSON; ValueError where it has none.

        `others`: the operator has given vLLM another compiler. Else the engine keeps that of its
        first grammar, mostly xgrammar, and what that refuses would be a 500 sooner or later.
        """
        self._others = others
        self._vocabulary, self._largest, self._seconds = vocabulary, largest, seconds
        self._known: OrderedDict[bytes, BadRequest | None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._possible = True
        self.tried = 0

    async def check(self, wanted: Any) -> None:
        """BadRequest where vLLM's structured outputs hold what the engine had better not see."""
        for kind, param, text in _grammars(wanted):
            if (size := len(text.encode(errors="replace"))) > self._largest:
                raise BadRequest(
                    f"the {param} has {size} bytes; at most {self._largest} "
                    "(QUANTSERVE_MAX_GRAMMAR_BYTES)",
                    param=param,
                )
            fault = await self._fault(kind, param, text)
            if fault is not None:
                raise BadRequest(str(fault), param=fault.param)

    async def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _fault(self, kind: str, param: str, text: str) -> BadRequest | None:
        order = json.dumps([kind, text]).encode() + b"\n"
        digest = hashlib.sha256(order).digest()
        async with self._lock:
            if digest not in self._known:
                self._known[digest] = await self._tried(kind, param, order)
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            self._known.move_to_end(digest)
            return self._known[digest]

    async def _tried(self, kind: str, param: str, order: bytes) -> BadRequest | None:
        if not await self._ready():
            return None
        self.tried += 1
        line = await self._asked(order, PATIENCE * self._seconds)
        if line is None:
            return BadRequest(
                f"the {param} takes more than {self._seconds} s or too much memory to compile; "
                "make it simpler "
                "(QUANTSERVE_MAX_GRAMMAR_SECONDS)",
                param=param,
            )
        told = json.loads(line)
        final = kind == "grammar" or (kind in ("json", "regex") and not self._others)
        if told is None or not (final or told["compiles"]):
            return None  # vLLM has another compiler for it, or another way to read it
        return BadRequest(f"the {param} cannot be used: {told['message']}", param=param)

    async def _ready(self) -> bool:
        """Whether there is a process to ask. It is started with the first grammar."""
        if not self._possible:
            return False
        if self._process is not None and self._process.returncode is None:
            return True
        try:
            vocabulary = await asyncio.to_thread(self._vocabulary)
        except ValueError as fault:
            logger.warning("grammars are not tried before the engine compiles them: %s", fault)
            self._possible = False
            return False
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(PROGRAM), str(self._seconds),
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=LONGEST_ANSWER, env={},
        )  # fmt: skip
        if await self._asked(vocabulary.encode() + b"\n", START_S) is None:
            logger.error("the process that tries grammars did not start")
            self._possible = False
        return self._possible

    async def _asked(self, order: bytes, seconds: float) -> bytes | None:
        """The process's line of answer; None where it gave none, which was its end."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = b""
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(order)
                await process.stdin.drain()
                line = await process.stdout.readline()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            if not line.endswith(b"\n"):  # it is over, or we are: its answer would be the next's
                await self.close()
        return line or None


def _grammars(wanted: Any) -> list[tuple[str, str, str]]:
    """Kind, the client's field and the text of what vLLM's structured outputs would compile."""
    found = []
    if (schema := wanted.json) is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        found.append(("json", "json_schema", text))
    if wanted.regex is not None:
        found.append(("regex", "regex", wanted.regex))
    if wanted.choice:
        listed = " | ".join(json.dumps(str(one), ensure_ascii=False) for one in wanted.choice)
        found.append(("choice", "choice", f"root ::= {listed}"))
    if wanted.grammar is not None and "::=" in wanted.grammar:  # else Lark's, of another compiler
        found.append(("grammar", "grammar", wanted.grammar))
    if wanted.structural_tag is not None:
        found.append(("structural_tag", "structural_tag", wanted.structural_tag))
    return found
