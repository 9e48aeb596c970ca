"""Before an elastic group of workers changes its size, it leaves a checkpoint: no step is lost."""

import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0
"""Longest wait for the checkpoint; without it the steps since the one before are done again."""
SECONDS_BETWEEN_LOOKS = 0.1


class SaveBeforeResizing(ControllerCallback):
    """Ray Train's controller ends all workers to resize their group: this holds it up until then.

    Runs in the controller. A group that lost a worker is not asked: what is left of it waits for
    the lost one, and starts again from its newest checkpoint.
    """

    def __init__(self, board: Any) -> None:
        """Take the driver's ProgressBoard, by which the workers are asked."""
        self._board = board

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ask for a checkpoint and wait for it, where a running group is to be resized."""
        if not isinstance(current_state, ResizingState):
            return
        deadline = time.monotonic() + TIMEOUT_S
        try:
            ray.get(self._board.ask_checkpoint.remote(), timeout=TIMEOUT_S)
            while ray.get(self._board.wants_checkpoint.remote(), timeout=TIMEOUT_S):
                if time.monotonic() > deadline:
                    logger.warning("no checkpoint in %.0f s: some steps are repeated", TIMEOUT_S)
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except (RayError, TimeoutError) as error:
            logger.warning("no checkpoint before resizing (%s): some steps are repeated", error)
