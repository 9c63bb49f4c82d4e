"""The `quantserve` command: `serve`, and the commands of `quant.cli` beside it.

Every mistake of the operator's is one line on stderr and exit status 2. Nothing heavy is imported
here: `quantserve --help` and the parent of a server stay light.
"""

from __future__ import annotations

import asyncio
import ipaddress
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

from quant import artifact, extras, interrupt, usage
from quant import cli as quant_cli
from serve import doctor_cli, keys, listening, registry_cli, variables
from serve import settings as serve_settings
from serve.client import cli as client_cli
from serve.console import Console
from serve.errors import ServeError, SettingsError
from serve.settings import Settings
from serve.supervisor import Supervisor
from serve.vllm_flags import adopt

app = usage.App(
    callback=usage.first,
    name="quantserve",
    help="From a fine-tuned model to a quantized, monitored OpenAI-compatible server.",
)
app.registered_commands += quant_cli.app.registered_commands
app.registered_groups += quant_cli.app.registered_groups
app.registered_commands += client_cli.app.registered_commands
client_cli.join(app)
app.registered_commands += doctor_cli.app.registered_commands
app.add_typer(registry_cli.app, name="registry")


def main() -> None:
    """The console script."""
    try:
        quant_cli.main(app, known=(ServeError,))
    except ServeError as fault:
        quant_cli.end(fault, 2, str(fault))
    finally:
        interrupt.ignore()


_ADDRESS, _ADAPTERS, _ENGINE = "Address and keys", "Adapters", "Engine"  # groups of options


