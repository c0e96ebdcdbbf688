"""Rules that hold the shape of the project: who may import whom, and what nobody may call."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cvae", "pipeline", "slurm", "launch")  # each may import itself and what stands before it
ROOMS = (  # inside pipeline, from the bottom up; each may import itself and what stands before it
    "errors",
    "config",
    "rundir",
    "runtime",
    "tracking",
    "data",
    "training",
    "evaluation",
    "reporting",
    "stages",
    "prepare",
    "command_line",
    "run",
)
MOST_FILES = 12  # in one folder, besides __init__.py
DOORS = {  # a library: the only files that may import it
    "submitit": "slurm/",
    "mlflow": "pipeline/tracking/mlflow/",
    "torchvision": "pipeline/evaluation/vision.py",
    "torch_fidelity": ("pipeline/evaluation/vision.py", "tools/dev/benchmarks/peers/"),
    "fcntl": "pipeline/rundir/lock.py",
    "difflib": ("pipeline/config/suggest.py", "cvae/io.py"),
}
READERS = ("cvae/io.py", "cvae/nets/perceptual.py")  # the files of the model that read weights
FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
)


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


OWN = [*python_files("cvae", "pipeline", "slurm", "tools"), ROOT / "launch.py"]
TREES = {file: ast.parse(file.read_text()) for file in OWN}


def imports(file: Path) -> set[str]:
    """Every module that `file` imports, also inside functions; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room(module: str) -> str | None:
    """The room of a module or of a file's path: 'pipeline.data.shards' -> 'data'."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("file", OWN, ids=relative)
def test_imports_go_one_way(file):
    layer = relative(file).split("/")[0].removesuffix(".py")
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) if layer in LAYERS else set()
    forbidden = above | ({"tools"} if layer in LAYERS else set()) | {"tests"}
    tops = {name.split(".")[0] for name in imports(file)}
    assert not tops & forbidden, f"{relative(file)} imports upwards"


@pytest.mark.parametrize("file", python_files("pipeline"), ids=relative)
def test_rooms_of_the_pipeline(file):
    own = room(relative(file))
    if own is None:
        assert relative(file) == "pipeline/__init__.py", f"{relative(file)}: in none of the rooms"
        return
    above = ROOMS[ROOMS.index(own) + 1 :]
    upwards = sorted(name for name in imports(file) if room(name) in above)
    assert not upwards, f"{relative(file)} imports upwards: {', '.join(upwards)}"


@pytest.mark.parametrize("file", python_files("pipeline/stages"), ids=relative)
def test_stages_meet_in_files_not_in_imports(file):
    others = {name for name in imports(file) if name.startswith("pipeline.stages.")}
    assert not others


def test_no_folder_is_too_full():
    counts: dict[Path, int] = {}
    modules = [file for file in [*OWN, *python_files("tests")] if file.name != "__init__.py"]
    for file in modules:
        counts[file.parent] = counts.get(file.parent, 0) + 1
    full = {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MOST_FILES}
    assert not full, f"more than {MOST_FILES} files: {full}"


@pytest.mark.parametrize("file", python_files("cvae"), ids=relative)
def test_the_model_is_torch_alone(file):
    tops = {name.split(".")[0] for name in imports(file)}
    libraries = {"torch", "cvae"}
    if relative(file) == "cvae/io.py":
        libraries.add("safetensors")
    assert tops <= libraries | sys.stdlib_module_names
    assert not tops & {"logging", "socket", "subprocess"}
    if relative(file) not in READERS:
        assert not tops & {"pathlib", "os", "io"}
    assert "torch.distributed" not in imports(file)


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    users = [relative(file) for file in OWN if library in {name.split(".")[0] for name in imports(file)}]
    own = [user for user in users if not user.startswith("tools/dev/")]
    assert own and all(user.startswith(DOORS[library]) for user in own)


def test_training_and_launch_know_the_tracker_not_mlflow():
    allowed = ("pipeline/tracking/", "tools/")
    for file in OWN:
        if not relative(file).startswith(allowed):
            used = [name for name in imports(file) if name.startswith("pipeline.tracking.mlflow")]
            assert not used, f"{relative(file)}: {used}"


def test_no_file_passes_names_on():
    for file in OWN:
        for node in ast.walk(TREES[file]):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            assert "__all__" not in names, relative(file)


@pytest.mark.parametrize("file", OWN, ids=relative)
def test_nothing_is_loaded_that_can_execute(file):
    for node in ast.walk(TREES[file]):
        if not isinstance(node, ast.Call):
            continue
        where = f"{relative(file)}:{node.lineno}"
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, where
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load":
            assert given.get("weights_only") == "True", where
        assert given.get("shell") != "True", where
        assert given.get("allow_pickle") != "True", where


def test_no_module_mixes_the_images_of_a_batch():
    for file in OWN:
        if relative(file).startswith("tools/dev/benchmarks/peers/"):
            continue  # other people's networks are measured as they are
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith(("BatchNorm", "SyncBatchNorm")), relative(file)
