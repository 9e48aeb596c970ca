"""Pre-train ALBEF on a corpus: `[ray job submit --] python jobs/pretrain.py tiny --corpus DIR`."""

from command_line import parse_preset, run_job

from pipelines.presets import PRETRAIN


def main() -> None:
    config = parse_preset(PRETRAIN)
    # torch and ray come after the parse, so that --help is instant.
    from pipelines.train import pretrain

    pretrain(config)


if __name__ == "__main__":
    run_job(main)