@app.command(
    cls=variables.Whole,
    epilog="""quantserve serve smollm2
quantserve serve smollm2 --adapter pirate=./pirate-lora --state-dir state
quantserve serve my-w8a8 --host 0.0.0.0 --api-key-file keys -- --max-num-seqs 64""",
)
def serve(
    artifact_folder: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="what `quantize` wrote, or any model folder"),
    ],
    vllm_flags: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM_FLAG...", help="passed to vLLM; win")
    ] = None,
    adapter_flags: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            rich_help_panel=_ADAPTERS,
            metavar="ALIAS=SOURCE",
            help="serve this PEFT adapter; repeatable",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", rich_help_panel=_ADDRESS, help="address to bind [127.0.0.1]"
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(rich_help_panel=_ADDRESS, help="port to bind; 0: any that is free [8000]"),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ADDRESS,
            help="serve HTTPS with this certificate, a PEM file",
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_ADDRESS, help="its key [in the same file]"),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_ADDRESS,
            help="model id of the base [the folder's name]",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ADDRESS,
            help="a line per key, NAME:SCOPES:KEY, scopes of inference, metrics, admin; "
            "required to bind anything but loopback",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_ADAPTERS,
            help="keep loaded adapters here across runs [this run only]",
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=_ADAPTERS,
            help="the adapter registry, sqlite:///FILE or postgresql://USER@HOST/NAME; a password "
            "is better given in QUANTSERVE_DATABASE_URL [a file in the state dir]",
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_ADAPTERS,
            help="adapter paths must be under this folder [any]",
        ),
    ] = None,
    allow_hub: Annotated[
        bool | None,
        typer.Option("--allow-hub", rich_help_panel=_ADAPTERS, help="adapters may be hub ids"),
    ] = None,
    max_adapters: Annotated[
        int | None,
        typer.Option(rich_help_panel=_ADAPTERS, help="adapters in one batch; 0 turns LoRA off [4]"),
    ] = None,
    max_lora_rank: Annotated[
        int | None,
        typer.Option(rich_help_panel=_ADAPTERS, help="largest rank an adapter may have [16]"),
    ] = None,
    prompt_tuning: Annotated[
        bool | None,
        typer.Option(rich_help_panel=_ADAPTERS, help="serve prompt-tuned adapters [on CPU]"),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_ENGINE,
            help="vLLM's parser of tool calls, none, or auto: by the chat template [auto]",
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_ENGINE,
            help="vLLM's parser of thoughts, none, or auto: by the chat template [auto]",
        ),
    ] = None,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES", rich_help_panel=_ENGINE, help="KV cache on CPU, in bytes [512 MiB]"
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(rich_help_panel=_ENGINE, help="threads of the model on CPU [every core]"),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="seconds running requests get after SIGTERM [30]"),
    ] = None,
    max_cpu_isa: Annotated[
        str | None,
        typer.Option(
            metavar="avx2|avx512",
            rich_help_panel=_ENGINE,
            help="avx2 or avx512: behave as the oldest machine of the fleet [auto]",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify", help="read the artifact whole first and compare digests [tensors: sizes]"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option(help="pass on all of vLLM's log")] = False,
) -> None:
    """Serve ARTIFACT behind the OpenAI API, adapters hot-swappable, metrics at /metrics.

    An option wins over its variable, which stands behind it in parentheses. Stops on SIGTERM or
    Ctrl-C after running requests have ended; a second signal stops at once.
    """
    settings = serve_settings.load(
        artifact=artifact_folder.resolve(),
        adapters=_adapters(adapter_flags),
        vllm_flags=tuple(vllm_flags) if vllm_flags else None,
        host=host,
        port=port,
        ssl_certfile=ssl_certfile.resolve() if ssl_certfile else None,
        ssl_keyfile=ssl_keyfile.resolve() if ssl_keyfile else None,
        model_name=model_name,
        api_key_file=api_key_file.resolve() if api_key_file else None,
        state_dir=state_dir.resolve() if state_dir else None,
        database_url=database_url,
        adapter_root=adapter_root.resolve() if adapter_root else None,
        allow_hub=allow_hub,
        max_adapters=max_adapters,
        max_lora_rank=max_lora_rank,
        prompt_tuning=prompt_tuning,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        kv_cache_bytes=kv_cache_bytes,
        threads=threads,
        drain_timeout=drain_timeout,
        max_cpu_isa=max_cpu_isa,
        verify=verify,
    )
    with serve_settings.naming_variables(settings):
        settings = adopt(settings, serve_settings.inherited())
        extras.need("torch", "transformers", "vllm")  # the worker imports them, we never do
        _check(settings)
    with ExitStack() as kept:
        if settings.state_dir is None:
            folder = kept.enter_context(tempfile.TemporaryDirectory(prefix="quantserve-"))
            settings = settings.model_copy(update={"state_dir": Path(folder)})
        console = Console()
        kept.callback(console.close)
        with interrupt.at_once():  # until the supervisor handles signals itself
            code = asyncio.run(Supervisor(settings, console.say, verbose=verbose).run())
    raise typer.Exit(code)


def _adapters(flags: list[str] | None) -> dict[str, str] | None:
    if flags is None:
        return None
    chosen = {}
    for flag in flags:
        alias, separator, source = flag.partition("=")
        if not separator or not source:
            raise SettingsError(f"--adapter {flag!r}: expected ALIAS=SOURCE")
        chosen[alias] = str(Path(source).resolve()) if Path(source).exists() else source
    return chosen


def _check(settings: Settings) -> None:
    """Refuse before loading anything what would be refused after it."""
    if settings.api_key_file is None and not _loopback(settings.host):
        raise SettingsError(
            f"refusing to listen on {settings.host} without keys: give --api-key-file, "
            "or bind 127.0.0.1"
        )
    keys.load(settings.api_key_file)
    listening.encryption(settings)
    if settings.database_url:
        from serve.adapters import database

        database.checked(settings.database_url)
    for folder, may_come in ((settings.artifact, False), (settings.state_dir, True)):
        if folder and not folder.is_dir() and (folder.exists() or not may_come):
            raise SettingsError(f"{folder} is not a folder")
    _check_artifact(settings.artifact, whole=settings.verify)
    if settings.adapters and not settings.max_adapters:
        raise SettingsError("--adapter needs at least one slot: --max-adapters is 0")
    if settings.adapters:
        # Needs torch, which would stay in this process for as long as it serves.
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            apart.submit(_check_adapters, settings).result()


def _check_artifact(folder: Path, *, whole: bool) -> None:
    """ArtifactError where it would load otherwise than it was sealed; any other model may."""
    manifest = artifact.read(folder)
    if manifest is not None:
        # `compare` may be at the card at this moment, which no loader reads.
        artifact.verify(folder, manifest, tensors=whole, but=[artifact.CARD])
    elif whole:
        raise SettingsError(
            f"--verify: {folder} has no {artifact.MANIFEST} that says what was sealed; leave it out"
            " to serve a model that is no artifact"
        )


def _check_adapters(settings: Settings) -> None:
    from serve.adapters import names, store

    for alias in settings.adapters:
        if why := names.fault(alias, names.base_names(settings)):
            raise SettingsError(f"--adapter {alias}=...: {why}; give it another alias")
    base = store.base_of(settings.artifact, settings.max_lora_rank)
    for source in settings.adapters.values():
        if Path(source).exists() or not (
            "://" in source or settings.adapter_root or settings.allow_hub
        ):
            store.check(Path(source), base)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
