"""`quantserve serve`: what an operator gets wrong is one line and exit status 2, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quant import artifact
from tests import tiny
from tests.lora import write_lora
from tests.test_artifact import FACTS

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
ROOT = Path(__file__).parents[1]
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": torch.zeros(8, 6)}, folder / "model.safetensors")
    return folder


def refused(*words: str | Path, **env: str) -> str:
    """The one line that `quantserve serve` says before it exits with 2."""
    done = subprocess.run(
        [QUANTSERVE, "serve", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "nowhere")


def test_a_state_folder_that_is_a_file(model: Path) -> None:
    said = refused(model, "--state-dir", model / "config.json")
    assert "config.json is not a folder" in said


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


def test_a_public_address_without_keys(model: Path) -> None:
    assert "--api-key-file" in refused(model, "--host", "0.0.0.0")


def test_an_unknown_setting(model: Path) -> None:
    assert "QUANTSERVE_PROT" in refused(model, QUANTSERVE_PROT="1")


def test_a_broken_manifest(model: Path) -> None:
    (model / "quantserve.json").write_text("{}")
    assert "not a valid manifest" in refused(model)


@pytest.fixture
def sealed(model: Path) -> Path:
    artifact.seal(model, FACTS)
    return model


def test_an_artifact_that_would_load_otherwise_than_sealed(sealed: Path) -> None:
    (sealed / "chat_template.jinja").write_text("mine")
    assert "chat_template.jinja is not part of the sealed artifact" in refused(sealed)
    (sealed / "chat_template.jinja").unlink()
    (sealed / "config.json").write_text("[]")
    assert "config.json differs from what was sealed" in refused(sealed)


def test_a_manifest_that_was_edited(sealed: Path) -> None:
    tiny.edit_json(sealed / "quantserve.json", source="mine")
    assert "quantserve.json was altered after it was sealed" in refused(sealed)


def test_one_bit_of_the_weights_where_it_is_asked_for(sealed: Path) -> None:
    weights = sealed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "model.safetensors differs from what was sealed" in refused(sealed, "--verify")
    by_size = refused(sealed, "--adapter", "legal=ghost")
    assert "differs" not in by_size and "ghost" in by_size


def test_a_model_without_a_manifest_where_it_is_to_be_verified(model: Path) -> None:
    assert "has no quantserve.json that says what was sealed" in refused(model, "--verify")


def test_an_adapter_for_another_base(model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {MODULE: (8, 7)})
    said = refused(model, "--adapter", f"legal={lora}")
    assert MODULE in said and "8x6" in said


def test_an_adapter_without_a_path(model: Path) -> None:
    assert "ALIAS=SOURCE" in refused(model, "--adapter", "legal")


def test_an_alias_that_looks_like_a_version(model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {MODULE: (8, 6)})
    assert "alias" in refused(model, "--adapter", f"legal@1={lora}")


def test_an_adapter_that_is_not_there(model: Path) -> None:
    assert "ghost does not exist" in refused(model, "--adapter", "legal=ghost")


def test_a_database_of_an_unknown_kind(model: Path) -> None:
    assert "'mysql' is not known" in refused(model, "--database-url", "mysql://h/d")


def test_a_key_file_with_a_bad_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("app:everything:sk-0123456789abcdef\n")
    (tmp_path / "keys").chmod(0o600)
    assert "keys:1" in refused(model, "--api-key-file", tmp_path / "keys")


@pytest.mark.parametrize(
    ("alias", "flags"),
    [
        ("model", ()),
        ("mine", ("--model-name", "mine")),
        ("b", ("--", "--served-model-name", "a", "b")),
        ("b", ("--", "--served-model-name=b")),
    ],
)
def test_an_alias_of_the_bases_name(
    model: Path, tmp_path: Path, alias: str, flags: tuple[str, ...]
) -> None:
    fits = write_lora(tmp_path / "lora", {MODULE: (8, 6)})
    told = refused(model, "--adapter", f"{alias}={fits}", *flags)
    assert f"--adapter {alias}=" in told and "is the base model's name" in told


def test_adapters_are_checked_before_the_start_without_torch(model: Path, tmp_path: Path) -> None:
    """The parent stays for as long as the server does, and 200 MB with it."""
    fits = write_lora(tmp_path / "lora", {MODULE: (8, 6)})
    (fits / "chat_template.jinja").write_text("{{ messages[0].content }}")
    code = (
        "import sys; from serve import cli; from serve.settings import Settings;"
        f"cli._check(Settings(artifact={str(model)!r}, adapters={{'legal': {str(fits)!r}}}));"
        "print(sorted({'torch', 'numpy', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "flag", ["--host", "--port", "--uds", "--api-key", "--ssl-ca-certs", "--api_key", "--port=9"]
)
def test_a_flag_of_vllms_that_would_move_the_server(model: Path, flag: str) -> None:
    assert "after the --: " in refused(model, "--", flag, "9")


def test_tls_without_a_certificate(model: Path) -> None:
    assert "no TLS with" in refused(model, "--", "--ssl-certfile", "/none.pem")
    assert "give both" in refused(model, "--ssl-keyfile", "/none.pem")
