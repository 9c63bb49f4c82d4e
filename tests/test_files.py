"""`intake.files`: a model's folder in which a name has no file of its own behind it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.artifact import INDEX, SINGLE
from quant.errors import SourceError
from quant.intake import source
from tests import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        source.open(str(folder), cache=folder.parent / "cache")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nothing(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def round_and_round(path: Path) -> None:
    path.symlink_to(path.name)


def bound(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("put", "what"),
    [
        (os.mkfifo, "a pipe"),
        (bound, "a socket"),
        (nothing, "a link to nothing"),
        (round_and_round, "a link to nothing"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.write_text(POINTER), "a Git LFS pointer, not the file"),
    ],
    ids=["pipe", "socket", "link", "circle", "device", "pointer"],
)
@pytest.mark.parametrize(
    "name",
    [
        SINGLE,
        INDEX,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_a_name_without_a_file_is_refused(
    model: Path, name: str, put: Callable[[Path], None], what: str
) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    put(path)
    assert refused(model).startswith(f"{path} is {what}: ")


def test_a_shard_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path / "model", shard="50KB")
    shard = min(model.glob("model-*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    assert refused(model).startswith(f"{shard} is a pipe")


def test_links_to_files_and_folders_are_as_good(made: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in made.iterdir():
        (model / path.name).symlink_to(path)
    (model / "notices").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(model)
    opened = source.open(str(tmp_path / "linked"), cache=tmp_path / "cache")
    assert opened.fingerprint == source.open(str(made)).fingerprint


@pytest.mark.parametrize("weights", [SINGLE, "pytorch_model.bin"])
def test_a_model_with_an_adapter_beside_it_is_refused(model: Path, weights: str) -> None:
    """transformers would load the adapter on top; the artifact would be without."""
    (model / SINGLE).rename(model / weights)
    tiny.adapter_folder(model.parent / "lora", tiny.model_folder(model.parent / "base"))
    for path in (model.parent / "lora").iterdir():
        shutil.copy(path, model)
    assert "holds a whole model and an adapter (adapter_config.json): move" in refused(model)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "cannot be read as JSON: "), ("[]", "is not a JSON object")],
    ids=["cut short", "list"],
)
def test_settings_that_are_none_are_refused(model: Path, name: str, text: str, told: str) -> None:
    (model / name).write_text(text)
    assert refused(model).startswith(f"{model / name} {told}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": "hot"}, "temperature is 'hot': expected a finite number"),
        ({"top_p": float("nan")}, "top_p is nan: expected a finite number"),
        ({"top_k": True}, "top_k is True: expected a finite number"),
        ({"repetition_penalty": [1]}, "repetition_penalty is [1]: expected a finite number"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': expected a token's number, or a list"),
        ({"eos_token_id": [3, "x"]}, "eos_token_id is [3, 'x']: expected a token's number"),
        ({"max_new_tokens": -1}, "is refused by transformers: `max_new_tokens` must be greater"),
        ({"watermarking_config": 5}, "is refused by transformers: "),
    ],
)
def test_generation_settings_that_no_server_takes_are_refused(
    model: Path, settings: dict[str, Any], told: str
) -> None:
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert told in refused(model)


def test_generation_settings_of_the_hub_are_taken(model: Path) -> None:
    common = {"do_sample": True, "temperature": 0.6, "top_p": 1, "top_k": 20, "bos_token_id": None}
    told = {**common, "eos_token_id": [3, 2], "pad_token_id": 1, "transformers_version": "4.51.0"}
    (model / "generation_config.json").write_text(json.dumps(told))
    assert source.open(str(model)).folder == model
