"""The only reader of the environment: QUANTSERVE_* into one frozen object, strangers refused.

The parent builds a Settings from its command line over its environment and hands it to the worker
as environment again, so both sides read the same names. Refuses unknown QUANTSERVE_* names, but for
those that Kubernetes makes for a Service whose name begins with `quantserve`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve.errors import SettingsError

PREFIX = "QUANTSERVE_"
LONGEST_ALIAS = 200
RESERVED = ("canary", "history", "promote", "rollback")  # what follows an alias in /admin
NOBODY = ("none", "gone")  # under which the metrics count what no alias answered
# A Service `quantserve` or `quantserve-...`, as every pod of its namespace is told of it.
SERVICE_LINK = re.compile(
    r"QUANTSERVE_(?:[A-Z0-9_]+?_)??"
    r"(?:SERVICE_(?P<host>HOST)|SERVICE_(?P<number>PORT)(?:_[A-Z0-9_]+)?"
    r"|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:(?P<addr>ADDR)|(?P<port>PORT)|(?P<proto>PROTO)))?)?)"
)
# What holds torch, oneDNN and MKL to a level; "avx512" has VNNI, and neither bf16 nor AMX.
CPU_LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


# What the commands that ask a running server read; no settings of a server.
SERVER, API_KEY = PREFIX + "SERVER", PREFIX + "API_KEY"


class Settings(BaseModel):
    """Everything an operator can set; times in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: Path = Field(Path(), description="the folder to serve")
    verify: bool = Field(
        default=False, description="read an artifact's tensors at the start and compare digests"
    )
    model_name: str = Field("", description="model id of the base; default: the folder's name")
    host: str = Field("127.0.0.1", description="address to bind; others than loopback need keys")
    port: int = Field(8000, ge=0, le=65535, description="port to bind; 0: any that is free")
    ssl_certfile: Path | None = Field(None, description="serve HTTPS with this certificate (PEM)")
    ssl_keyfile: Path | None = Field(None, description="its key; none: in the same file")
    root_path: str = Field("", description="prefix of the paths that a proxy in front leaves on")
    api_key_file: Path | None = Field(None, description="bearer keys; none: loopback only")
    state_dir: Path | None = Field(
        None, description="where loaded adapters are kept; none: for this run only"
    )
    adapters: dict[str, str] = Field({}, description="JSON object of alias: source")
    max_adapters: int = Field(4, ge=0, description="adapters in one batch; 0: LoRA off")
    max_cached_adapters: int = Field(
        0, ge=0, description="adapters kept in host memory; 0: four times those of a batch"
    )
    adapter_wait: float = Field(30.0, gt=0, description="seconds a request waits for a slot")
    database_url: str = Field("", description="the adapter registry; none: a file in state_dir")
    replica: str = Field("", description="this server's name there; none: host and port")
    reconcile_interval: float = Field(2.0, gt=0, description="seconds between looks at it")
    keep_versions: int = Field(5, ge=1, description="versions of an alias kept for a rollback")
    store_dir: Path | None = Field(None, description="adapter files; none: store in state_dir")
    adapter_root: Path | None = Field(
        None, description="folder that adapter paths must be under; none: any"
    )
    source_schemes: tuple[str, ...] = Field(
        ("file", "s3", "gs", "az"), description="JSON array of where adapters may come from"
    )
    allow_hub: bool = Field(default=False, description="adapters may be Hugging Face hub ids")
    max_adapter_bytes: int = Field(2 << 30, ge=1, description="largest adapter taken in")
    max_lora_rank: int = Field(16, ge=1, description="largest rank an adapter may have")
    prompt_tuning: bool | None = Field(
        None, description="serve prompt-tuned adapters; none: on CPU, beside plain language models"
    )
    kv_cache_bytes: int = Field(512 << 20, ge=1 << 20, description="KV cache size on CPU")
    threads: int = Field(0, ge=0, description="threads of the model on CPU; 0: every core")
    drain_timeout: float = Field(30.0, ge=0, description="seconds in-flight requests may take")
    step_timeout: float = Field(
        600.0, gt=0, description="seconds the engine may compute on one step before it is killed"
    )
    max_body_bytes: int = Field(32 << 20, ge=1, description="largest request body")
    max_json_values: int = Field(200_000, ge=1, description="values a JSON body may hold")
    max_messages: int = Field(4096, ge=1, description="messages of a conversation")
    max_n: int = Field(128, ge=1, description="answers to a prompt, `n`")
    max_sequences: int = Field(2048, ge=1, description="prompts of a request, times `n`")
    max_grammar_bytes: int = Field(
        256 << 10, ge=1, description="largest schema, regex, grammar or list of choices"
    )
    max_grammar_seconds: int = Field(5, ge=1, description="seconds one may take to compile")
    max_connections: int = Field(4096, ge=1, description="connections open at once")
    write_timeout: float = Field(
        30.0, gt=0, description="seconds an answer may wait for a client that does not read"
    )
    max_cpu_isa: Literal["auto", "avx2", "avx512"] = Field(
        "auto", description="avx2, avx512: behave as the oldest machine of the fleet"
    )
    tool_parser: str = Field(
        "auto", min_length=1, description="what reads tool calls: a parser of vLLM's, none, or auto"
    )
    reasoning_parser: str = Field(
        "auto", min_length=1, description="what reads thoughts: a parser of vLLM's, none, or auto"
    )
    vllm_flags: tuple[str, ...] = Field((), description="JSON array of further vLLM flags")

    @field_validator("adapters", mode="after")
    @classmethod
    def _aliases(cls, adapters: dict[str, str]) -> dict[str, str]:
        return {check_alias(alias): source for alias, source in adapters.items()}

    def environment(self) -> dict[str, str]:
        """These settings as QUANTSERVE_* variables, what `load` reads back."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {variable(name): _text(value) for name, value in values.items()}


def check_alias(alias: str) -> str:
    """An alias is letters, digits and `._-/`: `:` and `@` belong to versions."""
    if len(alias) > LONGEST_ALIAS:
        raise ValueError(f"adapter alias {alias[:20]!r}...: at most {LONGEST_ALIAS} characters")
    if not alias or not all(c.isalnum() or c in "._-/" for c in alias) or not alias.isascii():
        raise ValueError(f"adapter alias {alias!r}: use letters, digits and . _ - /")
    if not {"", ".", ".."}.isdisjoint(alias.split("/")):
        raise ValueError(f"adapter alias {alias!r}: between slashes stand names, no '.' or '..'")
    if alias.rpartition("/")[2] in RESERVED:
        raise ValueError(f"adapter alias {alias!r}: {', '.join(RESERVED)} end admin routes")
    if alias in NOBODY:
        raise ValueError(f"adapter alias {alias!r}: metrics count under it what no alias answered")
    return alias


def load(env: Mapping[str, str] = os.environ, **given: object) -> Settings:
    """Settings from `env`, with `given` (the command line) over it; None means not given.

    SettingsError names each unknown or unusable setting.
    """
    names = {variable(name): name for name in Settings.model_fields}
    env = {key: env[key] for key in env if not _is_service_link(key, env[key])}
    known = (*names, SERVER, API_KEY)
    if strangers := sorted(key for key in env if key.startswith(PREFIX) and key not in known):
        raise SettingsError(f"unknown settings: {', '.join(strangers)}; known: {', '.join(known)}")
    told = {names[key]: _parsed(names[key], env[key]) for key in env if key in names}
    told |= {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(told)
    except ValidationError as fault:
        lines = [f"{_place(e['loc'], given)}: {e['msg']}" for e in fault.errors()]
        raise SettingsError("; ".join(lines)) from fault


def client(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The server that commands ask, and the key they show it; empty where not set."""
    return env.get(SERVER, ""), env.get(API_KEY, "")


