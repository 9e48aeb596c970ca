"""How a training goes on: which run a command means, and whether it may be that run."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from albef_core.errors import InputError
from pipelines.checkpoint import TRAINING_CONFIG
from pipelines.checkpoint_files import STATE_FILE
from pipelines.checkpoint_store import CheckpointStore, Found, open_checkpoint, open_store
from pipelines.config import TrainConfig
from pipelines.config_file import read_config
from pipelines.tracking import flatten

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainConfig)

CORPUS_FILE = "corpus_id"
"""File in a run's folder with the content id of what it trains on."""
CONFIG_FILE = "config.json"
ADOPTED_FILE = "resumed_from"
"""File in a run's folder that names the checkpoint of an earlier `--resume PATH`."""
MAY_CHANGE = frozenset(
    {
        "steps",
        "epochs",
        "workers",
        "min_workers",
        "micro_batch_size",
        "device",
        "corpus",
        "val",
        "val_at",
        "val_model",
        "storage",
        "name",
        "log_every",
        "feed_cpus",
        "feed_share",
        "worker_cpus",
        "gpus_per_worker",
        "accelerator_type",
        "placement",
        "max_bad_share",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_last",
        "keep_best",
        "checkpoints",
        "resume",
        "force",
        "max_failures",
        "step_timeout_s",
        "max_bad_steps",
        "experiment",
        "register",
        "register_checkpoint",
        "init",
        "image_weights",
        "text_weights",
    }
)
"""Fields that do not change what is learned at a step; the corpus's content does."""


def name_run(config: Config) -> Config:
    """Give a config without a name the one of the run that `--resume` means.

    Raises:
        InputError: `--resume` finds no checkpoint.
    """
    if config.name:
        return config
    if config.resume == "newest":
        runs = [file.parent for file in config.storage.glob(f"*/{CONFIG_FILE}")]
        runs.sort(key=_last_change, reverse=True)
        for run in runs:
            named = replace(config, name=run.name)
            if open_store(named).list_steps():
                logger.info("--resume: %s is the run with the newest checkpoint", run)
                return named
        raise InputError(
            f"--resume: no run in {config.storage} has a checkpoint. Check --storage, or start"
            " without --resume."
        )
    folder = Path(config.resume.rstrip("/"))
    if "://" in config.resume or not (folder.parent / CONFIG_FILE).is_file():
        raise InputError(
            f"--resume {config.resume} does not lie in a run's folder. Give --name: that of the"
            " run that goes on from it, or a new one."
        )
    return replace(config, name=folder.parent.name, storage=folder.parent.parent)


def check_same(config: TrainConfig, run_dir: Path, corpus_id: str) -> None:
    """Let a name go on only as what it was: other data or objectives would mix two runs in one.

    Raises:
        InputError: fields differ that change what is learned, and `--force` is not given.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        if config.resume == "newest":
            raise InputError(
                f"--resume: {run_dir} holds no run. Check --name and --storage, or start without"
                " --resume."
            )
        return
    other = _differences(config, read_config(run_dir / CONFIG_FILE, type(config)))
    if (run_dir / CORPUS_FILE).read_text() != corpus_id:
        other.append("corpus")
    _refuse(config, other, f"--name {config.name}: {run_dir} holds a run")


def adopt(config: TrainConfig, store: CheckpointStore, run_dir: Path, corpus_id: str) -> None:
    """Make the checkpoint that `--resume PATH` names the newest of the run.

    Its model folder also becomes the start of a run that is new.

    Raises:
        InputError: it is damaged, or of a run whose objective is another.
    """
    if config.resume in ("", "newest"):
        return
    found = open_checkpoint(config.resume)
    note, seal = run_dir / ADOPTED_FILE, f"{found.url} {found.state.serial}\n"
    if note.is_file() and note.read_text() == seal:
        logger.info("--resume: %s went on from it already, and goes on where it is", run_dir)
        return
    with found.fetch() as folder:
        saved = read_config(folder / TRAINING_CONFIG, type(config))
        other = _differences(config, saved)
        # The sizes as they became, against the sizes as they were asked for.
        if flatten(config).get("model.vocab_size") == "0":
            other = [name for name in other if name != "model.vocab_size"]
        if found.progress.corpus_id != corpus_id:
            other.append("corpus")
        _refuse(config, other, f"--resume {config.resume} was made by a run")
        start = run_dir / "start"
        if not start.is_dir():
            shutil.copytree(folder, start, ignore=lambda _dir, names: _training_only(names))
        newest = store.newest_good()
        if newest is None or not _is_same(newest, found):
            # Points that another run's MLflow still lacks are not this run's.
            is_own = Path(found.url).parent == run_dir
            progress = found.progress if is_own else replace(found.progress, unsent=[])
            store.write(progress, lambda scratch: _copy_files(found, folder, scratch))
    note.write_text(seal)  # the same command again, after a kill, is not to go back once more


def _is_same(one: Found, other: Found) -> bool:
    return one.state.files == other.state.files


def _copy_files(found: Found, source: Path, target: Path) -> None:
    for name in found.state.files:
        shutil.copyfile(source / name, target / name)


def _training_only(names: list[str]) -> list[str]:
    return [name for name in names if name in TRAINING_FILES]


TRAINING_FILES = ("teacher.safetensors", "optimizer.pt", TRAINING_CONFIG, STATE_FILE)
"""What a checkpoint has beside the model folder that it also is."""


def _differences(now: TrainConfig, before: TrainConfig) -> list[str]:
    values, earlier = flatten(now), flatten(before)
    return [
        name
        for name, value in values.items()
        if value != earlier.get(name) and name not in MAY_CHANGE
    ]


def _refuse(config: TrainConfig, other: list[str], whose: str) -> None:
    if not other:
        return
    if config.force:
        logger.warning("--force: going on with other values of %s", ", ".join(other))
        return
    raise InputError(
        f"{whose} with other values of {', '.join(other)}, which change what is learned. Give"
        " another --name, the same flags to go on with it, or --force."
    )


def _last_change(run: Path) -> float:
    files = [run / CONFIG_FILE, *run.glob(f"*/{STATE_FILE}")]
    return max(file.stat().st_mtime for file in files)
