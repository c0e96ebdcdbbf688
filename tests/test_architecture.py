"""Rules that hold the shape of the project: who may import whom, and what nobody may call."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("cvae", "pipeline", "slurm", "launch")  # each may import itself and what stands before it
ROOMS = {  # inside pipeline: who may not be imported by whom
    "pipeline/runtime": ("pipeline.data", "pipeline.evaluation"),
    "pipeline/data": ("pipeline.evaluation",),
    "pipeline/evaluation": (),
}
OWN = [
    p for layer in ("cvae", "pipeline", "slurm", "tools") for p in sorted((ROOT / layer).rglob("*.py"))
] + [ROOT / "launch.py"]


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", OWN, ids=relative)
def test_imports_go_one_way(file):
    layer = relative(file).split("/")[0].removesuffix(".py")
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) if layer in LAYERS else set()
    tops = {name.split(".")[0] for name in imports(file)}
    assert not tops & (above | ({"tools"} if layer in LAYERS else set())), f"{relative(file)} imports upwards"


@pytest.mark.parametrize("file", sorted((ROOT / "pipeline").rglob("*.py")), ids=relative)
def test_rooms_of_the_pipeline(file):
    names, where = imports(file), relative(file)
    for room, forbidden in ROOMS.items():
        if where.startswith(room):
            assert not {n for n in names if n.startswith((*forbidden, "pipeline.stages."))}, where
    if where.startswith("pipeline/stages/") and not where.endswith("__init__.py"):
        assert not {n for n in names if n.startswith("pipeline.stages.")}, (
            f"{where}: stages meet in files, not in imports"
        )


def test_the_model_knows_nothing_of_the_cluster():
    for file in (ROOT / "cvae").glob("*.py"):
        tops = {n.split(".")[0] for n in imports(file)}
        assert not tops & {
            "logging",
            "submitit",
            "mlflow",
            "numpy",
            "pathlib",
        } and "torch.distributed" not in imports(file), file.name


def test_only_slurm_knows_submitit_and_only_vision_knows_torchvision():
    for file in OWN:
        tops = {n.split(".")[0] for n in imports(file)}
        assert "submitit" not in tops or relative(file).startswith("slurm/"), file
        assert not tops & {"torchvision", "torch_fidelity"} or file.name == "vision.py", file


@pytest.mark.parametrize("file", OWN, ids=relative)
def test_nothing_is_loaded_that_can_execute(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in (
            "eval",
            "exec",
            "os.system",
            "pickle.load",
            "pickle.loads",
            "yaml.load",
            "yaml.unsafe_load",
        ), called
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called != "torch.load" or given.get("weights_only") == "True", (
            f"{relative(file)}:{node.lineno}"
        )
        assert given.get("shell") != "True" and given.get("allow_pickle") != "True", (
            f"{relative(file)}:{node.lineno}"
        )


def test_no_module_mixes_the_images_of_a_batch():
    for file in OWN:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (
                isinstance(node, ast.Attribute) and node.attr.startswith(("BatchNorm", "SyncBatchNorm"))
            ), relative(file)
