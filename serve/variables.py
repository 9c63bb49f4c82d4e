"""Help pages of commands whose options are settings: each names the variable that says the same."""

from __future__ import annotations

from typing import Any

from quant import usage
from serve import settings
from serve.settings import Settings

# What a parameter is called where it cannot have its setting's name.
_NAMES = {"artifact_folder": "artifact", "adapter_flags": "adapters"}


class Command(usage.Command):
    """A command that reads some of the settings."""

    def variable(self, parameter: Any) -> str:
        name = _NAMES.get(parameter.name, parameter.name)
        return settings.variable(name) if name in Settings.model_fields else ""


class Whole(Command):
    """One that reads all of them: those without an option stand in a section of their own."""

    def variables(self) -> list[tuple[str, str]]:
        told = {_NAMES.get(each.name, each.name) for each in self.params}
        others = {name: field for name, field in Settings.model_fields.items() if name not in told}
        return [
            (settings.variable(name), field.description or "") for name, field in others.items()
        ]
