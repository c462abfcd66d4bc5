"""Names of the files in a run directory and of the metrics in `metrics.jsonl`."""

CONFIG_NAME = "config.yaml"
SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
TOKENIZER_NAME = "tokenizer.json"
EVALUATION_NAME = "evaluation.json"
TASKS_NAME = "tasks.json"
SAMPLES_NAME = "samples.json"
REPORT_NAME = "report.html"

TOKENS = "train/tokens"
TRAIN_LOSS = "train/CE loss"
GRADIENT_NORM = "optim/total grad norm"
THROUGHPUT = "throughput/tokens per second"
LEARNING_RATES = {"model": "optim/learning rate (model)", "values": "optim/learning rate (values)"}
HELD_OUT_METRICS = "eval/heldout/"  # before each of these
HELD_OUT = {
    "loss": f"{HELD_OUT_METRICS}CE loss",
    "perplexity": f"{HELD_OUT_METRICS}perplexity",
    "bits_per_byte": f"{HELD_OUT_METRICS}bits per byte",
}
TASK_METRICS = "tasks/"  # before the name of a task
