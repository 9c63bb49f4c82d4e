"""Flags after `--` that say where and to whom the server answers: ours to decide, never ignored.

The parent owns the socket, answers on it itself and guards it, so what vLLM would do with such a
flag is either taken over into our settings or refused by name. `adopt` looks at the flags as they
are spelled, before anything is loaded; `check` at what vLLM made of them, whatever the spelling
(an abbreviation, a `--config` file).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from serve import vllm_release
from serve.errors import SettingsError
from serve.settings import Settings

SHORT = {"-asc": "api-server-count"}
TAKEN_OVER = {
    "ssl-certfile": "ssl_certfile",
    "ssl-keyfile": "ssl_keyfile",
    "root-path": "root_path",
}
PROXY = "put a proxy that ends TLS in front, or use --ssl-certfile and --ssl-keyfile alone"
ONE_PROCESS = (
    "one server has one API process beside its engine: give each replica a server, "
    "and a registry that they share by --registry"
)
REFUSED = {
    "host": "give --host before the --",
    "port": "give --port before the --",
    "uds": "this server listens on TCP: give --host and --port before the --",
    "api-key": "give --api-key-file before the --: a line per key, NAME:SCOPES:KEY",
    "ssl-ca-certs": PROXY,
    "ssl-cert-reqs": PROXY,
    "ssl-ciphers": PROXY,
    "headless": ONE_PROCESS,
    "api-server-count": ONE_PROCESS,
    "grpc": "this server speaks HTTP: clients give /v1 of --host and --port",
}


def adopt(settings: Settings, env: Mapping[str, str]) -> Settings:
    """`settings` with what their vLLM flags say of the address. SettingsError for what cannot be.

    `env` is the environment that vLLM will see. A flag that vLLM does not know is refused too: it
    would say so after a minute of imports, among 300 lines of usage.
    """
    if env.get("VLLM_API_KEY"):
        raise SettingsError(f"VLLM_API_KEY is set: {REFUSED['api-key']}")
    kept, taken = [], {}
    for name, words in _options(settings.vllm_flags):
        if name in REFUSED:
            raise SettingsError(f"--{name} after the --: {REFUSED[name]}")
        _refuse_unknown(words[0])
        if name == "config":
            _look_into(Path(_value(name, words)))
        if name in TAKEN_OVER:
            taken[TAKEN_OVER[name]] = _value(name, words)
        else:
            kept += words
    if not taken:
        return settings
    told = settings.model_dump() | taken | {"vllm_flags": tuple(kept)}
    return Settings.model_validate(told)


def _refuse_unknown(word: str) -> None:
    """SettingsError for what can only be a flag, and is none or the beginning of none."""
    flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
    known = vllm_release.flags()
    if not flag.startswith("--") or not known or any(each.startswith(flag) for each in known):
        return
    near = get_close_matches(flag, known, 1, 0.75)
    hint = f"did you mean {near[0]}?" if near else "`vllm serve --help=all` lists what it takes"
    raise SettingsError(
        f"{flag} after the --: vLLM {vllm_release.installed_version()[0]} has no such flag; {hint}"
    )


def given(settings: Settings) -> list[str]:
    """The flags that say the same to vLLM."""
    values = {flag: getattr(settings, name) for flag, name in TAKEN_OVER.items()}
    return [word for flag, value in values.items() if value for word in (f"--{flag}", str(value))]


def check(args: Namespace, settings: Settings) -> None:
    """SettingsError where vLLM would answer elsewhere, or guard what we guard."""
    ours: dict[str, object] = {"host": settings.host, "port": settings.port}
    ours |= {flag: _text(getattr(settings, name)) for flag, name in TAKEN_OVER.items()}
    for flag in (*TAKEN_OVER, *REFUSED):
        # --ssl-cert-reqs is 0 where nothing is asked for
        told = vars(args).get(flag.replace("-", "_")) or None
        if told != (ours.get(flag) or None):
            way = REFUSED.get(flag, f"spell it --{flag} after the --")
            raise SettingsError(f"--{flag} among vLLM's flags, as {told!r}: {way}")


def _options(flags: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each option's name, as vLLM spells it, with the words that belong to it."""
    words: list[str] = []
    for flag in flags:
        if re.match(r"-+[A-Za-z]", flag) and words:
            yield _name(words[0]), words
            words = []
        words.append(flag)
    if words:
        yield _name(words[0]), words


def _name(word: str) -> str:
    name = word.partition("=")[0].removeprefix("--").replace("_", "-")
    return SHORT.get(name, name)


def _value(name: str, words: list[str]) -> str:
    value = words[0].partition("=")[2] or " ".join(words[1:])
    if not value or len(words) > 2:
        raise SettingsError(f"--{name} after the --: expected one value, not {words[1:]}")
    return value


def _look_into(config: Path) -> None:
    """A file of vLLM's flags: what stands on our command line beside it would win unseen."""
    try:
        text = config.read_text()
    except (OSError, UnicodeDecodeError) as fault:
        raise SettingsError(f"--config after the --: cannot read {config}: {fault}") from fault
    for name in (*TAKEN_OVER, *REFUSED):
        if re.search(rf"^{name.replace('-', '[-_]')}\s*:", text, re.MULTILINE):
            way = REFUSED.get(name, f"give --{name} after the --")
            raise SettingsError(f"{config} says {name}: {way}")


def _text(value: object) -> str | None:
    return None if value is None else str(value)
