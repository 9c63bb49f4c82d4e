"""Flags after `--` that say where and to whom the server answers are ours, or refused by name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from serve import engine_args, vllm_flags
from serve.engine_args import Facts
from serve.errors import SettingsError
from serve.settings import Settings

PLAIN = {
    "host": "127.0.0.1", "port": 8000, "uds": None, "api_key": None, "root_path": "",
    "ssl_certfile": None, "ssl_keyfile": None, "ssl_ca_certs": None, "ssl_cert_reqs": 0,
    "ssl_ciphers": None,
}  # fmt: skip


def adopted(*flags: str) -> Settings:
    return vllm_flags.adopt(Settings(vllm_flags=flags), {})


@pytest.mark.parametrize("name", vllm_flags.REFUSED)
@pytest.mark.parametrize("spelling", ["--{} x", "--{}=x", "--{_} x", "--{_}=x"])
def test_what_cannot_be_is_refused_by_name_with_the_way_out(name: str, spelling: str) -> None:
    words = spelling.replace("{}", name).replace("{_}", name.replace("-", "_")).split()
    with pytest.raises(SettingsError, match=f"--{name} after the --: .*(give|proxy)"):
        adopted("--max-num-seqs", "8", *words)


def test_a_short_name_is_the_same_flag() -> None:
    with pytest.raises(SettingsError, match="--api-server-count after the --"):
        adopted("-asc", "2")


@pytest.mark.parametrize(
    "flags",
    [("--ssl-certfile", "/c.pem", "--ssl-keyfile", "/k.pem"),
     ("--ssl_certfile=/c.pem", "--ssl_keyfile=/k.pem")],
)  # fmt: skip
def test_tls_is_taken_over(flags: tuple[str, ...]) -> None:
    chosen = adopted("--max-num-seqs", "8", *flags, "-tp", "2")
    assert (chosen.ssl_certfile, chosen.ssl_keyfile) == (Path("/c.pem"), Path("/k.pem"))
    assert chosen.vllm_flags == ("--max-num-seqs", "8", "-tp", "2")
    chosen = chosen.model_copy(update={"max_adapters": 0})
    said = engine_args.flags(chosen, Facts(on_cpu=False, cpu_flags=frozenset(), quantization=None))
    assert said[said.index("--ssl-certfile") + 1] == "/c.pem"


def test_a_root_path_is_taken_over_and_told_to_vllm() -> None:
    chosen = adopted("--root-path", "/inference/llm")
    assert chosen.root_path == "/inference/llm" and chosen.vllm_flags == ()
    assert vllm_flags.given(chosen) == ["--root-path", "/inference/llm"]


@pytest.mark.parametrize("flags", [("--root-path",), ("--root-path", "/a", "/b")])
def test_a_flag_without_its_value_is_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="expected one value"):
        adopted(*flags)


def test_a_key_in_the_environment_is_refused_too() -> None:
    with pytest.raises(SettingsError, match="VLLM_API_KEY is set: give --api-key-file"):
        vllm_flags.adopt(Settings(), {"VLLM_API_KEY": "sk"})


@pytest.mark.parametrize("line", ["port: 9", "api_key: sk", "ssl-certfile: /c", "root_path : /x"])
def test_a_file_of_flags_is_looked_into(tmp_path: Path, line: str) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text(f"max-num-seqs: 8\n{line}\n")
    name = line.partition(":")[0].strip().replace("_", "-")
    with pytest.raises(SettingsError, match=f"flags.yaml says {name}: .*give"):
        adopted("--config", str(config))
    config.write_text("max-num-seqs: 8\nsupport: 9\n")
    assert adopted(f"--config={config}").vllm_flags == (f"--config={config}",)
    with pytest.raises(SettingsError, match="cannot read"):
        adopted("--config", str(tmp_path))


def test_other_flags_are_vllms() -> None:
    flags = ("--max-num-seqs", "8", "--middleware", "a.B", "--enable-ssl-refresh", "-tp", "2")
    assert adopted(*flags).vllm_flags == flags


def test_what_vllm_understood_is_looked_at_however_it_was_spelled() -> None:
    vllm_flags.check(Namespace(**PLAIN), Settings())
    for name, value in (("host", "0.0.0.0"), ("port", 9), ("uds", "/s"), ("api_key", ["k"]),
                        ("ssl_ca_certs", "/ca"), ("ssl_cert_reqs", 2), ("root_path", "/x"),
                        ("ssl_certfile", "/c")):  # fmt: skip
        with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} among vLLM's flags"):
            vllm_flags.check(Namespace(**PLAIN | {name: value}), Settings())


def test_what_we_told_vllm_passes() -> None:
    chosen = Settings(port=9000, root_path="/llm", ssl_certfile=Path("/c"), ssl_keyfile=Path("/k"))
    told = PLAIN | {"port": 9000, "root_path": "/llm", "ssl_certfile": "/c", "ssl_keyfile": "/k"}
    vllm_flags.check(Namespace(**told), chosen)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--no-such-flag", "lists what it takes"), ("--max-model-length=8", "--max-model-len?"),
     ("--max_num_seq_s", "--max-num-seqs?")],
)  # fmt: skip
def test_a_flag_that_vllm_does_not_know_is_refused_by_name(flag: str, hint: str) -> None:
    named = flag.partition("=")[0].replace("_", "-")
    with pytest.raises(SettingsError) as refused:
        adopted("--max-num-seqs", "8", flag, "9")
    told = str(refused.value)
    assert told.startswith(f"{named} after the --: vLLM ") and told.endswith(hint)


@pytest.mark.parametrize(
    "flags",
    [("--max-model-l", "9"), ("--no-enable-prefix-caching",), ("--compilation-config.mode=0",),
     ("-O3",), ("--enable_auto_tool_choice",), ("--override-generation-config", "--x")[:1]],
)  # fmt: skip
def test_every_spelling_that_vllm_takes_passes(flags: tuple[str, ...]) -> None:
    assert adopted(*flags).vllm_flags == flags
