"""`quant.beforehand`: mistakes that need nothing are told before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quant import beforehand
from quant.errors import AdapterError, ArtifactError, CalibrationError, RecipeError, SourceError

HEAVY = ("torch", "transformers", "numba", "vllm", "matplotlib")
QUANTIZE = ("quantize", "{model}", "--out", "{free}")
MERGE = ("adapter", "merge", "{model}", "--adapter", "{lora}", "--out", "{free}")
EXPORT = ("adapter", "export", "{lora}", "--base", "{model}", "--out", "{free}")
COMPARE = ("compare", "{model}", "{sealed}")

# A command line, and what its one line must say.
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "model": (("quantize", "{gone}", "--out", "{free}"), "gone does not exist"),
    "no model": (("quantize", "{file}", "--out", "{free}"), "neither a model folder nor a .gguf"),
    "taken": (("quantize", "{model}", "--out", "{taken}"), "taken exists already; --force"),
    "device": ((*QUANTIZE, "--device", "gpu"), "'gpu' is not cpu, cuda or cuda:N"),
    "scheme": ((*QUANTIZE, "--scheme", "w5"), "'w5' is not one of w4a16, w8a16, w8a8"),
    "group": ((*QUANTIZE, "--group-size", "48"), "group_size"),
    "adapter": ((*QUANTIZE, "--adapter", "{gone}"), "gone does not exist"),
    "no adapter": ((*QUANTIZE, "--adapter", "{model}"), "adapter_config.json"),
    "initial": ((*QUANTIZE, "--adapter", "{lora}", "--initial", "{gone}"), "gone does not exist"),
    "texts": ((*QUANTIZE, "--calibration", "{gone}"), "gone cannot be read"),
    "answers": ((*QUANTIZE, "--assistant-only"), "give one as --calibration"),
    "limit": ((*QUANTIZE, "--max-kl", "-1"), "max-kl is -1"),
    "option": ((*QUANTIZE, "--samplez", "1"), "No such option"),
    "inspect": (("inspect", "{gone}"), "gone does not exist"),
    "inspect a model": (("inspect", "{model}"), "it is not an artifact of ours"),
    "compare": (("compare", "{gone}", "{model}"), "gone does not exist"),
    "compare what": (("compare", "{model}", "{model}"), "it is not an artifact of ours"),
    "compare plot": (("compare", "{model}", "{model}", "--plot", "{gone}/a.png"), "--plot"),
    "check": (("adapter", "check", "{gone}"), "gone does not exist"),
    "check base": (("adapter", "check", "{lora}", "--base", "{gone}"), "gone does not exist"),
    "merge": (("adapter", "merge", "{gone}", *MERGE[3:]), "gone does not exist"),
    "merge weight": ((*MERGE, "--adapter", "{lora}=much"), "expected FOLDER or FOLDER=WEIGHT"),
    "merge taken": ((*MERGE[:-1], "{taken}"), "taken exists already"),
    "export": ((*EXPORT[:4], "{gone}", *EXPORT[5:]), "gone does not exist"),
    "export parent": ((*EXPORT, "--compensate", "4", "--parent", "{gone}"), "gone does not exist"),
    "ways": (("adapter", "compare", "{gone}", "--parent", "{model}", "--base", "{model}"),
             "it is not an artifact of ours"),
    "serve": (("serve", "{gone}"), "gone is not a folder"),
    "serve port": (("serve", "{model}", "--port", "99999"), "--port: "),
    "serve flag": (("serve", "{model}", "--", "--no-such-flag"), "--no-such-flag after the --"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("named")
    there = {name: home / name for name in ("model", "lora", "taken", "file", "free", "gone")}
    for name in ("model", "lora", "taken"):
        there[name].mkdir()
    (there["model"] / "config.json").write_text("{}")
    (there["lora"] / "adapter_config.json").write_text("{}")
    (there["taken"] / "precious.txt").write_text("mine")
    there["file"].write_text("no model")
    return there


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_needs_nothing_is_told_before_the_imports(
    mistake: str, places: dict[str, Path]
) -> None:
    words, told = MISTAKES[mistake]
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('loaded:', *({{*{HEAVY!r}}} & set(sys.modules))))\n"
        "from serve.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(word.format(**places) for word in words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert told in done.stderr
    assert done.stdout == "loaded:\n"
    assert not places["free"].exists() and [*places["taken"].iterdir()]


def test_what_is_there_passes_and_what_is_not_has_an_error_of_its_own(
    places: dict[str, Path],
) -> None:
    there, gone = places["model"], places["gone"]
    beforehand.Named(
        models=["demo", "org/model", str(there), None],
        adapters=[places["lora"]],
        texts=[places["file"]],
        targets=[places["free"]],
    ).check()
    for named, fault in {
        beforehand.Named(models=(str(gone),)): SourceError,
        beforehand.Named(artifacts=(gone,)): ArtifactError,
        beforehand.Named(adapters=(gone,)): AdapterError,
        beforehand.Named(texts=(gone,)): CalibrationError,
    }.items():
        with pytest.raises(fault):
            named.check()


@pytest.mark.parametrize(
    ("cuda", "hip", "has"),
    [("None", "None", False), ("'12.8'", "None", True), ("None", "'6.4'", True)],
)
def test_a_gpu_is_refused_where_torch_was_built_for_none(
    *, cuda: str, hip: str, has: bool, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch/version.py").write_text(
        f"cuda: Optional[str] = {cuda}\nhip: Optional[str] = {hip}\n"
    )
    code = "from quant import beforehand; beforehand.check_device('cuda:0')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == has, done.stderr
    assert has or "built without CUDA" in done.stderr


def test_scheme_names_are_case_blind() -> None:
    from quant import recipe

    assert recipe.build({"scheme": "W4A16"}).scheme == "w4a16"
    assert recipe.build({"scheme": "W8a8"}).bits == 8
    with pytest.raises(RecipeError):
        recipe.build({"scheme": "W5"})
