"""Names of the files in a run directory and of the metrics in `metrics.jsonl`."""

from pathlib import Path

CONFIG_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
TOKENIZER_NAME = "tokenizer.json"
EVALUATION_NAME = "evaluation.json"
TASKS_NAME = "tasks.json"
SAMPLES_NAME = "samples.json"
REPORT_NAME = "report.html"

_NAMES = (
    *(CONFIG_NAME, SUMMARY_NAME, METRICS_NAME, TOKENIZER_NAME),
    *(EVALUATION_NAME, TASKS_NAME, SAMPLES_NAME, REPORT_NAME),
)


def is_runs_own(path: Path) -> bool:
    """Whether a path is that of a run's own file."""
    return path.name in _NAMES and (path.parent / CONFIG_NAME).is_file()


TOKENS = "train/tokens"
TRAIN_LOSS = "train/CE loss"
GRADIENT_NORM = "optim/total grad norm"
TABLE_GRADIENT_NORM = "optim/table grad norm"  # of tables with the row-wise optimizer, which the other leaves out
THROUGHPUT = "throughput/tokens per second"
UTILISATION = "throughput/model FLOPs utilisation"
TABLE_BANDWIDTH = "throughput/table bytes per second"
LEARNING_RATES = {"model": "optim/learning rate (model)", "values": "optim/learning rate (values)"}
HELD_OUT_METRICS = "eval/heldout/"  # before each of these
HELD_OUT = {
    "loss": f"{HELD_OUT_METRICS}CE loss",
    "perplexity": f"{HELD_OUT_METRICS}perplexity",
    "bits_per_byte": f"{HELD_OUT_METRICS}bits per byte",
}
TASK_METRICS = "tasks/"  # before the name of a task
