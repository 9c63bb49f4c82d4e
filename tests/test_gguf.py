"""GGUF files: converted once into a plain folder, and refused when they are broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from quant import room
from quant.errors import RoomError, SourceError, SpaceError
from quant.intake import cached, gguf, source
from quant.tokens import load_tokenizer, of_text
from tests import tiny, tiny_gguf

HEAD = 20_000  # bytes, all of them metadata


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tiny.tokenizer(tmp_path / "tokenizer")
    return tiny_gguf.write(tmp_path / "small.gguf", tiny.model("qwen2"), tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def kept() -> Path:
    """Where the demo model is, or will be, converted on this machine."""
    return source.CACHE.expanduser()


@pytest.fixture(scope="module")
def head() -> bytes:
    with gguf.demo().open("rb") as file:
        return file.read(HEAD)


def leftovers(cache: Path) -> list[Path]:
    return list((cache / "gguf").iterdir())


def test_the_demo_is_in_the_package_that_carries_it() -> None:
    with gguf.demo().open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_the_demo_opens_as_any_model_does(kept: Path) -> None:
    opened = source.open("demo", cache=kept)
    assert (opened.architecture, opened.spec) == ("LlamaForCausalLM", "demo")
    assert opened.dtype == torch.bfloat16 and opened.config.num_hidden_layers == 30
    assert opened.tensors.shape("model.layers.29.mlp.down_proj.weight") == (576, 1536)
    assert opened.folder.parent == kept / "gguf"
    assert transformers.__version__ in opened.folder.name
    assert (opened.folder / "tokenizer.json").is_file()


def test_the_second_use_is_the_folder_of_the_first(kept: Path, tmp_path: Path) -> None:
    first = gguf.folder(gguf.demo(), kept, source.quiet)
    said: list[str] = []
    assert gguf.folder(gguf.demo(), kept, said.append) == first
    assert not said, "it was converted again"


def test_a_folder_named_demo_is_not_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"demo is not a model folder: it has no config\.json"):
        source.open("demo", cache=tmp_path / "cache")


def test_a_conversion_says_so_and_draws_no_bars(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    said: list[str] = []
    cache = tmp_path / "cache"
    made = gguf.folder(small, cache, said.append)
    (line,) = said
    where = re.escape(f"converting small.gguf to bfloat16 (once; kept in {cache}/gguf;")
    assert re.fullmatch(rf"{where} needs about \d\.\d GB of memory and \d\.\d GB of disk\)", line)
    assert leftovers(cache) == [made]
    assert (made.stat().st_mode & 0o777) == 0o755
    shown = capfd.readouterr()
    assert "it/s" not in shown.err and "%|" not in shown.err and not shown.out


def test_a_conversion_keeps_the_weights_and_the_tokenizer(small: Path, tmp_path: Path) -> None:
    opened = source.open(str(small), cache=tmp_path / "cache")
    expected = tiny.model("qwen2").state_dict()
    assert set(opened.tensors.names()) == set(expected)
    for name in opened.tensors.names():
        assert torch.equal(opened.tensors.get(name), expected[name].to(torch.bfloat16)), name
    ours = load_tokenizer(opened.folder)
    text = "the quick brown fox"
    assert of_text(text, ours) == of_text(text, load_tokenizer(tmp_path / "tokenizer"))
    assert ours.chat_template == tiny.CHAT_TEMPLATE


def test_another_file_of_the_same_name_is_converted_anew(small: Path, tmp_path: Path) -> None:
    first = gguf.folder(small, tmp_path / "cache", source.quiet)
    tiny_gguf.write(small, tiny.model("qwen2", seed=1), tmp_path / "tokenizer")
    second = gguf.folder(small, tmp_path / "cache", source.quiet)
    assert set(leftovers(tmp_path / "cache")) == {first, second} and first != second


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 4), (0, 64), (0, HEAD), (4, 10_000)])
def test_a_broken_file_is_one_line_and_leaves_nothing(
    tmp_path: Path, head: bytes, start: int, stop: int
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(head[start:stop])
    with pytest.raises(SourceError, match=rf"^{broken} cannot be read as a GGUF model: .+") as told:
        source.open(str(broken), cache=tmp_path / "cache")
    assert "\n" not in str(told.value)
    assert leftovers(tmp_path / "cache") == []


def test_a_file_that_ends_inside_its_weights_is_refused(small: Path, tmp_path: Path) -> None:
    small.write_bytes(small.read_bytes()[:-5000])
    with pytest.raises(SourceError, match=rf"^{small} cannot be read as a GGUF model: "):
        source.open(str(small), cache=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("place", [4, 8, 16, 24, 31])
def test_a_damaged_header_is_one_line(tmp_path: Path, head: bytes, place: int) -> None:
    damaged = bytearray(head)
    damaged[place : place + 8] = b"\xff" * 8
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(SourceError, match=r"damaged\.gguf cannot be read as a GGUF model: "):
        source.open(str(tmp_path / "damaged.gguf"), cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(head)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match=rf"^{tmp_path}/cache/gguf cannot be written: "):
        source.open(str(tmp_path / "model.gguf"), cache=tmp_path / "cache")


def test_what_lies_beside_a_file_is_not_used_and_named(small: Path, tmp_path: Path) -> None:
    """A folder of GGUF files often has another model's config.json, or an older tokenizer."""
    alone = gguf.folder(small, tmp_path / "cache", source.quiet)
    (small.parent / "config.json").write_text('{"model_type": "gpt2"}')
    (small.parent / "tokenizer.json").write_text("{}")
    said: list[str] = []
    beside = gguf.folder(small, tmp_path / "other", said.append)
    assert said[0] == "not used: config.json, tokenizer.json beside small.gguf, which has its own"
    files = {path.name for path in alone.iterdir()}
    assert files == {path.name for path in beside.iterdir()}
    assert all((alone / name).read_bytes() == (beside / name).read_bytes() for name in files)


def test_a_machine_that_is_too_small_is_told_before_the_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "of_host", lambda: 1 << 20)
    with pytest.raises(RoomError, match=rf"^{small}: converting it needs 0\.\d GB of memory, and"):
        gguf.folder(small, tmp_path / "cache", source.quiet)
    assert leftovers(tmp_path / "cache") == []


def test_another_process_that_was_first_is_as_good(tmp_path: Path) -> None:
    target = tmp_path / "kept" / "model"

    def overtaken(growing: Path) -> None:
        (growing / "name").write_text("ours")
        target.mkdir()
        (target / "name").write_text("theirs")

    assert (cached.folder(target, overtaken) / "name").read_text() == "theirs"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_file_in_the_way_of_a_conversion_is_named(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("a file in the way")
    with pytest.raises(SpaceError, match=r"cannot hold the model: .*Not a directory"):
        cached.folder(target, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
