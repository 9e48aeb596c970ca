"""What `ray job submit --working-dir .` uploads, packed by Ray's own code."""

import logging
import shutil
import zipfile
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = (
    "runs/paper/checkpoint-00000001/model.safetensors",
    "corpora/coco/shards/shard-00000.parquet",
    "flickr8k/images.tar",
    "ALBEF.pth",
    "mlflow.db",
    "mlartifacts/1/model",
    "quickstart/summary.json",
    ".venv/bin/python",
    ".git/objects/pack",
    "jobs/__pycache__/pretrain.pyc",
    "annotations.json",
    "d/coco.tar",
)
TAKEN = ("jobs/pretrain.py", "pipelines/train.py", "albef_core/tasks/vqa.py", "configs/mine.json")


def test_the_code_goes_to_the_cluster_and_nothing_large(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "build", "__pycache__")
    )
    for name in (*LEFT_BEHIND, "configs/mine.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0")

    create_package(
        str(folder),
        tmp_path / "package.zip",
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
        logger=logging.getLogger("test"),
    )

    names = set(zipfile.ZipFile(tmp_path / "package.zip").namelist())
    assert (tmp_path / "package.zip").stat().st_size < 5e6
    assert names >= set(TAKEN)
    assert names & set(LEFT_BEHIND) == set()
    assert {name.split("/")[0] for name in names} <= {
        "albef_core", "benchmarks", "cluster.yaml", "configs", "jobs", "pipelines",
    }  # fmt: skip
