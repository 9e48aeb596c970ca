"""The doctor's look at MLflow: one run opened, written, read back and finished."""

import json
import tempfile
from pathlib import Path

from pipelines.config import PretrainConfig
from pipelines.doctor_finding import Finding, Problem
from pipelines.tracking import RunHandle, Tracker, open_run

# isort: split
# After tracking.py, which says how MLflow is to start.
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

EXPERIMENT = "albef-doctor"
METRIC, ARTIFACT = "doctor/probe", "probe.json"
VALUE = 0.15625
"""Exact in binary, so that it comes back as it was."""
TIMEOUT_S = 15.0
ANOTHER = "mend it, or set another MLFLOW_TRACKING_URI."


def check_tracking(config: PretrainConfig) -> Finding:
    """Open a run in the experiment `albef-doctor`, log into it, and read back what was logged."""
    handle = open_run(
        EXPERIMENT, None, run_name=config.name or "doctor", params=config, tags={"doctor": "true"}
    )
    tracker = Tracker(handle)
    tracker.log({METRIC: VALUE}, step=1)
    tracker.log_dict({METRIC: VALUE}, ARTIFACT)
    if not tracker.flush(TIMEOUT_S):
        tracker.close(timeout_s=0)
        return Finding.of(
            f"{handle.uri}: took no metric within {TIMEOUT_S:.0f} s",
            [Problem("fail", f"{handle.uri} does not answer in time: {ANOTHER}")],
        )
    tracker.finish()
    lost = _lost(handle)
    found = f"all but {', '.join(lost)}" if lost else "metric, artifact and end"
    return Finding.of(
        f"{handle.uri}: run {handle.run_id[:8]} in {EXPERIMENT}, {found} read back",
        [Problem("fail", f"{handle.uri} loses what it is given: {ANOTHER}")] if lost else [],
    )


def _lost(handle: RunHandle) -> list[str]:
    """Name what the store does not give back."""
    run = MlflowClient(handle.uri).get_run(handle.run_id)
    with tempfile.TemporaryDirectory(prefix="albef-doctor-") as scratch:
        file = download_artifacts(
            run_id=handle.run_id,
            artifact_path=ARTIFACT,
            dst_path=scratch,
            tracking_uri=handle.uri,
        )
        body = json.loads(Path(file).read_text(encoding="utf-8"))
    kept = {
        "the metric": run.data.metrics.get(METRIC) == VALUE,
        "the artifact": body == {METRIC: VALUE},
        f"the end (it is {run.info.status})": run.info.status == "FINISHED",
    }
    return [name for name, is_kept in kept.items() if not is_kept]