@contextmanager
def naming_variables(settings: Settings, env: Mapping[str, str] = os.environ) -> Iterator[None]:
    """A SettingsError in there says which variables the values come from that it speaks of."""
    try:
        yield
    except SettingsError as fault:
        words = str(fault)
        names = [
            n for n in Settings.model_fields if variable(n) in env and variable(n) not in words
        ]
        spoken = [name for name in names if _speaks_of(words, name, getattr(settings, name))]
        blamed = [variable(name) for name in spoken if _is_from(env, name, settings)]
        if not blamed:
            raise
        raise SettingsError(f"{words}; set by {' and '.join(blamed)}") from fault


def variable(name: str) -> str:
    """Of a setting."""
    return PREFIX + name.upper()


def inherited(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The parent's own environment without our settings, for a child to add to."""
    return {key: value for key, value in env.items() if not key.startswith(PREFIX)}


def _place(location: tuple[int | str, ...], given: Mapping[str, object]) -> str:
    """A setting by its option's name, or its variable's where it came from there."""
    name, *rest = map(str, location)
    named = _option(name) if given.get(name) is not None else variable(name)
    return ".".join([named, *rest])


def _option(name: str) -> str:
    return "--adapter" if name == "adapters" else "--" + name.replace("_", "-")


def _speaks_of(words: str, name: str, value: object) -> bool:
    text = _text(value)
    return bool(re.search(rf"{_option(name)}(?![\w-])", words)) or (len(text) > 2 and text in words)


def _is_from(env: Mapping[str, str], name: str, settings: Settings) -> bool:
    """Whether it is what its variable says, and not what the command line said instead."""
    alone = load({variable(name): env[variable(name)]})
    return bool(getattr(alone, name) == getattr(settings, name))


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set it: by its exact pattern and the kind of its value."""
    match = SERVICE_LINK.fullmatch(name)
    if match is None:
        return False
    if match["host"] or match["addr"]:
        return _is_ip(value)
    if match["number"] or match["port"]:
        return value.isdecimal()
    if match["proto"]:
        return value in ("tcp", "udp", "sctp")
    return re.fullmatch(r"(tcp|udp|sctp)://\S+:\d+", value) is not None


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _parsed(name: str, text: str) -> object:
    """JSON settings from their text; pydantic parses the rest."""
    if name not in _SHAPES:
        return text
    try:
        return Settings.model_validate_json(f'{{"{name}": {text}}}').model_dump()[name]
    except ValidationError as fault:
        raise SettingsError(f"{variable(name)} is not {_SHAPES[name]}: {text!r}") from fault


_SHAPES = {
    "adapters": "a JSON object of alias: source",
    "source_schemes": "a JSON array of strings",
    "vllm_flags": "a JSON array of strings",
}


def _text(value: object) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
