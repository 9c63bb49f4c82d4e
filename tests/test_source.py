"""Opening a model: what is read, tensor by tensor, and every way in which it is refused."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quant import artifact
from quant.artifact import INDEX, SINGLE
from quant.errors import AdapterError, SourceError
from quant.intake import loaded, source
from quant.lora.adapter import LINEAGE
from tests import tiny
from tests.lora import write_lora

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def refused(folder: Path | str, *adapters: Path) -> str:
    with pytest.raises(SourceError) as caught:
        source.open(str(folder), adapters=adapters)
    return str(caught.value)


def adapter_refused(folder: Path, *adapters: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        source.open(str(folder), adapters=adapters)
    return caught.value


def test_a_folder_is_read_as_it_is(made: Path) -> None:
    opened = source.open(str(made))
    stored = load_file(made / SINGLE)
    assert opened.tensors.names() == tuple(sorted(stored))
    for name, tensor in stored.items():
        assert torch.equal(opened.tensors.get(name), tensor)
        assert opened.tensors.shape(name) == tuple(tensor.shape)
        assert opened.tensors.dtype(name) == tensor.dtype == torch.bfloat16
        assert name in opened.tensors and not opened.tensors.is_changed(name)
    assert (opened.folder, opened.spec, opened.adapters) == (made.resolve(), str(made), ())
    assert opened.architecture == "LlamaForCausalLM"
    assert opened.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert opened.dtype == torch.bfloat16


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MIXTURES, *tiny.SEEING, "gpt_neox"])
def test_every_family_opens_as_it_lies(tmp_path: Path, family: str) -> None:
    folder, said = tiny.model_folder(tmp_path / "model", family), list[str]()
    opened = source.open(str(folder), cache=tmp_path / "cache", say=said.append)
    assert (opened.config.model_type, opened.folder, said) == (family, folder, [])
    assert opened.fingerprint.weights == artifact.weights_fingerprint(folder)
    assert opened.tensors.names() == tuple(sorted(load_file(folder / SINGLE)))


def test_a_tensor_that_is_not_there_is_named(made: Path) -> None:
    tensors = source.open(str(made)).tensors
    assert "ghost.weight" not in tensors
    for read in (tensors.get, tensors.shape, tensors.dtype):
        with pytest.raises(SourceError, match=rf"{made} has no tensor named ghost\.weight"):
            read("ghost.weight")


def test_shards_open_as_one_file_does(made: Path, tmp_path: Path) -> None:
    whole = source.open(str(made))
    split = source.open(str(tiny.model_folder(tmp_path / "sharded", shard="50KB")))
    assert len({header.file for header in split.tensors.headers.values()}) > 2
    assert split.fingerprint == whole.fingerprint
    assert split.bytes == whole.bytes
    for name in whole.tensors.names():
        assert torch.equal(split.tensors.get(name), whole.tensors.get(name))


def test_a_tied_head_is_not_a_tensor(made: Path, tmp_path: Path) -> None:
    tied = source.open(str(tiny.model_folder(tmp_path, tied=True)))
    untied = source.open(str(made))
    assert set(untied.tensors.names()) - set(tied.tensors.names()) == {"lm_head.weight"}
    assert tied.bytes < untied.bytes
    assert tied.fingerprint.weights != untied.fingerprint.weights
    assert tied.fingerprint.tokenizer == untied.fingerprint.tokenizer


def test_the_served_dtype_is_the_configs(model: Path) -> None:
    tiny.edit_json(model / "config.json", dtype="float16")
    assert source.open(str(model)).dtype == torch.float16


def test_without_a_word_in_the_config_the_most_bytes_decide(model: Path) -> None:
    tiny.edit_json(model / "config.json", dtype=None)
    tensors = load_file(model / SINGLE)
    wide = {n: t.float() for n, t in tensors.items() if "norm" in n or "self_attn" in n}
    assert len(wide) > len(tensors) / 2
    save_file(tensors | wide, model / SINGLE)
    assert source.open(str(model)).dtype == torch.bfloat16


def test_the_cache_is_where_it_is_asked_to_be(made: Path, tmp_path: Path) -> None:
    assert source.open(str(made), cache=tmp_path / "c").cache == tmp_path / "c"
    assert source.open(str(made)).cache == Path("~/.cache/quantserve").expanduser()


@pytest.mark.parametrize("spec", ["gone", "./gone", "a/b/c", "/nowhere/at/all", "gone.gguf"])
def test_a_folder_that_is_not_there_is_named(spec: str) -> None:
    assert refused(spec) == f"{Path(spec)} does not exist"


@pytest.fixture
def refusing_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The only way to the hub is a proxy that answers 403 to everything."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    peer.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    close_session()


@pytest.mark.usefixtures("refusing_proxy")
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(SourceError, match=r"^nobody/no-model is no folder here, and the hub said"):
        source.open("nobody/no-model", cache=tmp_path, say=said.append)
    assert said == ["looking for nobody/no-model on the hub"]


def test_a_file_of_another_kind_is_refused(made: Path) -> None:
    assert "is neither a model folder nor a .gguf file" in refused(made / SINGLE)


def test_a_folder_without_a_config_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    assert refused(model) == f"{model} is not a model folder: it has no config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "cannot be read as JSON"), ("[]", "is not a JSON object"), ("{}", "architecture")],
)
def test_a_broken_config_is_named(model: Path, text: str, reason: str) -> None:
    (model / "config.json").write_text(text)
    message = refused(model)
    assert message.startswith(f"{model / 'config.json'} ") and reason in message


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "invented"},
        {"model_type": None},
        {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    ],
    ids=["unknown", "none", "code"],
)
def test_an_unknown_architecture_is_refused(model: Path, change: dict[str, Any]) -> None:
    tiny.edit_json(model / "config.json", **change)
    assert refused(model).startswith(f"{model / 'config.json'} is not of a known architecture: ")


@pytest.mark.parametrize("kernels", ["flash_attention_2", "flash_attention_3", "nobody's"])
def test_a_trainers_kernels_are_not_asked_for(model: Path, kernels: str) -> None:
    tiny.edit_json(model / "config.json", _attn_implementation=kernels)
    opened = source.open(str(model))
    assert loaded.parent(opened, torch.device("cpu")).config.num_hidden_layers == 2


def test_code_in_the_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    change = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    tiny.edit_json(model / "config.json", **change)
    refused(model)
    assert not ran.exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["bart"](
        vocab_size=tiny.VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    save_file({"shared.weight": torch.ones(tiny.VOCAB, 32)}, tmp_path / SINGLE)
    message = refused(tmp_path)
    assert "BartForConditionalGeneration is not a decoder-only language model" in message


@pytest.mark.parametrize(
    ("names", "told"),
    [(["LlamaForSequenceClassification"],) * 2, ([], ["llama"])],
)
def test_a_model_without_a_language_head_is_refused(
    model: Path, names: list[str] | None, told: list[str]
) -> None:
    tiny.edit_json(model / "config.json", architectures=names)
    assert f"{told[0]} is not a decoder-only language model" in refused(model)


def test_a_quantized_model_is_refused(model: Path) -> None:
    tiny.edit_json(model / "config.json", quantization_config={"quant_method": "gptq"})
    tensors = load_file(model / SINGLE)
    codes = torch.ones(16, 64, dtype=torch.int32)
    save_file(tensors | {f"{DOWN}.weight": codes}, model / SINGLE)
    assert "has a quantization_config: the model is quantized already" in refused(model)


@pytest.mark.parametrize(
    ("dtype", "told"),
    [(torch.int8, "int8"), (torch.float8_e4m3fn, "float8_e4m3fn"), (torch.bool, "bool")],
)
def test_weights_that_are_no_full_numbers_are_refused(
    model: Path, dtype: torch.dtype, told: str
) -> None:
    tensors = load_file(model / SINGLE)
    save_file(tensors | {f"{DOWN}.weight": tensors[f"{DOWN}.weight"].to(dtype)}, model / SINGLE)
    assert refused(model).startswith(
        f"{model / SINGLE}: {DOWN}.weight is {told}: not full-precision weights"
    )


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path, shard="50KB")
    shard = sorted(model.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(model).startswith(f"{shard} is truncated")


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path / "model", shard="50KB")
    shutil.copy(next(model.glob("*.safetensors")), tmp_path / "other.safetensors")
    tiny.edit_json(model / INDEX, weight_map={"x": "../other.safetensors"})
    assert "points outside its folder: '../other.safetensors'" in refused(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / SINGLE).unlink()
    assert f"holds neither {SINGLE} nor {INDEX}" in refused(model)
    save_file({}, model / SINGLE)
    assert "holds no tensors" in refused(model)


def test_an_adapter_changes_its_modules_and_not_the_fingerprint(made: Path, tmp_path: Path) -> None:
    plain = source.open(str(made))
    merged = source.open(str(made), adapters=[write_lora(tmp_path / "lora", {DOWN: (64, 128)})])
    assert merged.fingerprint == plain.fingerprint
    assert [name for name in merged.tensors.names() if merged.tensors.is_changed(name)] == [
        f"{DOWN}.weight"
    ]
    assert merged.tensors.dtype(f"{DOWN}.weight") == torch.float32
    assert merged.tensors.get(f"{DOWN}.weight").dtype == torch.float32
    assert merged.tensors.dtype("lm_head.weight") == torch.bfloat16
    assert merged.dtype == torch.bfloat16


def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", {DOWN: (64, 256)})
    fault = adapter_refused(made, wide)
    assert (fault.field, fault.expected, fault.found) == (DOWN, "64x128", "64x256")
    deep = write_lora(tmp_path / "deep", {"model.layers.9.mlp.down_proj": (64, 128)})
    assert adapter_refused(made, deep).expected == "no such module in the base"


def test_lineage_holds_whatever_the_shapes_say(made: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", {DOWN: (64, 128)})
    for weights in (artifact.weights_fingerprint(made), "f" * 64):
        (folder / LINEAGE).write_text(json.dumps({"format": 1, "base": {"weights": weights}}))
        if weights == "f" * 64:
            assert adapter_refused(made, folder).field == "base weights"
        else:
            assert source.open(str(made), adapters=[folder]).adapters[0].folder == folder


def test_an_adapter_given_twice_is_refused(made: Path, tmp_path: Path) -> None:
    first = write_lora(tmp_path / "first", {DOWN: (64, 128)})
    again = Path(shutil.copytree(first, tmp_path / "again"))
    assert str(adapter_refused(made, first, again)) == f"adapter {again} is given twice"


def test_an_adapter_on_a_tied_head_unties_it_in_a_copy(tmp_path: Path) -> None:
    """Some trainers store the head beside the embedding that it is: the copy counts for nothing."""
    base = tiny.model_folder(tmp_path / "base", tied=True)
    tensors = load_file(base / SINGLE)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, base / SINGLE)
    folder = write_lora(tmp_path / "lora", {"lm_head": (tiny.VOCAB, 64)})
    plain = source.open(str(base))
    opened = source.open(str(base), adapters=[folder], cache=tmp_path / "cache")
    assert not opened.config.tie_word_embeddings and opened.folder != base
    assert opened.fingerprint == plain.fingerprint
    embedding = opened.tensors.get("model.embed_tokens.weight")
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"])
    head = opened.tensors.get("lm_head.weight")
    assert (head - embedding.float()).abs().mean() > 0.01
    again = source.open(str(base), adapters=[folder], cache=tmp_path / "cache")
    assert again.folder == opened.folder


def test_the_model_that_opens_is_the_model_that_loads(made: Path) -> None:
    """The names and shapes are those that transformers itself asks for."""
    loaded = AutoModelForCausalLM.from_pretrained(made).state_dict()
    opened = source.open(str(made)).tensors
    assert set(opened.names()) == set(loaded)
    with safe_open(made / SINGLE, framework="pt") as file:
        assert set(file.keys()) == set(loaded)
