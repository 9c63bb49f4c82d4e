"""What an alias may be called, and how one of its versions is asked for by name."""

from __future__ import annotations

import re
from collections.abc import Collection

from serve.errors import BadRequest
from serve.settings import Settings, check_alias

_SERVED = "--served-model-name"
_VERSION = re.compile(r"(?P<alias>[^@]+)@(?P<digest>[0-9a-f]{12,64})")


def base_names(settings: Settings) -> tuple[str, ...]:
    """What the base will answer to, as far as it can be told before vLLM has read its flags."""
    found = [settings.model_name or settings.artifact.resolve().name]
    taking = False
    for word in settings.vllm_flags:
        flag, _, value = word.partition("=")
        if flag.replace("_", "-") == _SERVED:
            found, taking = [value] if value else [], True
        elif taking and not word.startswith("-"):
            found.append(word)
        else:
            taking = False
    return tuple(found)


def fault(alias: str, base_names: Collection[str]) -> str | None:
    """Why nothing can be served under this alias, None where it can."""
    if alias in base_names:
        return f"{alias!r} is the base model's name"
    try:
        check_alias(alias)
    except ValueError as refusal:
        return str(refusal)
    return None


def check(alias: str, base_names: Collection[str]) -> None:
    """BadRequest for an alias that cannot be."""
    why = fault(alias, base_names)
    if why is not None:
        raise BadRequest(why, param="alias")


def version_name(alias: str, digest: str) -> str:
    """A version's name in the engine, and a model id that means this version and no other."""
    return f"{alias}@{digest[:12]}"


def asked(model: str) -> tuple[str, str]:
    """The alias that a model id names, and the beginning of a digest where it names a version."""
    named = _VERSION.fullmatch(model)
    return (named["alias"], named["digest"]) if named else (model, "")
