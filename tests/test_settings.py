"""Settings: the command line over the environment, strangers refused, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve import settings
from serve.errors import SettingsError


def test_the_command_line_wins_over_the_environment() -> None:
    env = {"QUANTSERVE_PORT": "9000", "QUANTSERVE_THREADS": "1", "PATH": "/bin"}
    chosen = settings.load(env, port=9001, host=None)
    assert (chosen.port, chosen.threads, chosen.host) == (9001, 1, "127.0.0.1")


def test_the_child_reads_what_the_parent_chose() -> None:
    chosen = settings.load(
        {},
        artifact=Path("/models/a"),
        adapters={"legal": "/adapters/legal", "chat": "s3://b/chat"},
        source_schemes=("file", "s3"),
        allow_hub=True,
        vllm_flags=("--max-num-seqs", "8"),
        drain_timeout=1.5,
    )
    assert settings.load(chosen.environment()) == chosen


def test_an_unknown_name_is_refused_and_the_known_are_told() -> None:
    with pytest.raises(SettingsError, match=r"QUANTSERVE_PROT.*known:.*QUANTSERVE_PORT"):
        settings.load({"QUANTSERVE_PROT": "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "many"),
        ("MAX_CPU_ISA", "sse"),
        ("ADAPTERS", "[1]"),
        ("VLLM_FLAGS", "x"),
        ("SOURCE_SCHEMES", "s3"),
        ("ADAPTER_WAIT", "0"),
    ],
)
def test_an_unusable_value_names_its_setting(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"(?i){name}"):
        settings.load({f"QUANTSERVE_{name}": value})


@pytest.mark.parametrize("alias", ["a:b", "a@b", "", "a b", "ü", "a" * 201, "..", "a/./b"])
def test_an_alias_that_looks_like_a_version_is_refused(alias: str) -> None:
    with pytest.raises(SettingsError, match="alias"):
        settings.load({}, adapters={alias: "/x"})


@pytest.mark.parametrize("alias", ["canary", "team/history", "a/rollback", "promote"])
def test_an_alias_that_would_end_like_an_admin_route_is_refused(alias: str) -> None:
    with pytest.raises(SettingsError, match="admin routes"):
        settings.load({}, adapters={alias: "/x"})


def test_children_inherit_everything_but_our_settings() -> None:
    assert settings.inherited({"HOME": "/root", "QUANTSERVE_PORT": "1"}) == {"HOME": "/root"}


LINKS = {
    "QUANTSERVE_SERVICE_HOST": "10.0.0.1",
    "QUANTSERVE_SERVICE_PORT": "8000",
    "QUANTSERVE_SERVICE_PORT_HTTP": "8000",
    "QUANTSERVE_PORT": "tcp://10.0.0.1:8000",
    "QUANTSERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "QUANTSERVE_PORT_8000_TCP_PROTO": "tcp",
    "QUANTSERVE_PORT_8000_TCP_PORT": "8000",
    "QUANTSERVE_PORT_8000_TCP_ADDR": "fd00::1",
    "QUANTSERVE_GPU_SERVICE_HOST": "10.0.0.2",  # a service `quantserve-gpu`
    "QUANTSERVE_GPU_PORT": "tcp://10.0.0.2:8000",
    "QUANTSERVE_GPU_PORT_8000_UDP": "udp://10.0.0.2:8000",
}


def test_a_kubernetes_service_of_our_name_is_no_setting() -> None:
    assert settings.load(LINKS) == settings.load({})
    assert settings.load(LINKS | {"QUANTSERVE_PORT": "9000"}).port == 9000
    assert settings.load({"QUANTSERVE_PORT": LINKS["QUANTSERVE_PORT"]}, port=9001).port == 9001


@pytest.mark.parametrize(
    ("name", "value"),
    [("SERVICE_HOSTS", "10.0.0.1"), ("SERVICE_HOST", "not an address"), ("SERVICE_PORT", "many"),
     ("SERVICE", "10.0.0.1"), ("PORT_8000", "tcp://10.0.0.1:8000"), ("PORT", "tcp:8000"),
     ("PORT_8000_TCP", "8000"), ("PORT_8000_TCP_PROTO", "http"), ("PORTS", "tcp://10.0.0.1:1")],
)  # fmt: skip
def test_what_only_looks_like_one_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"QUANTSERVE_{name}|port"):
        settings.load({f"QUANTSERVE_{name}": value})


def test_an_unusable_value_names_the_option_or_the_variable_that_it_came_from() -> None:
    env = {"QUANTSERVE_PORT": "many", "QUANTSERVE_THREADS": "-1"}
    with pytest.raises(SettingsError) as refused:
        settings.load(env, threads=-2, adapters={"a:b": "/x"})
    first, second, third = str(refused.value).split("; ")
    assert {each.partition(": ")[0] for each in (first, second, third)} == {
        "QUANTSERVE_PORT", "--threads", "--adapter",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("env", "told", "blamed"),
    [
        ({"QUANTSERVE_HOST": "0.0.0.0"}, "refusing to listen on 0.0.0.0", "QUANTSERVE_HOST"),
        ({"QUANTSERVE_MAX_ADAPTERS": "0"}, "--max-adapters is 0", "QUANTSERVE_MAX_ADAPTERS"),
        ({"QUANTSERVE_ADAPTERS": '{"a": "/x"}'}, "--adapter a=/x: no", "QUANTSERVE_ADAPTERS"),
    ],
)
def test_a_later_refusal_names_it_too(env: dict[str, str], told: str, blamed: str) -> None:
    chosen = settings.load(env)
    with (
        pytest.raises(SettingsError, match=f"{told}; set by {blamed}$"),
        settings.naming_variables(chosen, env),
    ):
        raise SettingsError(told)


def test_a_variable_that_an_option_overrode_is_not_blamed() -> None:
    env = {"QUANTSERVE_HOST": "10.0.0.1", "QUANTSERVE_ROOT_PATH": "/else"}
    chosen = settings.load(env, host="0.0.0.0")
    with (
        pytest.raises(SettingsError, match=r"^--host 0\.0\.0\.0 has no keys$"),
        settings.naming_variables(chosen, env),
    ):
        raise SettingsError("--host 0.0.0.0 has no keys")
